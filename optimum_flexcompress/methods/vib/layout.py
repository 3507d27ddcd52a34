"""Where the masks of a model are in one flat vector."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ...architectures import AttentionView, ModelView


ATTENTION, CROSS_ATTENTION, FFN = "attention", "cross_attention", "ffn"


@dataclass(frozen=True)
class Sublayer:
    """A sub-layer and its masks.

    Attributes:
        stack: Name of the stack.
        layer: Index of the layer.
        kind: `attention`, `cross_attention` or `ffn`.
        units: Heads (groups that share a key and value head), or inner dims of an FFN.
        width: Features of a unit that the output projection reads.
        start: Where the units begin in the vector.
        gate: Where the mask of the whole sub-layer is in the vector.
        head_ids: The columns of the stack's position bias that the units use (T5), else `None`.
    """

    stack: str
    layer: int
    kind: str
    units: int
    width: int
    start: int
    gate: int
    head_ids: tuple[int, ...] | None = None

    @property
    def stop(self) -> int:
        return self.start + self.units

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.layer}.{self.kind}"


@dataclass(frozen=True)
class MaskLayout:
    """The order of the vector: dims of the residual stream, units of every sub-layer, sub-layers.

    Attributes:
        hidden: Dims of the residual stream.
        depths: Layers of every stack, those without any sub-layer too.
        sublayers: The sub-layers, stack by stack and layer by layer.
        kinds: The structures that are masked; the others have entries that stay 1.
    """

    hidden: int
    depths: dict[str, int]
    sublayers: tuple[Sublayer, ...]
    kinds: frozenset[str]

    @classmethod
    def of(cls, view: ModelView, kinds: Collection[str]) -> MaskLayout:
        """Lays out the masks of a model.

        Args:
            view: The model.
            kinds: Some of `hidden`, `heads`, `ffn`, `sublayers`.
        """
        found = []
        start = view.hidden_size
        for stack in view.stacks.values():
            biased = stack.table.attention.position_bias is not None
            for layer in stack.layers:
                for kind in (ATTENTION, CROSS_ATTENTION, FFN):
                    part = getattr(layer, kind)
                    if part is None:
                        continue
                    if kind == FFN:
                        units, width, ids = part.size, 1, None
                    else:
                        units, width = part.num_kv_heads, part.num_heads // part.num_kv_heads * part.head_size
                        ids = _head_ids(part) if biased and kind == ATTENTION else None
                    found.append((stack.name, layer.index, kind, units, width, start, ids))
                    start += units
        sublayers = tuple(
            Sublayer(*fields, gate=start + index, head_ids=ids) for index, (*fields, ids) in enumerate(found)
        )
        depths = {name: len(stack.layers) for name, stack in view.stacks.items()}
        return cls(view.hidden_size, depths, sublayers, frozenset(kinds))

    @property
    def size(self) -> int:
        return self.sublayers[0].gate + len(self.sublayers)

    @property
    def units(self) -> slice:
        """Where the units of all sub-layers are."""
        return slice(self.hidden, self.sublayers[0].gate)

    @property
    def gates(self) -> slice:
        """Where the masks of whole sub-layers are."""
        return slice(self.sublayers[0].gate, self.size)

    def active(self) -> torch.Tensor:
        """Booleans: which entries of the vector are masks that learn."""
        active = torch.zeros(self.size, dtype=torch.bool)
        active[: self.hidden] = "hidden" in self.kinds
        for part in self.sublayers:
            active[part.start : part.stop] = ("ffn" if part.kind == FFN else "heads") in self.kinds
        active[self.gates] = "sublayers" in self.kinds
        return active

    def owners(self) -> torch.Tensor:
        """For every unit the index of its sub-layer."""
        return torch.cat([torch.full((part.units,), i) for i, part in enumerate(self.sublayers)])

    def factors(self, by_kind: Mapping[str, float]) -> torch.Tensor:
        """Factors by structure, 1 where none is given, for every entry; 0 where there is no mask. `[size]`."""
        factors = torch.ones(self.size)
        factors[: self.hidden] = by_kind.get("hidden", 1.0)
        for part in self.sublayers:
            factors[part.start : part.stop] = by_kind.get("ffn" if part.kind == FFN else "heads", 1.0)
        factors[self.gates] = by_kind.get("sublayers", 1.0)
        return factors * self.active()


def _head_ids(attention: AttentionView) -> tuple[int, ...]:
    pruned = attention.module.pruned_heads
    columns = range(attention.num_heads + len(pruned))
    return tuple(column for column in columns if column not in pruned)
