"""Assemblies by rule: size-first and speed-first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from ...errors import FlexCompressError, nearest
from ...modular_config import SIZE_FIRST, SPEED_FIRST, STRATEGIES
from .assembly import Assembly, Piece


def tilings(depth: int, granularities: Sequence[int]) -> dict[int, tuple[Piece, ...]]:
    """For each number of layers that a stack can come down to, the tiling that changes it least.

    That is the one whose modules stand for the fewest layers each, by the sum of `(granularity - 1)^2`. Among equals
    modules stand at the bottom: the original layers above them make up for some of what they miss.

    Args:
        depth: Layers of the stack.
        granularities: Granularities of its modules; each divides the depth.
    """
    # By position and number of pieces: the cost and the granularities of the pieces up to there, negated, so that of two
    # equally dear the one whose modules stand lower is the smaller.
    best: list[dict[int, tuple[int, tuple[int, ...]]]] = [{} for _ in range(depth + 1)]
    best[0][0] = (0, ())
    for start in range(depth):
        for count, (cost, sizes) in best[start].items():
            for size in (1, *granularities):
                if start % size:
                    continue
                candidate = (cost + (size - 1) ** 2, (*sizes, -size))
                known = best[start + size].get(count + 1)
                if known is None or candidate < known:
                    best[start + size][count + 1] = candidate
    return {count: _pieces([-size for size in sizes]) for count, (_, sizes) in sorted(best[depth].items())}


def _pieces(sizes: Sequence[int]) -> tuple[Piece, ...]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(Piece(size, start // size))
        start += size
    return tuple(pieces)


def reachable_counts(
    depths: Mapping[str, int], granularities: Mapping[str, Sequence[int]], deeper_decoder: bool = True
) -> list[tuple[int, ...]]:
    """The numbers of layers, one for each stack, that a model can come down to.

    Args:
        depths: Layers of each stack.
        granularities: Granularities of the modules in each stack.
        deeper_decoder: Whether the decoder may be deeper than the encoder.

    Returns:
        Among them those of the full model.
    """
    found = product(*(tilings(depth, granularities.get(name, ())) for name, depth in depths.items()))
    if deeper_decoder or len(depths) < 2:
        return list(found)
    names, full = list(depths), tuple(depths.values())
    encoder, decoder = names.index("encoder"), names.index("decoder")
    return [counts for counts in found if counts[decoder] <= counts[encoder] or counts == full]


def choose(
    strategy: str,
    ratio: float,
    depths: Mapping[str, int],
    granularities: Mapping[str, Sequence[int]],
    *,
    deeper_decoder: bool = True,
) -> Assembly:
    """The assembly whose number of layers is nearest to that of the original divided by `ratio`.

    Args:
        strategy: `size-first` takes the same share of the layers of each stack, as near as it gets; `speed-first`
            takes from the decoder, which runs for each token that is generated, until it has no more to give, and
            from the encoder after that.
        ratio: Layers of the original model over those of the assembly, all stacks together.
        depths: Layers of each stack.
        granularities: Granularities of the modules in each stack.
        deeper_decoder: Whether the decoder may be deeper than the encoder; see [`reachable_counts`].

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
    reachable = reachable_counts(depths, granularities, deeper_decoder)
    total = sum(depths.values())
    fewest = min(map(sum, reachable))
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
        # Of two equally near the one with the nearer ratio, and of two balanced alike the smaller decoder.
        layers = sum(counts)
        distances = (round(abs(layers - total / ratio), 9), round(abs(total / layers - ratio), 9))
        return (*distances, *balance, by_stack.get("decoder", 0))

    return _assembly(min(reachable, key=distance), depths, granularities)


def smallest(
    depths: Mapping[str, int], granularities: Mapping[str, Sequence[int]], *, deeper_decoder: bool = True
) -> Assembly:
    """The assembly of the fewest layers; the arguments are those of [`choose`]."""
    return _assembly(min(reachable_counts(depths, granularities, deeper_decoder), key=sum), depths, granularities)


def _assembly(
    counts: Sequence[int], depths: Mapping[str, int], granularities: Mapping[str, Sequence[int]]
) -> Assembly:
    return Assembly(
        {
            name: tilings(depth, granularities.get(name, ()))[count]
            for (name, depth), count in zip(depths.items(), counts, strict=True)
        }
    )
