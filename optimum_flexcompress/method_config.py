"""What the configs of all methods share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from .errors import FlexCompressError, nearest


METHOD_CONFIGS: dict[str, type[MethodConfig]] = {}
"""Config classes by `method_type`; a subclass of [`MethodConfig`] enters itself."""


class MethodConfig:
    """Base of the method configs.

    A subclass is a dataclass that sets `method_type`, checks itself in `__post_init__`, and holds nothing but what
    JSON can hold.
    """

    method_type: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not cls.method_type:
            raise TypeError(f"{cls.__name__} needs a `method_type`, the name that its JSON carries.")
        METHOD_CONFIGS[cls.method_type] = cls

    def to_dict(self) -> dict[str, Any]:
        """The fields and the `method_type`, ready for JSON."""
        return {"method_type": self.method_type, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> MethodConfig:
        """Builds the config class that `data["method_type"]` names.

        Raises:
            FlexCompressError: The method type or a key is unknown (with the nearest known one), or a value is not
                acceptable.
        """
        data = dict(data)
        method_type = data.pop("method_type", None)
        if method_type is None:
            raise FlexCompressError(f'A method needs a "method_type": one of {", ".join(sorted(METHOD_CONFIGS))}.')
        if method_type not in METHOD_CONFIGS:
            raise FlexCompressError(f'Unknown method "{method_type}".{nearest(str(method_type), METHOD_CONFIGS)}')
        config_class = METHOD_CONFIGS[method_type]
        known = [field.name for field in dataclasses.fields(config_class)]
        for key in data:
            if key not in known:
                raise FlexCompressError(f'Unknown key "{key}" for the method "{method_type}".{nearest(key, known)}')
        return config_class(**data)

    def _check_weights(self, *names: str) -> None:
        for name in names:
            check_number(f"{self.method_type}.{name}", getattr(self, name), minimum=0.0)


def check_number(
    name: str, value: Any, *, minimum: float | None = None, above: float | None = None, integer: bool = False
) -> None:
    """Raises [`FlexCompressError`] unless `value` is a finite number in range (an `int` where `integer`)."""
    kind = int if integer else (int, float)
    acceptable = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if acceptable and minimum is not None:
        acceptable = value >= minimum
    if acceptable and above is not None:
        acceptable = value > above
    if not acceptable:
        bound = (
            f" of at least {minimum:g}" if minimum is not None else f" above {above:g}" if above is not None else ""
        )
        raise FlexCompressError(f"{name} is {value!r}: give {'an integer' if integer else 'a number'}{bound}.")
