"""The phases of a run: warm-up, ramp with halts, hold, fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import FlexCompressError
from ...vib_config import VIBPruningConfig


STEPS_PER_LEARNING_RATE = 5.0
"""Masks need about this many steps divided by their learning rate: they start nine nats from the threshold, Adam moves
a log variance by four learning rates per step at most, and they do not all go at once."""

LOOKAHEAD_PER_LEARNING_RATE = 0.5

FINAL_RATE = 0.1
"""Factor of the masks' learning rate at the end of the hold."""


@dataclass(frozen=True)
class Halt:
    """A stretch of the ramp at a constant sparsity.

    Attributes:
        sparsity: The sparsity.
        start: First step of the halt.
        stop: The step at whose end a checkpoint is written.
    """

    sparsity: float
    start: int
    stop: int


@dataclass(frozen=True)
class Schedule:
    """When what happens, in optimizer steps.

    Attributes:
        target: The sparsity at the end.
        warmup: Steps before the ramp.
        halts: The halts of the ramp and, as the last one, the hold at the target.
        fold: The step at whose end masks are folded.
        steps: Steps of the run.
        lookahead: Steps that a mask which is pushed takes to the threshold, about.
    """

    target: float
    warmup: int
    halts: tuple[Halt, ...]
    fold: int
    steps: int
    lookahead: int

    @classmethod
    def of(cls, config: VIBPruningConfig, target: float, levels: list[float], steps: int) -> Schedule:
        """Lays out the phases.

        Args:
            config: The config.
            target: The sparsity at the end.
            levels: Where to halt, ascending, below the target.
            steps: Steps of the run.

        Raises:
            FlexCompressError: The masks have too few steps to move.
        """
        warmup = round(config.warmup_fraction * steps)
        to_the_end = config.mode == "faster" and config.recovery is None
        masks = steps if to_the_end else round(_mask_fraction(config) * steps)
        needed = minimum_steps(config)
        if masks - warmup < needed:
            share = max((masks - warmup) / steps, 1e-9) if steps else 1.0
            raise FlexCompressError(
                f"The masks get {masks - warmup} steps, too few to move: they start nine nats from the threshold and "
                f"need about {needed} at mask_learning_rate={config.mask_learning_rate:g}; train for at least "
                f"{math.ceil(needed / share)} steps, or raise mask_learning_rate."
            )
        ramp = max(round(config.ramp_fraction * steps), 1)
        hold = max(masks - warmup - ramp, 0)
        lookahead = round(LOOKAHEAD_PER_LEARNING_RATE / config.mask_learning_rate)
        return cls(target, warmup, _halts(target, levels, warmup, ramp, hold), masks, steps, lookahead)

    def sparsity(self, step: int) -> float:
        """The sparsity that is wanted in a step, counted from 0."""
        level, begin = 0.0, self.warmup
        for halt in self.halts:
            if step < begin:
                break
            if step < halt.start:
                return level + (halt.sparsity - level) * (step - begin) / (halt.start - begin)
            level, begin = halt.sparsity, halt.stop
        return level

    def pressure(self, step: int) -> float:
        """The sparsity for which the constraint pushes in a step, ahead of the one that is wanted then."""
        for halt in self.halts:
            if step < halt.stop:
                return self.sparsity(min(step + self.lookahead, halt.stop - 1))
        return self.target

    def holds(self, step: int) -> bool:
        """Whether a step lies in the hold at the target."""
        return step >= self.halts[-1].start

    def learning_rate(self, step: int) -> float:
        """Factor of the masks' learning rate: 1 until the hold begins, then falling."""
        last = self.halts[-1]
        if step < last.start or last.stop <= last.start:
            return 1.0
        share = min((step - last.start) / (last.stop - last.start), 1.0)
        return 1.0 - (1.0 - FINAL_RATE) * share

    def level_due(self, step: int) -> float | None:
        """The sparsity at which a checkpoint is due after so many steps, on the way to the target."""
        for halt in self.halts[:-1]:
            if halt.stop == step:
                return halt.sparsity
        return None


def minimum_steps(config: VIBPruningConfig) -> int:
    """Steps that masks need to reach the threshold."""
    return math.ceil(STEPS_PER_LEARNING_RATE / config.mask_learning_rate)


def _mask_fraction(config: VIBPruningConfig) -> float:
    return min(config.warmup_fraction + config.ramp_fraction + config.hold_fraction, 1.0)


def _halts(target: float, levels: list[float], warmup: int, ramp: int, hold: int) -> tuple[Halt, ...]:
    """Each halt lasts as long as the others; the ramp between two takes what the difference of their levels does."""
    stops = [*levels, target]
    halts = []
    position = warmup
    before = 0.0
    for index, level in enumerate(stops):
        start = position + round(ramp * (level - before) / target)
        stop = warmup + ramp + hold if index == len(stops) - 1 else start + hold // len(stops)
        halts.append(Halt(level, min(start, stop), stop))
        position, before = stop, level
    return tuple(halts)
