"""Final sizes that are the same in every layer and that a stock configuration can express."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from ...architectures import find_architecture
from ...config_sizes import is_stock
from ...errors import FlexCompressError
from ...structure import AttentionSize, LayerStructure, ModelStructure, StackStructure
from .cost import Cost
from .layout import ATTENTION, FFN
from .sizes import ERROR_WEIGHT, TOLERANCE, Scores, Selection, allowed_sizes, leading, unit_step


NEIGHBOURS = 8
"""Sizes on each side of the wanted one that are tried for an FFN that does not take the remainder."""


@dataclass
class _Group:
    """Stacks whose configuration has one entry for the heads and one for the FFN size of all of them.

    Attributes:
        stacks: Their names.
        heads: The indices of their attentions among the sub-layers.
        dims: The indices of their FFNs.
        head_sizes: Numbers of heads that are allowed.
        dim_sizes: FFN sizes that are allowed.
        wanted_heads: Mean number of heads that the masks keep.
        wanted_dims: Mean FFN size that the masks keep.
    """

    stacks: list[str]
    heads: list[int]
    dims: list[int]
    head_sizes: list[int]
    dim_sizes: list[int]
    wanted_heads: float
    wanted_dims: float


class UniformSizes:
    """Chooses among uniform sizes, as [`sizes.choose_sizes`] does among all.

    Args:
        model: The model; its configuration and class say what can be expressed.
        cost: What is counted.
        align: Sizes are multiples of this, or what they were.

    Raises:
        FlexCompressError: The layers of the model are not all alike.
    """

    def __init__(self, model: PreTrainedModel, cost: Cost, align: int):
        self._model, self.cost, self._align = model, cost, align
        self._structure = ModelStructure.of(model)
        if not self._structure.is_uniform:
            raise FlexCompressError(
                "uniform=True needs a model whose layers are all alike: leave it out, or start from one that was not "
                "pruned before."
            )
        self._stock: dict[tuple, bool] = {}

    def choose(self, scores: Scores, wanted: int) -> Selection:
        """The uniform sizes that meet a request and depart least from what the masks say.

        Args:
            scores: What the masks say.
            wanted: The cost that is to be left.

        Raises:
            FlexCompressError: No smaller size can be expressed.
        """
        groups = self._groups(scores)
        self._dims_costs: dict[tuple[int, int], np.ndarray] = {}
        candidates = sorted(self._candidates(scores, groups, wanted), key=lambda item: item[0])
        for _, hidden, heads, dims in candidates:
            if self._is_stock(groups, hidden, heads, dims):
                return self._selection(scores, groups, hidden, heads, dims)
        raise FlexCompressError(
            f"No uniform size of this {self._structure.family} model is near the request and fits a stock "
            "configuration: use a smaller align, another target, or uniform=False."
        )

    def _groups(self, scores: Scores) -> list[_Group]:
        layout = self.cost.layout
        architecture = find_architecture(self._model.config.model_type)
        sets: list[tuple[set[str], list[str]]] = []
        for name in layout.depths:
            keys = architecture.stacks[name].config
            names = {*keys.heads, *keys.ffn}
            for known, stacks in sets:
                if known & names:
                    stacks.append(name)
                    break
            else:
                sets.append((names, [name]))
        groups = []
        for _, stacks in sets:
            parts = [(i, part) for i, part in enumerate(layout.sublayers) if part.stack in stacks]
            heads = [i for i, part in parts if part.kind != FFN]
            dims = [i for i, part in parts if part.kind == FFN]
            head, dim = layout.sublayers[heads[0]], layout.sublayers[dims[0]]
            fixed = [max(int(np.isinf(scores.units[i]).sum()) for i in some) for some in (heads, dims)]
            groups.append(
                _Group(
                    stacks,
                    heads,
                    dims,
                    allowed_sizes(head.units, unit_step(head.width, self._align), max(fixed[0], 1)),
                    allowed_sizes(dim.units, self._align, max(fixed[1], 1)),
                    float(np.mean([(scores.units[i] > 0).sum() for i in heads])),
                    float(np.mean([(scores.units[i] > 0).sum() for i in dims])),
                )
            )
        return groups

    def _candidates(self, scores: Scores, groups: list[_Group], wanted: int) -> Iterator[tuple]:
        cost = self.cost
        *others, last = groups
        fixed = int(np.isinf(scores.hidden).sum())
        kept = int((scores.hidden > 0).sum())
        for hidden in allowed_sizes(cost.layout.hidden, self._align, max(fixed, 1)):
            base = cost.outside(hidden)
            for heads in itertools.product(*(group.head_sizes for group in groups)):
                spent = base + sum(self._heads_cost(group, n, hidden) for group, n in zip(groups, heads))
                for dims in itertools.product(*(_near(group.dim_sizes, group.wanted_dims) for group in others)):
                    left = wanted - spent - sum(self._dims_cost(g, n, hidden) for g, n in zip(others, dims))
                    for size in self._remainder(last, left, hidden):
                        error = abs(left - self._dims_cost(last, size, hidden))
                        departure = abs(hidden - kept) / cost.layout.hidden + sum(
                            abs(n - group.wanted_heads) / group.head_sizes[-1] for group, n in zip(groups, heads)
                        )
                        departure += sum(
                            abs(n - g.wanted_dims) / g.dim_sizes[-1] for g, n in zip(groups, (*dims, size))
                        )
                        miss = error / wanted
                        within = miss <= TOLERANCE
                        rank = departure + ERROR_WEIGHT * miss if within else miss
                        yield (not within, rank), hidden, heads, (*dims, size)

    def _remainder(self, group: _Group, left: int, hidden: int) -> list[int]:
        """The two allowed FFN sizes around what is left to spend."""
        sizes = group.dim_sizes
        index = int(np.searchsorted(self._all_dims_costs(group, hidden), left))
        return sorted({sizes[min(max(i, 0), len(sizes) - 1)] for i in (index - 1, index)})

    def _heads_cost(self, group: _Group, count: int, hidden: int) -> int:
        total = int(self.cost.sublayers(np.array(group.heads), count, hidden).sum())
        return total + sum(self.cost.buckets.get(stack, 0) * count for stack in group.stacks)

    def _dims_cost(self, group: _Group, count: int, hidden: int) -> int:
        return int(self._all_dims_costs(group, hidden)[group.dim_sizes.index(count)])

    def _all_dims_costs(self, group: _Group, hidden: int) -> np.ndarray:
        """What every allowed FFN size costs, ascending."""
        key = (id(group), hidden)
        if key not in self._dims_costs:
            index, units = np.array(group.dims)[:, None], np.array(group.dim_sizes)[None]
            self._dims_costs[key] = self.cost.sublayers(index, units, hidden).sum(0)
        return self._dims_costs[key]

    def _is_stock(self, groups: list[_Group], hidden: int, heads: tuple[int, ...], dims: tuple[int, ...]) -> bool:
        key = (hidden, heads)
        if key not in self._stock:
            stacks = {}
            for group, head_count, dim_count in zip(groups, heads, dims):
                for name in group.stacks:
                    stacks[name] = _uniform_stack(self._structure.stacks[name], head_count, dim_count)
            structure = replace(self._structure, hidden_size=hidden, stacks=stacks)
            self._stock[key] = is_stock(self._model, structure)
        return self._stock[key]

    def _selection(
        self, scores: Scores, groups: list[_Group], hidden: int, heads: tuple[int, ...], dims: tuple[int, ...]
    ) -> Selection:
        layout = self.cost.layout
        units: list[np.ndarray] = [np.array([])] * len(layout.sublayers)
        for group, head_count, dim_count in zip(groups, heads, dims):
            for index in group.dims:
                units[index] = leading(scores.units[index], dim_count)
            for index in group.heads:
                units[index] = leading(self._shared_scores(scores, index), head_count)
        return Selection(leading(scores.hidden, hidden), units, self.cost.exact(hidden, units))

    def _shared_scores(self, scores: Scores, index: int) -> np.ndarray:
        """Heads that read one position bias have to be the same ones in all layers of a stack."""
        part = self.cost.layout.sublayers[index]
        if part.head_ids is None:
            return scores.units[index]
        parts = enumerate(self.cost.layout.sublayers)
        same = [i for i, other in parts if other.stack == part.stack and other.kind == ATTENTION]
        return np.mean([scores.units[i] for i in same], axis=0)


def _near(sizes: list[int], wanted: float) -> list[int]:
    """The sizes around the wanted one, and some over the whole range: the request may be far from what masks want."""
    index = int(np.searchsorted(sizes, wanted))
    near = sizes[max(index - NEIGHBOURS, 0) : index + NEIGHBOURS]
    return sorted({*near, *sizes[:: max(len(sizes) // (2 * NEIGHBOURS), 1)], sizes[-1]})


def _uniform_stack(stack: StackStructure, heads: int, ffn: int) -> StackStructure:
    def attention(size: AttentionSize | None) -> AttentionSize | None:
        if size is None:
            return None
        ids = None if size.head_ids is None else tuple(range(heads))
        return AttentionSize(heads * size.heads // size.kv_heads, heads, size.head_size, ids)

    layers = tuple(
        LayerStructure(attention(layer.attention), attention(layer.cross_attention), ffn, layer.source)
        for layer in stack.layers
    )
    return StackStructure(layers, None if stack.position_heads is None else heads)
