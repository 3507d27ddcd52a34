"""The final sizes: an exact search over the aligned ones, so that the request is met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .cost import Cost
from .layout import FFN, MaskLayout


TOLERANCE = 0.01
"""How far what is left may be from what was requested, relative to the latter."""

ERROR_WEIGHT = 4.0
"""How much worse it is to miss the request than to depart from the masks, by the same amount of cost."""


@dataclass
class Scores:
    """How much the masks want to keep things; above 0 they do, and infinite means that nothing may go.

    Attributes:
        hidden: Of the dims of the residual stream, `[hidden size]`.
        units: Of the units of every sub-layer: the lower one of the unit's score and that of the whole sub-layer.
    """

    hidden: np.ndarray
    units: list[np.ndarray]

    @classmethod
    def of(cls, layout: MaskLayout, scores: torch.Tensor) -> Scores:
        """Splits a vector of scores, `[size]`, such as [`VIBMasks.scores`]."""
        values = scores.detach().double().cpu().numpy()
        units = [np.minimum(values[part.start : part.stop], values[part.gate]) for part in layout.sublayers]
        return cls(values[: layout.hidden], units)


@dataclass
class Selection:
    """What stays.

    Attributes:
        hidden: Indices of dims of the residual stream.
        units: For every sub-layer the indices of its units; none where it goes.
        cost: What that costs.
    """

    hidden: np.ndarray
    units: list[np.ndarray]
    cost: int

    def values(self, layout: MaskLayout) -> torch.Tensor:
        """Zeros and ones, `[size]`."""
        values = torch.zeros(layout.size)
        values[torch.as_tensor(self.hidden.copy())] = 1.0
        for part, kept in zip(layout.sublayers, self.units, strict=True):
            values[part.start + torch.as_tensor(kept.copy())] = 1.0
            values[part.gate] = float(len(kept) > 0)
        return values


def allowed_sizes(size: int, step: int, smallest: int) -> list[int]:
    """Multiples of `step` from `smallest` on, and `size` itself, ascending."""
    return [n for n in range(step, size, step) if n >= smallest] + [size]


def unit_step(width: int, align: int) -> int:
    """How many units it takes for their features to be a multiple of `align`."""
    return align // math.gcd(align, width)


@dataclass
class _Blocks:
    """Units of several sub-layers in blocks of aligned sizes, those to keep first.

    Attributes:
        owner: The sub-layer of each block.
        units: The indices of its units.
        score: The mean score of its units.
        forced: How many blocks, from the first on, have to stay.
    """

    owner: list[int]
    units: list[np.ndarray]
    score: np.ndarray
    forced: int

    @property
    def wanted(self) -> int:
        """How many blocks the masks keep."""
        return max(int((self.score > 0).sum()), self.forced)

    @cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Units of its sub-layer before and with each block, as long as they are kept in order."""
        seen: dict[int, int] = {}
        after = []
        for owner, units in zip(self.owner, self.units):
            seen[owner] = seen.get(owner, 0) + len(units)
            after.append(seen[owner])
        return np.array(after) - [len(units) for units in self.units], np.array(after)

    def chosen(self, count: int, sublayers: int) -> list[np.ndarray]:
        """The units of every sub-layer that the first blocks hold, ascending."""
        found: list[list[np.ndarray]] = [[] for _ in range(sublayers)]
        for owner, units in zip(self.owner[:count], self.units[:count]):
            found[owner].append(units)
        return [np.sort(np.concatenate(parts)) if parts else np.array([], dtype=np.int64) for parts in found]


def _blocks(layout: MaskLayout, scores: Scores, align: int, ffn: bool) -> _Blocks:
    entries = []
    best: dict[tuple[str, str], int] = {}
    for index, part in enumerate(layout.sublayers):
        if (part.kind == FFN) != ffn:
            continue
        values = scores.units[index]
        order = np.argsort(-values, kind="stable")
        # Where only the whole of it has a mask it goes or stays as a whole.
        step = unit_step(part.width, align) if ("ffn" if ffn else "heads") in layout.kinds else part.units
        for begin in range(0, part.units, step):
            units = order[begin : begin + step]
            entries.append((index, units, float(values[units].mean())))
        key = (part.stack, part.kind)
        if not ffn and (key not in best or scores.units[best[key]].max() < values.max()):
            best[key] = index
    # A stack without self-attention could not generate, and one without cross-attention would not see its source.
    first = {index: next(i for i, entry in enumerate(entries) if entry[0] == index) for index in best.values()}
    forced = set(first.values()) | {i for i, entry in enumerate(entries) if math.isinf(entry[2])}
    order = sorted(range(len(entries)), key=lambda i: (i not in forced, -entries[i][2]))
    return _Blocks(
        [entries[i][0] for i in order],
        [entries[i][1] for i in order],
        np.array([entries[i][2] for i in order]),
        len(forced),
    )


