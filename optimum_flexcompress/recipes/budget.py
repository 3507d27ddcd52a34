"""What a user asks of a compressed model: how much it may lose, how long it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import FlexCompressError
from ..search import read_share


@dataclass(frozen=True)
class Budget:
    """What was asked for.

    Attributes:
        max_drop: Largest share of the fine-tuned model's metric that may be lost.
        target_latency: Milliseconds.
        name: A measured model to take, whatever it loses or takes.
    """

    max_drop: float | None = None
    target_latency: float | None = None
    name: str | None = None

    @classmethod
    def read(cls, max_drop: str | None = None, target_latency: str | None = None, name: str | None = None) -> Budget:
        """Reads what a user may write: a share such as `1%`, a time such as `20ms`.

        Raises:
            FlexCompressError: It is none of these.
        """
        drop = None
        if max_drop is not None:
            drop = read_share("--max-drop", max_drop, 0.0)
            if drop == 1:
                raise FlexCompressError(
                    f"--max-drop {max_drop} allows to lose everything: write 1% or 0.01 for a percent."
                )
        return cls(drop, None if target_latency is None else _milliseconds(target_latency), name)

    @property
    def overrides(self) -> list[str]:
        """As settings of the recipe; those of stages that are skipped do no harm."""
        found = []
        if self.max_drop is not None:
            found += [f"stages.{setting}.max_drop={self.max_drop!r}" for setting in ("best", "pick")]
        if self.target_latency is not None:
            found.append(f"stages.best.target_latency={self.target_latency!r}")
        if self.name is not None:
            found.append(f"stages.best.name={self.name}")
        return found

    def __str__(self) -> str:
        """What was asked for, for a card."""
        asked = [] if self.max_drop is None else [f"loses at most {100 * self.max_drop:.3g} %"]
        asked += [] if self.target_latency is None else [f"takes at most {self.target_latency:g} ms"]
        if asked:
            return f"Planned for a budget: {', '.join(asked)}."
        return "Planned without a budget" + (
            "." if self.name is None else f", and {self.name} was chosen by its name."
        )


def _milliseconds(text: str) -> float:
    """`20ms`, `0.02s`, or `20`, which are milliseconds."""
    for unit, factor in (("ms", 1.0), ("s", 1e3), ("", 1.0)):
        if text.strip().endswith(unit):
            try:
                value = float(text.strip().removesuffix(unit)) * factor
            except ValueError:
                break
            if 0 < value < math.inf:
                return value
            break
    raise FlexCompressError(f"--target-latency is {text!r}: give a time above 0, such as 20ms or 0.02s.")
