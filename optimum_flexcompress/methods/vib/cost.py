"""What a model costs as a function of its sizes: parameters or multiply-accumulates, exactly as surgery leaves them.

These two are bilinear. With `D` the width of the residual stream, `n_i` the units of sub-layer i (heads or FFN dims) and
`on_i` whether it is there at all,

    cost = sum_i n_i (a_i D + b_i) + on_i (c_i D + d_i)  +  p D^2 + q D + r  +  sum_s buckets_s * heads_s

where `heads_s` are the heads that any self-attention of stack s still uses, for which its position bias has columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ...architectures import ModelView
from ...errors import UnsupportedArchitectureError
from ...structure import count_parameters
from .layout import FFN, MaskLayout
from .masks import Counts
from .probe import module_rows


COEFFICIENTS = ("unit_hidden", "unit", "on_hidden", "on")


@dataclass
class Cost:
    """What a model costs as a function of its sizes; whole numbers, so that no two ways of adding them up differ.

    Attributes:
        layout: The layout that numbers the sub-layers.
        buckets: Rows of the position bias, by stack.
        dense: The cost of the whole model.
    """

    layout: MaskLayout
    buckets: dict[str, int] = field(default_factory=dict)
    dense: int = 0

    def outside(self, hidden: int) -> int:
        """What is spent outside the sub-layers, at a width of the residual stream."""
        raise NotImplementedError

    def sublayers(self, index: np.ndarray | int, units: np.ndarray | int, hidden: int) -> np.ndarray:
        """What sub-layers cost with so many units each (0 where they are gone), element by element, 64-bit."""
        raise NotImplementedError

    def differentiable(self) -> torch.nn.Module:
        """The same of counts with gradients: a module from [`Counts`] to a 64-bit scalar."""
        raise NotImplementedError

    def exact(self, hidden: int, units: Sequence[Sequence[int] | torch.Tensor]) -> int:
        """The cost of given sizes.

        Args:
            hidden: Dims of the residual stream.
            units: For every sub-layer the indices of its units that stay; none where it goes.
        """
        counts = np.array([len(kept) for kept in units])
        inside = int(self.sublayers(np.arange(len(counts)), counts, hidden).sum())
        return self.outside(hidden) + inside + self._position_bias(units)

    def _position_bias(self, units: Sequence[Sequence[int] | torch.Tensor]) -> int:
        total = 0
        for stack, buckets in self.buckets.items():
            used = set()
            for part, kept in zip(self.layout.sublayers, units, strict=True):
                if part.stack == stack and part.head_ids is not None:
                    used.update(part.head_ids[int(index)] for index in kept)
            total += buckets * len(used)
        return total

    def finish(self):
        """Sets `dense`."""
        self.dense = self.exact(self.layout.hidden, [range(part.units) for part in self.layout.sublayers])
        return self


@dataclass
class BilinearCost(Cost):
    """The coefficients; see the head of this file.

    Attributes:
        unit_hidden: `a`, by sub-layer; and so on for `unit`, `on_hidden` and `on`: `b`, `c`, `d`.
        hidden_squared: `p`; and so on for `hidden` and `constant`: `q`, `r`.
    """

    unit_hidden: list[int] = field(default_factory=list)
    unit: list[int] = field(default_factory=list)
    on_hidden: list[int] = field(default_factory=list)
    on: list[int] = field(default_factory=list)
    hidden_squared: int = 0
    hidden: int = 0
    constant: int = 0

    def __post_init__(self):
        for name in COEFFICIENTS:
            setattr(self, name, [0] * len(self.layout.sublayers))

    def outside(self, hidden: int) -> int:
        return self.hidden_squared * hidden**2 + self.hidden * hidden + self.constant

    def sublayers(self, index: np.ndarray | int, units: np.ndarray | int, hidden: int) -> np.ndarray:
        a, b, c, d = (np.array(getattr(self, name), dtype=np.int64)[index] for name in COEFFICIENTS)
        return units * (a * hidden + b) + np.greater(units, 0) * (c * hidden + d)

    def differentiable(self) -> DifferentiableCost:
        return DifferentiableCost(self)


class DifferentiableCost(torch.nn.Module):
    """A [`BilinearCost`] of counts with gradients."""

    def __init__(self, cost: BilinearCost):
        super().__init__()
        table = torch.tensor([getattr(cost, name) for name in COEFFICIENTS], dtype=torch.float64)
        self.register_buffer("_table", table, persistent=False)
        self._cost = cost
        for stack in cost.buckets:
            self.register_buffer(f"_{stack}_columns", _unit_columns(cost.layout, stack), persistent=False)

    def forward(self, counts: Counts) -> torch.Tensor:
        """The cost, a 64-bit scalar."""
        a, b, c, d = self._table
        hidden, cost = counts.hidden, self._cost
        total = (counts.units * (a * hidden + b)).sum() + (counts.on * (c * hidden + d)).sum()
        total = total + cost.hidden_squared * hidden.square() + cost.hidden * hidden + cost.constant
        for stack, buckets in cost.buckets.items():
            total = total + buckets * self._used_columns(counts, getattr(self, f"_{stack}_columns"))
        return total

    @staticmethod
    def _used_columns(counts: Counts, columns: torch.Tensor) -> torch.Tensor:
        owned = columns >= 0
        used = torch.zeros(int(columns.shape[0]) + 1, dtype=torch.float64, device=columns.device)
        index = torch.where(owned, columns, columns.shape[0])
        # A column is used if any head uses it; heads elsewhere go to a last entry that is cut off.
        return used.scatter_reduce(0, index, counts.kept_units.double(), "amax")[:-1].sum()


def _unit_columns(layout: MaskLayout, stack: str) -> torch.Tensor:
    """For every unit its column in the position bias of a stack, or -1."""
    columns = torch.full((layout.units.stop - layout.units.start,), -1)
    for part in layout.sublayers:
        if part.stack == stack and part.head_ids is not None:
            begin = part.start - layout.hidden
            columns[begin : begin + part.units] = torch.tensor(part.head_ids)
    return columns


# -- Parameters ---------------------------------------------------------------------------------------------------


def parameter_cost(view: ModelView, layout: MaskLayout, include_embeddings: bool = False) -> BilinearCost:
    """Counts the parameters of the layers, as [`structure.count_parameters`] does under `prunable`.

    Args:
        view: The model.
        layout: Its masks.
        include_embeddings: Whether to count those of the embeddings too.

    Raises:
        UnsupportedArchitectureError: The layers have parameters of which the table of the family says nothing.
    """
    cost = BilinearCost(layout)
    width = view.hidden_size
    for index, part in enumerate(layout.sublayers):
        stack = view.stacks[part.stack]
        sublayer = getattr(stack.layers[part.layer], part.kind)
        if part.kind == FFN:
            inputs, output = [(up, 1) for up in sublayer.up], sublayer.down
        else:
            size = sublayer.head_size
            inputs = [(sublayer.q.module, part.width), (sublayer.k.module, size), (sublayer.v.module, size)]
            output = sublayer.o
            cost.on[index] = _other_parameters(sublayer, [*(module for module, _ in inputs), output])
        cost.unit_hidden[index] = sum(features for _, features in inputs) + part.width
        cost.unit[index] = sum(features for module, features in inputs if module.bias is not None)
        cost.on_hidden[index] = int(output.bias is not None)
        if stack.table.norm_first:
            cost.on_hidden[index] += _numel(sublayer.norm) // width
    for stack in view.stacks.values():
        if not stack.table.norm_first:
            tables = (stack.table.attention, stack.table.cross_attention, stack.table.ffn)
            norms = [
                layer.get_submodule(table.norm) for layer in stack.module_list for table in tables if table is not None
            ]
            cost.hidden += sum(_numel(norm) for norm in norms) // width
        name = stack.table.attention.position_bias
        for layer in stack.layers:
            bias = getattr(layer.attention.module, name, None) if name and layer.attention else None
            if bias is not None:
                cost.buckets[stack.name] = bias.weight.shape[0]
    counted = count_parameters(view.model)
    cost.finish()
    if cost.dense != counted["prunable"]:
        raise UnsupportedArchitectureError(
            f"The layers of {type(view.model).__name__} have {counted['prunable']:,} parameters, of which the table "
            f"in architectures/{view.family}.py accounts for {cost.dense:,}: complete it."
        )
    if include_embeddings:
        cost.hidden += counted["embeddings"] // width
    return cost.finish()


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _other_parameters(attention, projections: list[torch.nn.Module]) -> int:
    """Parameters of an attention module beside its projections and the position bias that the stack shares."""
    known = {id(parameter) for module in projections for parameter in module.parameters()}
    bias = getattr(attention.module, attention.table.position_bias or "", None)
    if bias is not None:
        known |= {id(parameter) for parameter in bias.parameters()}
    return sum(parameter.numel() for parameter in attention.module.parameters() if id(parameter) not in known)


# -- Multiply-accumulates -----------------------------------------------------------------------------------------


def macs_cost(view: ModelView, layout: MaskLayout, sequence_length: int | None = None) -> BilinearCost:
    """Counts the multiply-accumulates of the matrix products for one sample, heads and poolers included.

    Args:
        view: The model, without masks.
        layout: Its masks.
        sequence_length: Tokens of the sample; see [`probe.module_rows`].

    Raises:
        FlexCompressError: The model cannot take so many tokens.
        UnsupportedArchitectureError: A head that the table of the family does not know.
    """
    cost = BilinearCost(layout)
    rows = module_rows(view, sequence_length)
    for index, part in enumerate(layout.sublayers):
        sublayer = getattr(view.stacks[part.stack].layers[part.layer], part.kind)
        if part.kind == FFN:
            cost.unit_hidden[index] = sum(rows.inside.get(module, 0) for module in [*sublayer.up, sublayer.down])
            continue
        modules = (sublayer.q.module, sublayer.k.module, sublayer.v.module, sublayer.o)
        # A cross-attention has no rows where the decoder stands alone.
        query, key, value, output = (rows.inside.get(module, 0) for module in modules)
        size = sublayer.head_size
        cost.unit_hidden[index] = part.width * (query + output) + size * (key + value)
        cost.unit[index] = 2 * part.width * query * key
    cost.constant, cost.hidden, cost.hidden_squared = rows.outside
    return cost.finish()
