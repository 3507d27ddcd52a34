"""Which blocks a training step replaces: multi-grained module replacing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...modular_config import ModularConfig
from .assembly import Assembly, Piece


ONE_GRANULARITY = 0.5
"""Share of the walks that use one granularity only. Assemblies of one granularity would be rare among the others."""

WHOLE_STACK = 0.25
"""Share of the uniform rates that are 0, where there are several stacks: speed-first leaves the encoder whole."""


def replacing_rate(config: ModularConfig, progress: float) -> float:
    """The rate at a share `progress` of the run, in a step that does not draw it."""
    if progress >= config.replacing_fraction:
        return 1.0
    return config.replacing_rate + (1 - config.replacing_rate) * progress / config.replacing_fraction


def open_granularities(config: ModularConfig, granularities: Sequence[int], progress: float) -> list[int]:
    """The granularities that take part at a share `progress` of the run: the finest first, in the end all."""
    ordered = sorted(granularities)
    if progress >= config.curriculum_fraction:
        return ordered
    return ordered[: 1 + int(progress / config.curriculum_fraction * len(ordered))]


def draw_route(
    config: ModularConfig,
    depths: Mapping[str, int],
    granularities: Mapping[str, Sequence[int]],
    progress: float,
    generator: torch.Generator,
    wanted: Sequence[Assembly] = (),
) -> tuple[Assembly, dict[str, float]]:
    """Draws what a step runs.

    Each stack is walked from the bottom up: where modules start, one of them is put there with the probability of the
    replacing rate, and else the original layer. The last steps run one of the assemblies that are wanted instead, where
    any are.

    Args:
        config: The config.
        depths: Layers of each stack.
        granularities: Granularities of the modules in each stack.
        progress: Share of the steps that are done.
        generator: Source of randomness.
        wanted: The assemblies of the config's ratios.

    Returns:
        The assembly, which has at least one module, and the rate of each stack.
    """

    def uniform() -> float:
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    def pick(choices: Sequence):
        return choices[min(int(uniform() * len(choices)), len(choices) - 1)]

    if wanted and progress >= 1 - config.ratios_fraction:
        return pick(wanted), dict.fromkeys(depths, 1.0)
    draws_rate = uniform() < config.uniform_fraction
    allowed = {name: open_granularities(config, granularities[name], progress) for name in granularities}
    stacks: dict[str, tuple[Piece, ...]] = {}
    rates: dict[str, float] = {}
    for name, depth in depths.items():
        usable = allowed.get(name, [])
        rate = replacing_rate(config, progress)
        if draws_rate:
            rate = 0.0 if len(allowed) > 1 and uniform() < WHOLE_STACK else uniform()
        if usable and uniform() < ONE_GRANULARITY:
            usable = [pick(usable)]
        pieces, place = [], 0
        while place < depth:
            starting = [granularity for granularity in usable if place % granularity == 0]
            size = pick(starting) if starting and uniform() < rate else 1
            pieces.append(Piece(size, place // size))
            place += size
        stacks[name], rates[name] = tuple(pieces), rate if usable else 0.0
    if not any(piece.is_module for pieces in stacks.values() for piece in pieces):
        name = pick(list(allowed))
        size = pick(allowed[name])
        chosen = Piece(size, pick(range(depths[name] // size)))
        layers = [Piece(1, index) for index in range(depths[name])]
        stacks[name] = (*layers[: chosen.start], chosen, *layers[chosen.stop :])
    return Assembly(stacks), rates
