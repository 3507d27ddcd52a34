"""The assemblies of a modular checkpoint as something to search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..methods.modular import STRATEGIES, Assembly, ModularModel, Piece, tilings
from .evolution import MUTATION, Candidate
from .store import optuna


class AssemblySpace:
    """Tilings of the stacks. A candidate says for every original layer the granularity of what stands for it.

    Args:
        modular: The model with its modules.
    """

    kind = "assembly"

    def __init__(self, modular: ModularModel):
        self._modular = modular
        self._depths = dict(modular.depths)
        self._sizes = {name: (1, *modular.granularities.get(name, ())) for name in self._depths}
        self._tilings = {name: tilings(depth, self._sizes[name][1:]) for name, depth in self._depths.items()}
        # A deeper decoder than encoder is no model for some families.
        self._may_be_deeper = modular.generates_with_deeper_decoder
        self.distributions = {
            f"{name}_{index}": optuna.distributions.CategoricalDistribution(self._sizes[name])
            for name, depth in self._depths.items()
            for index in range(depth)
        }
        self.size = self._count()
        self.full = (1,) * sum(self._depths.values())

    def assembly(self, candidate: Candidate) -> Assembly:
        """The assembly that a candidate stands for."""
        return Assembly({name: _pieces(sizes) for name, sizes in self._split(candidate).items()})

    def start(self, count: int) -> list[Candidate]:
        """See [`Space`]: the full model, then assemblies by rule, evenly spread over what can be reached."""
        total = sum(self._depths.values())
        strategies = STRATEGIES if len(self._depths) > 1 else STRATEGIES[:1]
        found = [
            self._valid(self._candidate(self._modular.choose(strategy, total / layers).stacks))
            for layers in range(self._modular.smallest().layers, total)
            for strategy in strategies
        ]
        others = [candidate for candidate in dict.fromkeys(found) if candidate != self.full]
        chosen = np.linspace(0, len(others) - 1, min(max(count - 1, 1), len(others))).round().astype(int)
        return [self.full, *(others[index] for index in chosen)][:count]

    def all(self) -> Iterator[Candidate]:
        """See [`Space`]."""
        every = [list(_every_tiling(depth, self._sizes[name])) for name, depth in self._depths.items()]
        for parts in itertools.product(*every):
            candidate = tuple(itertools.chain.from_iterable(parts))
            if self._valid(candidate) == candidate:
                yield candidate

    def genes(self, candidate: Candidate) -> dict[str, Any]:
        """See [`Space`]."""
        return dict(zip(self.distributions, candidate, strict=True))

    def decode(self, genes: Mapping[str, Any]) -> Candidate:
        """See [`Space`]: walks each stack from the bottom up, and takes what a gene says where it may start."""
        stacks = {}
        for name, depth in self._depths.items():
            sizes = [genes[f"{name}_{index}"] for index in range(depth)]
            stacks[name] = self._walk(name, lambda place, starting, sizes=sizes: sizes[place])
        return self._valid(self._candidate(stacks))

    def mutate(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """See [`Space`]."""
        parts = self._split(candidate)

        def choose(part: Sequence[int]):
            def at(place: int, starting: Sequence[int]) -> int:
                return int(rng.choice(starting)) if rng.random() < MUTATION else part[place]

            return at

        return self._valid(self._candidate({name: self._walk(name, choose(part)) for name, part in parts.items()}))

    def cross(self, first: Candidate, second: Candidate) -> Candidate:
        """See [`Space`]: the encoder of one with the decoder of the other, or the lower and the upper half."""
        one, other = self._split(first), self._split(second)
        names = list(self._depths)
        if len(names) > 1:
            return self._valid((*one[names[0]], *itertools.chain.from_iterable(other[name] for name in names[1:])))
        name = names[0]
        half = self._depths[name] // 2
        mixed = [*one[name][:half], *other[name][half:]]
        return self._candidate({name: self._walk(name, lambda place, starting: mixed[place])})

    def random(self, rng: np.random.Generator) -> Candidate:
        """See [`Space`]."""
        stacks = {name: self._walk(name, lambda place, starting: int(rng.choice(starting))) for name in self._depths}
        return self._valid(self._candidate(stacks))

    def _walk(self, name: str, choose) -> tuple[Piece, ...]:
        """A tiling; where `choose` says what cannot start at a place, the original layer stands."""
        pieces, place = [], 0
        while place < self._depths[name]:
            starting = [size for size in self._sizes[name] if place % size == 0]
            size = choose(place, starting)
            size = size if size in starting else 1
            pieces.append(Piece(size, place // size))
            place += size
        return tuple(pieces)

    def _split(self, candidate: Candidate) -> dict[str, tuple[int, ...]]:
        values = iter(candidate)
        return {name: tuple(itertools.islice(values, depth)) for name, depth in self._depths.items()}

    def _candidate(self, stacks: Mapping[str, Sequence[Piece]]) -> Candidate:
        return tuple(
            piece.granularity for name in self._depths for piece in stacks[name] for _ in range(piece.granularity)
        )

    def _valid(self, candidate: Candidate) -> Candidate:
        """The candidate, or one with no more decoder than encoder layers where that is what it takes."""
        if self._may_be_deeper:
            return candidate
        stacks = dict(self.assembly(candidate).stacks)
        encoder = len(stacks["encoder"])
        if len(stacks["decoder"]) > encoder:
            counts = [count for count in self._tilings["decoder"] if count <= encoder]
            if counts:
                stacks["decoder"] = self._tilings["decoder"][max(counts)]
            else:
                whole = self._tilings["encoder"]
                stacks["encoder"] = whole[min(count for count in whole if count >= len(stacks["decoder"]))]
        return self._candidate(stacks)

    def _count(self) -> int:
        """How many valid candidates there are."""
        ways = {name: _ways(depth, self._sizes[name]) for name, depth in self._depths.items()}
        return sum(
            int(np.prod([ways[name][count] for name, count in zip(ways, counts, strict=True)], dtype=object))
            for counts in itertools.product(*ways.values())
            if self._may_be_deeper or dict(zip(ways, counts))["decoder"] <= dict(zip(ways, counts))["encoder"]
        )


def _pieces(sizes: Sequence[int]) -> tuple[Piece, ...]:
    """The pieces of a stack, from the granularity of what stands for each of its layers."""
    pieces, place = [], 0
    while place < len(sizes):
        pieces.append(Piece(sizes[place], place // sizes[place]))
        place += sizes[place]
    return tuple(pieces)


def _ways(depth: int, sizes: Sequence[int]) -> dict[int, int]:
    """By number of pieces how many tilings of a stack there are."""
    found: list[dict[int, int]] = [{0: 1}, *({} for _ in range(depth))]
    for place in range(depth):
        for count, ways in found[place].items():
            for size in sizes:
                if place % size == 0:
                    after = found[place + size]
                    after[count + 1] = after.get(count + 1, 0) + ways
    return found[depth]


def _every_tiling(depth: int, sizes: Sequence[int], place: int = 0) -> Iterator[tuple[int, ...]]:
    if place == depth:
        yield ()
        return
    for size in sizes:
        if place % size == 0:
            for rest in _every_tiling(depth, sizes, place + size):
                yield ((size,) * size + rest)
