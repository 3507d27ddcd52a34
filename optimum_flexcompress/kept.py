"""What stays of a model: the language of surgery and of masks, and the check that it makes sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .architectures import AttentionView, ModelView, StackView
from .errors import FlexCompressError
from .structure import LayerStructure, ModelStructure


Indices = Sequence[int] | torch.Tensor | None


@dataclass
class KeptLayer:
    """What stays of a layer. `None` keeps a sub-layer as it is; an empty list removes it, bias included.

    Attributes:
        source: Index of the layer in the model as it is now.
        attention: Kept heads; where key and value heads are shared, kept groups (one key-value head with all its
            query heads).
        cross_attention: Kept heads of the cross-attention.
        ffn: Kept inner dims of the feed-forward network.
    """

    source: int
    attention: Indices = None
    cross_attention: Indices = None
    ffn: Indices = None


@dataclass
class Kept:
    """What stays of a model.

    Attributes:
        hidden: Kept dims of the residual stream, or `None` for all of them.
        stacks: For each stack the layers that stay, in their new order; a stack that is not named stays as it is.
    """

    hidden: Indices = None
    stacks: dict[str, list[KeptLayer]] = field(default_factory=dict)

    @classmethod
    def leading(cls, structure: ModelStructure) -> Kept:
        """The leading heads, dims and layers that give `structure`."""
        stacks = {}
        for name, stack in structure.stacks.items():
            stacks[name] = [_leading_layer(index, layer) for index, layer in enumerate(stack.layers)]
        return cls(range(structure.hidden_size), stacks)


def _leading_layer(index: int, layer: LayerStructure) -> KeptLayer:
    attention: Indices = []
    if layer.attention is not None:
        ids = layer.attention.head_ids
        attention = ids if ids is not None else range(layer.attention.kv_heads)
    cross = layer.cross_attention
    return KeptLayer(index, attention, range(cross.kv_heads) if cross else [], range(layer.ffn or 0))


def _indices(value: Indices, size: int, what: str) -> torch.Tensor | None:
    """Ascending indices as a tensor, or `None` if they are all there are."""
    if value is None:
        return None
    index = value.detach().cpu() if isinstance(value, torch.Tensor) else torch.tensor(list(value), dtype=torch.long)
    if index.dtype == torch.bool:
        if index.numel() != size:
            raise FlexCompressError(f"The mask for the {what} has {index.numel()} entries, there are {size}.")
        index = index.nonzero().flatten()
    index = index.long().sort().values
    if index.numel() and (index[0] < 0 or index[-1] >= size):
        raise FlexCompressError(f"Kept {what} go from {index[0]} to {index[-1]}: they are numbered 0 to {size - 1}.")
    if index.unique().numel() != index.numel():
        raise FlexCompressError(f"Kept {what} name one of them twice: name each once.")
    return None if index.numel() == size else index


def _check_layer(stack: StackView, kept: KeptLayer) -> KeptLayer:
    layer = stack.layers[kept.source]
    where = f"layer {kept.source} of the {stack.name}"

    def attention(view: AttentionView | None, value: Indices) -> torch.Tensor | None:
        return None if view is None else _indices(value, view.num_kv_heads, f"heads in {where}")

    return KeptLayer(
        kept.source,
        attention(layer.attention, kept.attention),
        attention(layer.cross_attention, kept.cross_attention),
        None if layer.ffn is None else _indices(kept.ffn, layer.ffn.size, f"FFN dims in {where}"),
    )


def check_kept(view: ModelView, kept: Kept) -> Kept:
    """Turns what a user wrote into ascending index tensors.

    Args:
        view: The model.
        kept: What stays of it.

    Returns:
        The same with a tensor where something goes and `None` where all of it stays.

    Raises:
        FlexCompressError: Indices that do not exist or are named twice, an empty stack, or a decoder without any
            self-attention.
    """
    objection = view.architecture.objection(view.model.config)
    if objection is not None:
        raise FlexCompressError(f"Nothing was removed: {objection}.")
    plan = Kept(_indices(kept.hidden, view.hidden_size, "dims of the residual stream"))
    if plan.hidden is not None:
        if plan.hidden.numel() == 0:
            raise FlexCompressError("No dim of the residual stream is left: keep at least one.")
    for name, layers in kept.stacks.items():
        if name not in view.stacks:
            raise FlexCompressError(f'The model has no stack "{name}": it has {" and ".join(view.stacks)}.')
        stack = view.stacks[name]
        sources = [layer.source for layer in layers]
        if not sources:
            raise FlexCompressError(f"The {name} has no layer left: keep at least one.")
        if min(sources) < 0 or max(sources) >= len(stack.layers) or len(set(sources)) != len(sources):
            raise FlexCompressError(
                f"Kept layers of the {name} are {sources}: name each layer once, from 0 to {len(stack.layers) - 1}."
            )
        plan.stacks[name] = [_check_layer(stack, layer) for layer in layers]
        if stack.is_causal and not any(_keeps_attention(stack, layer) for layer in plan.stacks[name]):
            raise FlexCompressError(
                f"The {name} would have no self-attention left, so it could not count the tokens it has generated: "
                "keep one self-attention head in one layer."
            )
    return plan


def _keeps_attention(stack: StackView, kept: KeptLayer) -> bool:
    there = stack.layers[kept.source].attention is not None
    return there and (kept.attention is None or len(kept.attention) > 0)
