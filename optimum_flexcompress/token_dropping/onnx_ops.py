"""The steps of token dropping as an ONNX graph should have them.

The exporter would write each of these as some dozens of operators, most of which compute shapes. Outside the export,
the functions that call these do the same with PyTorch's operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.onnx import is_in_onnx_export, symbolic_helper


__all__ = ["ReceivedAttention", "TakenRows", "is_in_onnx_export"]


def _constant(graph: Any, values: list[int]) -> Any:
    return graph.op("Constant", value_t=torch.from_numpy(np.asarray(values, np.int64)))


class ReceivedAttention(torch.autograd.Function):
    """Column sums of attention maps; the arguments are those of [`significance.attention_received`], except for:

    bias: What is added to the scores, padding included, or `None`.
    weights: `[batch, 1, 1, length]`, 1 for valid queries and 0 for others, or `None`.
    """

    @staticmethod
    def forward(ctx, query, key, bias, weights, heads: int, size: int, scale: float) -> torch.Tensor:
        query, key = (part.unflatten(-1, (heads, size)).transpose(1, 2) for part in (query, key))
        scores = query @ key.transpose(-1, -2) * scale
        maps = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        return (maps if weights is None else weights @ maps).sum((1, 2))

    @staticmethod
    def symbolic(graph, query, key, bias, weights, heads: int, size: int, scale: float):
        split = _constant(graph, [0, -1, heads, size])
        query = graph.op("Transpose", graph.op("Reshape", query, split), perm_i=[0, 2, 1, 3])
        key = graph.op("Transpose", graph.op("Reshape", key, split), perm_i=[0, 2, 3, 1])
        scores = graph.op("MatMul", query, key)
        if scale != 1:
            scores = graph.op("Mul", scores, graph.op("Constant", value_t=torch.tensor(scale)))
        if not symbolic_helper._is_none(bias):
            scores = graph.op("Add", scores, bias)
        maps = graph.op("Softmax", scores, axis_i=-1)
        if not symbolic_helper._is_none(weights):
            maps = graph.op("MatMul", weights, maps)
        return graph.op("ReduceSum", maps, _constant(graph, [1, 2]), keepdims_i=0)


class TakenRows(torch.autograd.Function):
    """See [`rows.take`]."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return tensor.gather(1, index[:, :, None].expand(-1, -1, tensor.shape[2]))

    @staticmethod
    def symbolic(graph, tensor, index):
        rows = graph.op("Unsqueeze", index, _constant(graph, [2]))
        return graph.op("GatherND", tensor, rows, batch_dims_i=1)
