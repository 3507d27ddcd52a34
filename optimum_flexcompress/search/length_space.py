"""The length configurations of a model as something to search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ..errors import FlexCompressError
from ..token_dropping import LengthConfig
from .evolution import MUTATION, Candidate
from .store import optuna


FLOOR = 2
"""Tokens that a searched configuration keeps at least."""
START_SHARE = 0.25
"""Of the full cost, where the start ends: cheaper ones lose too much to be of interest."""
_HALVINGS = 40


class LengthSpace:
    """Counts at the maximum length, one per layer, none above the one before.

    A gene is the share of the tokens that a layer gets which it keeps, so that lengths fall by construction. Layers
    whose self-attention was pruned away pass on what they get and have no gene.

    Args:
        able: For each layer of the encoder, whether it can drop tokens.
        max_length: Length of the input.
        unit: What the configurations are in: `"counts"`, or `"fractions"` of the maximum length.
        cost: What a candidate costs, falling with its lengths.
        length_drop: Share that each layer of the smallest configuration of training drops.
    """

    kind = "lengths"

    def __init__(
        self,
        able: Sequence[bool],
        max_length: int,
        unit: str,
        cost: Callable[[Candidate], float],
        length_drop: float = 0.2,
    ):
        self._able = [index for index, can in enumerate(able) if can]
        if not self._able:
            raise FlexCompressError(
                "No layer of the encoder has self-attention left, which tells the tokens to keep: there is nothing to "
                "search."
            )
        self._layers = len(able)
        self.max_length, self.unit = max_length, unit
        self._cost, self._length_drop = cost, length_drop
        self._floor = min(FLOOR, max_length)
        self.full = (max_length,) * self._layers
        low = self._floor / max_length
        self.distributions = {
            f"layer_{index}": optuna.distributions.FloatDistribution(low, 1.0) for index in self._able
        }
        # Falling sequences of lengths: combinations with repetition.
        values = max_length - self._floor + 1
        self.size = math.comb(values + len(self._able) - 1, len(self._able))

    def config(self, candidate: Candidate) -> LengthConfig:
        """The configuration that a candidate stands for."""
        counts = LengthConfig(tuple(candidate), "counts", self.max_length)
        return counts if self.unit == "counts" else counts.in_fractions()

    def _whole(self, lengths: Sequence[int]) -> Candidate:
        """Lengths of all layers from those of the layers that can drop."""
        whole, before = [], self.max_length
        given = dict(zip(self._able, lengths, strict=True))
        for index in range(self._layers):
            before = given.get(index, before)
            whole.append(before)
        return tuple(int(value) for value in whole)

    def _dropping(self, candidate: Candidate) -> list[int]:
        return [candidate[index] for index in self._able]

    def _from_ratios(self, ratios: Sequence[float]) -> Candidate:
        products = np.cumprod(ratios) * self.max_length
        lengths = np.clip(np.rint(products), self._floor, self.max_length).astype(int)
        return self._whole(lengths.tolist())

    def genes(self, candidate: Candidate) -> dict[str, float]:
        """See [`Space`]."""
        lengths = self._dropping(candidate)
        before = [self.max_length, *lengths[:-1]]
        return {name: length / last for name, length, last in zip(self.distributions, lengths, before)}

    def decode(self, genes: Mapping[str, float]) -> Candidate:
        """See [`Space`]."""
        return self._from_ratios([genes[name] for name in self.distributions])

    def all(self) -> Iterator[Candidate]:
        """See [`Space`]."""
        lengths = range(self.max_length, self._floor - 1, -1)
        yield from map(self._whole, itertools.combinations_with_replacement(lengths, len(self._able)))

    def start(self, count: int) -> list[Candidate]:
        """Candidates of equal steps in cost, from full lengths to a quarter of their cost.

        They end at the smallest that training knows where that is cheaper. Each keeps the same share at every layer,
        found by bisection.
        """
        full, trained = self._cost(self.full), self._cost(self._constant(1 - self._length_drop))
        lowest = max(min(full * START_SHARE, trained), self._cost(self._constant(0.0)))
        targets = np.linspace(full, lowest, count)[1:]
        return list(dict.fromkeys([self.full, *(self._of_cost(target) for target in targets)]))

    def _constant(self, ratio: float) -> Candidate:
        return self._from_ratios([ratio] * len(self._able))

    def _of_cost(self, target: float) -> Candidate:
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._cost(self._constant(middle)) < target else (low, middle)
        return min((self._constant(low), self._constant(high)), key=lambda found: abs(self._cost(found) - target))

    def mutate(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """Draws lengths anew between those of their neighbours, which keeps the others where they are."""
        lengths = self._dropping(candidate)
        for place in range(len(lengths)):
            if rng.random() < MUTATION:
                highest = lengths[place - 1] if place else self.max_length
                lowest = lengths[place + 1] if place + 1 < len(lengths) else self._floor
                lengths[place] = int(rng.integers(lowest, highest, endpoint=True))
        return self._whole(lengths)

    def cross(self, first: Candidate, second: Candidate) -> Candidate:
        """The mean of the genes."""
        one, other = self.genes(first), self.genes(second)
        return self._from_ratios([(one[name] + other[name]) / 2 for name in self.distributions])

    def random(self, rng: np.random.Generator) -> Candidate:
        """See [`Space`]."""
        lengths = rng.integers(self._floor, self.max_length, size=len(self._able), endpoint=True)
        return self._whole(sorted(lengths.tolist(), reverse=True))
