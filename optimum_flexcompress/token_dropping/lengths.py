"""Length configurations: how many tokens each layer of an encoder keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral, Real
from typing import Any

from ..errors import FlexCompressError, nearest


FULL = "full"
"""What a user may write for no dropping at all."""

UNITS = ("counts", "fractions")

_DIGIT = 2**15
_SCALE = _DIGIT**2
"""Fractions are applied in whole numbers of this denominator, so that every runtime rounds alike."""


@dataclass(frozen=True)
class LengthConfig:
    """How many tokens leave the self-attention of each layer.

    A count keeps `min(count, length of the batch)` tokens, padding going first. A fraction keeps
    `ceil(fraction * tokens of the sample)`, whatever the padding. Both refer to the input, not to the layer before. A
    layer whose self-attention was pruned away cannot tell which tokens matter: it passes on what it gets.

    Attributes:
        values: One per layer, never increasing: counts of at least 1, or fractions above 0 and up to 1.
        unit: `"counts"` or `"fractions"`.
        max_length: The input length that counts refer to, usually that of training; needed to turn one unit into the
            other.
    """

    values: tuple[int, ...] | tuple[float, ...]
    unit: str = "counts"
    max_length: int | None = None

    def __post_init__(self):
        if self.unit not in UNITS:
            raise FlexCompressError(f'A length configuration has the unit "{self.unit}".{nearest(self.unit, UNITS)}')
        if self.max_length is not None and not _is_count(self.max_length):
            raise FlexCompressError(
                f"max_length is {self.max_length!r}: give the input length of training, 1 or more."
            )
        values = self.values
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise FlexCompressError(
                f"Lengths are {values!r}: give a count or a fraction for each layer, as in [128, 96, 64] or "
                "[1.0, 0.75, 0.5]."
            )
        acceptable = _is_count if self.unit == "counts" else _is_fraction
        for index, value in enumerate(values):
            if not acceptable(value):
                wanted = "whole numbers of at least 1" if self.unit == "counts" else "above 0 and at most 1"
                raise FlexCompressError(
                    f"The length of layer {index} is {value!r}: {self.unit} are {wanted} (a layer cannot do without "
                    "any token)."
                )
            if index and value > values[index - 1]:
                raise FlexCompressError(
                    f"The length of layer {index} is {value}, more than the {values[index - 1]} of the layer before: "
                    "a dropped token does not come back, so let lengths fall or stay equal."
                )
        kind = int if self.unit == "counts" else float
        object.__setattr__(self, "values", tuple(kind(value) for value in values))

    @classmethod
    def parse(cls, value: Any, max_length: int | None = None) -> LengthConfig | None:
        """Reads what a user may give.

        Args:
            value: A `LengthConfig`, what [`to_dict`] makes, a list of counts (whole numbers) or of fractions (with a
                decimal point), or `None` or `"full"` for no dropping.
            max_length: The input length that counts refer to, for lists.

        Returns:
            The configuration, or `None` for no dropping.

        Raises:
            FlexCompressError: It is none of these, or holds lengths that cannot be.
        """
        if value is None or (isinstance(value, str) and value == FULL):
            return None
        if isinstance(value, LengthConfig):
            return value
        if isinstance(value, Mapping):
            return cls._from_dict(value)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise FlexCompressError(
                f'A length configuration is {value!r}: give a list such as [128, 96, 64] or [1.0, 0.75, 0.5], or "full".'
            )
        fractions = any(_is_number(item) and not isinstance(item, Integral) for item in value)
        # A 1 among fractions is a whole.
        if fractions and any(_is_count(item) and item > 1 for item in value):
            raise FlexCompressError(
                f"The lengths {list(value)} mix counts and fractions: give whole numbers alone, or fractions of at most 1."
            )
        return cls(tuple(value), "fractions" if fractions else "counts", max_length)

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> LengthConfig:
        known = ("unit", "counts", "fractions", "max_length")
        for key in data:
            if key not in known:
                raise FlexCompressError(f'A length configuration has the key "{key}".{nearest(str(key), known)}')
        unit = data.get("unit", "counts")
        if data.get(unit) is None:
            raise FlexCompressError(f'A length configuration in {unit} has no "{unit}": give one for each layer.')
        return cls(data[unit], unit, data.get("max_length"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: both units where `max_length` is known, and which of them holds."""
        data: dict[str, Any] = {"unit": self.unit, "max_length": self.max_length, self.unit: list(self.values)}
        if self.max_length is not None:
            data["counts"] = list(self.in_counts().values)
            data["fractions"] = list(self.in_fractions().values)
        return data

    def in_counts(self) -> LengthConfig:
        """The same lengths in counts at `max_length`."""
        if self.unit == "counts":
            return self
        return LengthConfig(tuple(self.at(self._reference())), "counts", self.max_length)

    def in_fractions(self) -> LengthConfig:
        """The same lengths as fractions of `max_length`."""
        if self.unit == "fractions":
            return self
        reference = self._reference()
        return LengthConfig(tuple(min(value / reference, 1.0) for value in self.values), "fractions", self.max_length)

    def _reference(self) -> int:
        if self.max_length is None:
            raise FlexCompressError(
                "Counts and fractions can only be turned into each other at a known input length: give max_length."
            )
        return self.max_length

    def at(self, length: int) -> list[int]:
        """How many tokens each layer keeps of a sample of `length` tokens."""
        if self.unit == "counts":
            return [min(value, length) for value in self.values]
        return [kept_of(length, numerator(value)) for value in self.values]

    def dropping_length(self) -> int:
        """The shortest input that the first layer to drop any token shortens."""
        if self.unit == "counts":
            return self.values[0] + 1
        fraction = next((value for value in self.values if value < 1), None)
        if fraction is None:
            return 1
        length = 1
        while kept_of(length, numerator(fraction)) == length:
            length += 1
        return length

    def layers(self, indices: Sequence[int]) -> LengthConfig:
        """The lengths of some of the layers, in a new order; none is longer than the one before."""
        return LengthConfig(
            tuple(accumulate((self.values[index] for index in indices), min)), self.unit, self.max_length
        )


def numerator(fraction: float) -> int:
    """A fraction as a whole number, for [`kept_of`]."""
    return round(fraction * _SCALE)


def kept_of(tokens: Any, numerator: int) -> Any:
    """`ceil(fraction * tokens)`, for an int or an integer tensor; up to 1e-4 above a whole number counts as it."""
    addend = _SCALE - 1 - _SCALE // 10_000
    if isinstance(tokens, int):
        return (tokens * numerator + addend) // _SCALE
    # In digits of 15 bits, because some runtimes (OpenVINO) have integers of 32 bits only. Nothing is negative here; the
    # exporter writes a dozen operators for what `//` would do if it were.
    low = (tokens * (numerator % _DIGIT) + addend % _DIGIT).div(_DIGIT, rounding_mode="trunc")
    return (tokens * (numerator // _DIGIT) + addend // _DIGIT + low).div(_DIGIT, rounding_mode="trunc")


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and 0 < value <= 1


def _is_number(value: Any) -> bool:
    """Whether it is one of Python's or NumPy's; `True` counts as none."""
    return isinstance(value, Real) and not isinstance(value, bool)
