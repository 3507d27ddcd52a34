"""Assemblies by rule: size-first and speed-first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from ...errors import FlexCompressError, nearest
from .assembly import Assembly, Piece


SIZE_FIRST, SPEED_FIRST = "size-first", "speed-first"
STRATEGIES = (SIZE_FIRST, SPEED_FIRST)


def tilings(depth: int, granularities: Sequence[int]) -> dict[int, tuple[Piece, ...]]:
    """For each number of layers that a stack can come down to, the tiling that changes it least.

    That is the one whose modules stand for the fewest layers each, by the sum of `(granularity - 1)^2`. Among equals
    modules stand at the top: a layer below the first module sees exactly what it was trained on.

    Args:
        depth: Layers of the stack.
        granularities: Granularities of its modules; each divides the depth.
    """
    # By position and number of pieces: the cost and the granularities of the pieces up to there.
    best: list[dict[int, tuple[int, tuple[int, ...]]]] = [{} for _ in range(depth + 1)]
    best[0][0] = (0, ())
    for start in range(depth):
        for count, (cost, sizes) in best[start].items():
            for size in (1, *granularities):
                if start % size:
                    continue
                candidate = (cost + (size - 1) ** 2, (*sizes, size))
                known = best[start + size].get(count + 1)
                if known is None or candidate < known:
                    best[start + size][count + 1] = candidate
    return {count: _pieces(sizes) for count, (_, sizes) in sorted(best[depth].items())}


def _pieces(sizes: Sequence[int]) -> tuple[Piece, ...]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(Piece(size, start // size))
        start += size
    return tuple(pieces)


def choose(
    strategy: str, ratio: float, depths: Mapping[str, int], granularities: Mapping[str, Sequence[int]]
) -> Assembly:
    """The assembly whose number of layers is nearest to that of the original divided by `ratio`.

    Args:
        strategy: `size-first` takes the same share of the layers of each stack, as near as it gets; `speed-first`
            takes from the decoder, which runs for each token that is generated, until it has no more to give, and
            from the encoder after that.
        ratio: Layers of the original model over those of the assembly, all stacks together.
        depths: Layers of each stack.
        granularities: Granularities of the modules in each stack.

    Raises:
        FlexCompressError: An unknown strategy, a ratio out of reach, or speed-first on a model with one stack.
    """
    if strategy not in STRATEGIES:
        raise FlexCompressError(f'There is no strategy "{strategy}".{nearest(strategy, STRATEGIES)}')
    if strategy == SPEED_FIRST and len(depths) < 2:
        raise FlexCompressError(
            f"speed-first takes from the decoder before the encoder, and this model has the {next(iter(depths))} "
            "alone: use size-first."
        )
    tiled = {name: tilings(depth, granularities.get(name, ())) for name, depth in depths.items()}
    total = sum(depths.values())
    fewest = sum(min(counts) for counts in tiled.values())
    if not 1 <= ratio <= total / fewest + 1e-6:
        nearest_ratio = 1.0 if ratio < 1 else total / fewest
        raise FlexCompressError(
            f"A ratio of {ratio:g} is out of reach: these {total} layers can become {fewest} at least, so ratios go "
            f"from 1 to {total / fewest:.4g}; the nearest is {nearest_ratio:.4g}."
        )

    def distance(counts: tuple[int, ...]) -> tuple:
        shares = [count / depth for count, depth in zip(counts, depths.values(), strict=True)]
        by_stack = dict(zip(depths, counts, strict=True))
        balance = (max(shares) - min(shares),) if strategy == SIZE_FIRST else ()
        # Of two equally near the smaller model, and of two balanced alike the smaller decoder.
        return (round(abs(sum(counts) - total / ratio), 9), sum(counts), *balance, by_stack.get("decoder", 0))

    counts = min(product(*tiled.values()), key=distance)
    return Assembly({name: tiled[name][count] for name, count in zip(depths, counts, strict=True)})


def smallest(depths: Mapping[str, int], granularities: Mapping[str, Sequence[int]]) -> Assembly:
    """The assembly of the fewest layers."""
    tiled = {name: tilings(depth, granularities.get(name, ())) for name, depth in depths.items()}
    return Assembly({name: counts[min(counts)] for name, counts in tiled.items()})