def _cumulative(cost: Cost, blocks: _Blocks, hidden: int) -> np.ndarray:
    """What the first 0, 1, 2, ... blocks cost."""
    if not blocks.owner:
        return np.zeros(1, dtype=np.int64)
    before, after = blocks.counts
    owner = np.array(blocks.owner)
    steps = cost.sublayers(owner, after, hidden) - cost.sublayers(owner, before, hidden)
    return np.concatenate([[0], np.cumsum(steps)])


def _position_bias(cost: Cost, blocks: _Blocks) -> np.ndarray:
    """What the position biases cost that the heads in the first 0, 1, 2, ... blocks use."""
    used: dict[str, set[int]] = {stack: set() for stack in cost.buckets}
    totals = [0]
    for owner, units in zip(blocks.owner, blocks.units):
        part = cost.layout.sublayers[owner]
        if part.head_ids is not None and part.stack in used:
            used[part.stack].update(part.head_ids[unit] for unit in units)
        totals.append(sum(cost.buckets[stack] * len(columns) for stack, columns in used.items()))
    return np.array(totals, dtype=np.int64)


def choose_sizes(cost: Cost, scores: Scores, wanted: int, align: int) -> Selection:
    """Finds the sizes that meet a request and depart least from what the masks say.

    All combinations of a width of the residual stream and a number of heads are tried; the dims of the FFNs, of which
    there are most, take the remainder. Heads and FFN dims go in the order of their scores over all layers.

    Args:
        cost: What is counted.
        scores: What the masks say.
        wanted: The cost that is to be left.
        align: Sizes are multiples of this, or what they were.

    Returns:
        The best selection, which is not always within [`TOLERANCE`]: sizes are coarse in small models.
    """
    layout = cost.layout
    heads, dims = _blocks(layout, scores, align, ffn=False), _blocks(layout, scores, align, ffn=True)
    bias = _position_bias(cost, heads)
    head_counts = np.arange(heads.forced, len(heads.owner) + 1)
    fixed = int(np.isinf(scores.hidden).sum())
    kept = max(int((scores.hidden > 0).sum()), 1)
    # Departures are in units of cost: that of the width at the sizes that the masks want elsewhere.
    at_kept = _total(cost, heads, dims, kept)
    best = None
    for hidden in allowed_sizes(layout.hidden, align, max(fixed, 1)):
        head_costs = _cumulative(cost, heads, hidden) + bias
        dim_costs = _cumulative(cost, dims, hidden)
        left = wanted - cost.outside(hidden) - head_costs[head_counts]
        above = np.clip(np.searchsorted(dim_costs, left), dims.forced, len(dims.owner))
        below = np.clip(above - 1, dims.forced, len(dims.owner))
        errors = [np.abs(dim_costs[counts] - left) for counts in (below, above)]
        dim_counts = np.where(errors[0] <= errors[1], below, above)
        error = np.minimum(*errors)
        departure = (
            abs(_total(cost, heads, dims, hidden) - at_kept)
            + np.abs(head_costs[head_counts] - head_costs[heads.wanted])
            + np.abs(dim_costs[dim_counts] - dim_costs[dims.wanted])
        )
        within = error <= TOLERANCE * wanted
        # Among those within tolerance the least departure counts, and where there is none the least error.
        rank = np.where(within, departure + ERROR_WEIGHT * error, np.inf)
        index = int(rank.argmin()) if within.any() else int(error.argmin())
        key = (not within.any(), float(rank[index] if within.any() else error[index]))
        if best is None or key < best[0]:
            best = (key, hidden, int(head_counts[index]), int(dim_counts[index]))
    _, hidden, head_count, dim_count = best
    kept_heads = heads.chosen(head_count, len(layout.sublayers))
    kept_dims = dims.chosen(dim_count, len(layout.sublayers))
    units = [a if len(a) else b for a, b in zip(kept_heads, kept_dims)]
    return Selection(leading(scores.hidden, hidden), units, cost.exact(hidden, units))


def _total(cost: Cost, heads: _Blocks, dims: _Blocks, hidden: int) -> int:
    """What a width costs with the sizes that the masks want elsewhere."""
    inside = _cumulative(cost, heads, hidden)[heads.wanted] + _cumulative(cost, dims, hidden)[dims.wanted]
    return cost.outside(hidden) + int(inside)


def leading(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the highest scores, ascending."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def threshold_sizes(cost: Cost, scores: Scores, align: int) -> Selection:
    """What the masks keep now, in aligned sizes: the request is what they cost.

    Args:
        cost: What is counted.
        scores: What the masks say.
        align: Sizes are multiples of this, or what they were.
    """
    units = [np.flatnonzero(values > 0) for values in scores.units]
    return choose_sizes(cost, scores, cost.exact(max(int((scores.hidden > 0).sum()), 1), units), align)
