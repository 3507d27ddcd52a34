"""The config of length-adaptive training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .errors import FlexCompressError, nearest
from .method_config import MethodConfig, check_number


LENGTH_UNITS = ("counts", "fractions")
DIVERGENCES = ("forward", "reverse")


@dataclass(kw_only=True)
class LengthAdaptiveConfig(MethodConfig):
    """Length-adaptive training (arXiv 2010.07003): one encoder that works with any number of tokens kept per layer.

    A step trains the full model on the task, and sub-models, which drop tokens, on the full model's output: the
    smallest one and `num_sandwich` random ones. Start it with a fresh optimizer, from a model fine-tuned on the task.

    Attributes:
        num_sandwich: How many random sub-models a step trains beside the smallest.
        length_drop: Of the tokens that a layer gets, it drops at most this share; the smallest sub-model always does.
        layer_drop: Probability with which a random sub-model skips a layer.
        divergence: Direction of the KL divergence from which sub-models learn: `"forward"`, KL(full || sub), or
            `"reverse"`, KL(sub || full), which the code of the paper computes. Heads for regression and for several
            labels at a time have no direction.
        temperature: Softens both sides of that divergence.
        unit: What lengths are drawn in: `"counts"`, where padding goes first, or `"fractions"` of the tokens of each
            sample, which suits samples of very different lengths. Use the model with lengths of the same kind.
        max_length: The length that counts start from; that of each batch when `None`.
        lengths: One fixed configuration (PoWER-BERT, arXiv 2001.08950): counts or fractions, one per layer. The model
            then trains with these lengths on the task alone, and keeps them; none of the above but `max_length`
            matters.
    """

    method_type: ClassVar[str] = "length_adaptive"

    num_sandwich: int = 2
    length_drop: float = 0.2
    layer_drop: float = 0.2
    divergence: str = "forward"
    temperature: float = 1.0
    unit: str = "counts"
    max_length: int | None = None
    lengths: list[int] | list[float] | None = None

    def __post_init__(self):
        check_number("length_adaptive.num_sandwich", self.num_sandwich, minimum=0, integer=True)
        self._check_share("length_drop", above=True)
        self._check_share("layer_drop", above=False)
        check_number("length_adaptive.temperature", self.temperature, above=0.0)
        for name, known in (("divergence", DIVERGENCES), ("unit", LENGTH_UNITS)):
            value = getattr(self, name)
            if value not in known:
                raise FlexCompressError(f'length_adaptive.{name} is "{value}".{nearest(str(value), known)}')
        if self.max_length is not None:
            check_number("length_adaptive.max_length", self.max_length, minimum=2, integer=True)
        if self.lengths is not None:
            # The runtime's own reading, so that what is refused there is refused here.
            from .token_dropping.lengths import LengthConfig

            parsed = LengthConfig.parse(self.lengths, self.max_length)
            if parsed is None:
                raise FlexCompressError("length_adaptive.lengths keeps all tokens: give a list, or leave it out.")
            self.lengths = list(parsed.values)

    def _check_share(self, name: str, above: bool) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not (0 < value < 1 if above else 0 <= value < 1):
            low = "above 0" if above else "of at least 0"
            raise FlexCompressError(f"length_adaptive.{name} is {value!r}: give a number {low} and below 1.")
