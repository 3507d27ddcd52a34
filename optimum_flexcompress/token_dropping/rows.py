"""Which tokens of a batch stay, and moving their rows about.

Everything here also survives tracing: where a graph is recorded, sizes stay tensors, so that the graph serves other
batch sizes and lengths than those it was recorded with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .lengths import kept_of
from .onnx_ops import TakenRows, is_in_onnx_export


Size = Any
"""An `int`, or a tensor without dims while a graph is recorded."""


@dataclass(frozen=True)
class Limit:
    """How many tokens a layer keeps.

    Attributes:
        width: How many the tensor keeps for every sample.
        smallest: How many every sample keeps at least; from there on `each` decides.
        each: How many each sample keeps, `[batch]`, or `None` where all keep `width`.
    """

    width: Size
    smallest: Size
    each: torch.Tensor | None = None


def count_limit(hidden: torch.Tensor, count: int) -> Limit | None:
    """The limit of `count` tokens, or `None` where there are no more than that."""
    if torch.jit.is_tracing():
        # `min` would make the length at hand a constant of the graph.
        width = torch.minimum(torch._shape_as_tensor(hidden)[1], torch.full((), count))
        return Limit(width, width)
    return Limit(count, count) if count < hidden.shape[1] else None


def fraction_limit(hidden: torch.Tensor, tokens: torch.Tensor | None, numerator: int) -> Limit | None:
    """The limit of a fraction of the tokens of each sample, or `None` where all of them stay.

    Args:
        hidden: `[batch, length, hidden size]`, as it entered the layer.
        tokens: Tokens of each sample at the input, `[batch]`.
        numerator: The fraction, from [`lengths.numerator`].
    """
    each = kept_of(tokens, numerator)
    if torch.jit.is_tracing():
        # Not `max` and `min`, which IPEX takes for those of two tensors.
        return Limit(each.amax(0), each.amin(0), each)
    width, smallest = int(each.max()), int(each.min())
    if smallest >= hidden.shape[1]:
        return None
    return Limit(width, smallest, each)


def choose(scores: torch.Tensor, limit: Limit) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens stay and which go.

    Args:
        scores: Significance, `[batch, length]`.
        limit: How many stay.

    Returns:
        Indices `[batch, limit.width]`: first those that stay, in the order of the text, then, where a sample keeps
        fewer than `limit.width`, some that go. And indices `[batch, length - limit.smallest]` of all that go, after
        those beyond `limit.smallest` that stay.
    """
    length = scores.shape[1]
    # A stable sort cannot be exported; nothing but ties depends on it.
    stable = {} if torch.jit.is_tracing() else {"stable": True}
    ranked = torch.argsort(scores, dim=1, descending=True, **stable)
    kept, others = ranked[:, : limit.width], ranked[:, limit.smallest :]
    if limit.each is None:
        return torch.sort(kept, dim=1).values, others
    rank = torch.arange(kept.shape[1], device=scores.device)
    kept = kept + length * (rank >= limit.each[:, None])
    return torch.sort(kept, dim=1).values % length, others


def take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` (`[batch, n]`) of each sample of `tensor` (`[batch, length, size]`)."""
    if is_in_onnx_export():
        return TakenRows.apply(tensor, index)
    # Whole rows are copied here; `gather` would look up every number by itself.
    batch, length, size = tensor.shape
    offset = torch.arange(batch, device=tensor.device)[:, None] * length
    rows = tensor.reshape(-1, size).index_select(0, (index + offset).reshape(-1))
    return rows.reshape(batch, -1, size)


def additive_mask(valid: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[batch, 1, 1, length]` to add to scores: the lowest number where a token is not valid."""
    # Of the ways to write this, the exporter makes the least of this one.
    visible, hidden = (
        torch.full((), value, dtype=dtype, device=valid.device) for value in (0, torch.finfo(dtype).min)
    )
    return torch.where(valid, visible, hidden)[:, None, None, :]


def valid_tokens(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Booleans `[batch, length]` from the padding mask of a layer, in any of its forms; see `StackTable.mask`."""
    if mask is None:
        return None
    if mask.dim() == 2:
        return mask != 0
    row = mask[:, 0, 0]
    return row if row.dtype is torch.bool else row > torch.finfo(row.dtype).min / 2


def mask_like(mask: torch.Tensor | None, valid: torch.Tensor | None) -> torch.Tensor | None:
    """A padding mask for the tokens that are left, in the form of `mask`."""
    if mask is None or valid is None:
        return mask
    if mask.dim() == 2:
        return valid.to(mask.dtype)
    return valid[:, None, None, :] if mask.dtype is torch.bool else additive_mask(valid, mask.dtype)
