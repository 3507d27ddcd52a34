"""How significant a token is: the attention it receives."""

from __future__ import annotations

from contextvars import ContextVar

import torch

from ..architectures import AttentionView
from .onnx_ops import ReceivedAttention, is_in_onnx_export
from .rows import additive_mask


_CHUNK, _CACHED_CHUNK = 1 << 24, 1 << 21
"""Attention scores that are held at once: 64 MB in float32, and 8 MB on CPUs, whose caches hold those."""

ATTENTION_MAPS: ContextVar[torch.Tensor | None] = ContextVar("attention_maps", default=None)
"""The maps of the attention that ran last, `[batch, heads, length, length]`, where whoever runs the model knows them."""


@torch.no_grad()
def attention_received(
    attention: AttentionView,
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Column sums of the attention maps over heads and valid queries, without gradient.

    Args:
        attention: The self-attention.
        query: What its query projection returned, `[batch, length, heads * head size]`.
        key: The same of the key projection.
        valid: Booleans `[batch, length]`, or `None` where all tokens are valid.
        bias: What is added to the scores before the softmax, `[batch or 1, heads, length, length]`.

    Returns:
        `[batch, length]`, float32.
    """
    if is_in_onnx_export():
        weights = None
        if valid is not None:
            # OpenVINO takes a cast of booleans for the start of an int8 product.
            one, none = (torch.full((), value, dtype=query.dtype) for value in (1, 0))
            weights = torch.where(valid, one, none)[:, None, None, :]
            # A bias that is there already holds the mask.
            bias = additive_mask(valid, query.dtype) if bias is None else bias
        scale = attention.head_size**-0.5 if attention.table.scaled else 1.0
        return ReceivedAttention.apply(query, key, bias, weights, attention.num_heads, attention.head_size, scale)
    maps = ATTENTION_MAPS.get()
    if maps is not None:
        return _column_sums_in_one(maps, valid)
    query, key = (
        part.detach().unflatten(-1, (attention.num_heads, attention.head_size)).transpose(1, 2)
        for part in (query, key)
    )
    if attention.table.scaled:
        query = query * attention.head_size**-0.5
    heads = attention.num_heads
    step = heads
    if not torch.jit.is_tracing():
        chunk = _CACHED_CHUNK if query.device.type == "cpu" else _CHUNK
        step = min(max(chunk // (query.shape[0] * query.shape[2] ** 2), 1), heads)
    total = None
    for start in range(0, heads, step):
        part = slice(start, start + step)
        scores = query[:, part] @ key[:, part].transpose(-1, -2)
        if bias is not None:
            scores = scores + bias[:, part]
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(scores.dtype).min)
        received = column_sums(torch.softmax(scores, dim=-1, dtype=torch.float32), valid)
        total = received if total is None else total + received
    return total


def _column_sums_in_one(maps: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """What [`column_sums`] returns, from one product for each sample instead of one for each head."""
    if valid is None:
        return column_sums(maps, valid)
    batch, heads, length, _ = maps.shape
    weights = valid[:, None, :].to(maps.dtype).expand(-1, heads, -1).reshape(batch, 1, -1)
    return torch.bmm(weights, maps.reshape(batch, heads * length, length))[:, 0]


def column_sums(maps: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Sums attention maps `[batch, heads, length, length]` over heads and valid queries, to `[batch, length]`."""
    if valid is None:
        return maps.float().sum((1, 2))
    weights = valid[:, None, None, :].float()
    return (weights @ maps.float()).sum((1, 2))
