"""Masks that hide keys, in the forms that fused attention takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .graph import Graph


if TYPE_CHECKING:
    from .attention import Attention


# Scores of hidden keys; exp() of it is 0 in single precision whatever the other scores are.
HIDDEN = -1e4


def _projection(graph: Graph, tensor: str) -> tuple[str, str, np.ndarray | None] | None:
    """`(input, weight, bias)` of a linear layer that makes `tensor`."""
    bias = None
    add = graph.producer(tensor, "Add")
    if add is not None:
        for index in (0, 1):
            value = graph.constant(add.input[index])
            if value is not None and value.ndim == 1:
                bias, tensor = value, add.input[1 - index]
    product = graph.producer(tensor, "MatMul")
    if product is None or graph.constant(product.input[1]) is None or graph.constant(product.input[1]).ndim != 2:
        return None
    return product.input[0], product.input[1], bias


def widened_projections(graph: Graph, item: Attention, base: str, extra: int = 1) -> tuple[str, str] | None:
    """Query and key with more dims a head, whose product is the mask.

    Args:
        graph: The graph.
        item: The attention.
        base: What names are made from.
        extra: How many more; the last of them is what the mask needs, others are 0.

    Returns:
        The two tensors, `(batch, length, heads * (size + extra))`; None where they come from no linear layer.
    """
    projections = [_projection(graph, name) for name in (item.query, item.key)]
    if None in projections:
        return None
    tensors = []
    for (source, weight, bias), constant, what in zip(projections, (1.0, 0.0), ("query", "key")):
        old = graph.constant(weight)
        width = old.shape[0]
        wide = np.zeros((width, item.heads, item.size + extra), np.float32)
        wide[..., : item.size] = old.reshape(width, item.heads, item.size)
        wide_bias = np.zeros((item.heads, item.size + extra), np.float32)
        wide_bias[:, -1] = constant
        wide_bias[:, : item.size] = 0.0 if bias is None else bias.reshape(item.heads, item.size)
        name = f"{base}.{what}"
        product = graph.add_node(
            "MatMul", [source, graph.add_constant(f"{name}.weight", wide.reshape(width, -1))], f"{name}.MatMul"
        )
        bias_name = graph.add_constant(f"{name}.bias", wide_bias.reshape(-1))
        tensors.append(graph.add_node("Add", [product, bias_name], f"{name}.Add"))
    tensors[1] = graph.add_node("Add", [tensors[1], _hidden_keys(graph, item, extra)], f"{base}.key.mask")
    return tensors[0], tensors[1]


def score_of_hidden(graph: Graph, item: Attention) -> str:
    """`(batch, keys)`: 0 for a visible key, a large negative number for a hidden one; made once for a graph."""
    shared = f"flexcompress.{item.mask_input or item.mask}"
    name = f"{shared}.scores"
    if graph.producer(name) is None and item.mask_is_row:
        axes = graph.add_constant(f"{shared}.axes", np.array([1, 2], np.int64))
        row = graph.add_node("Squeeze", [item.mask, axes], f"{shared}.Squeeze")
        least = graph.add_constant(f"{shared}.least", np.float32(HIDDEN))
        graph.add_node("Max", [row, least], f"{shared}.Max", outputs=[name])
        graph.reindex()
    elif graph.producer(name) is None:
        one, large = (graph.add_constant(f"{shared}.{value:g}", np.float32(value)) for value in (1.0, -HIDDEN))
        number = graph.add_node("Cast", [item.mask_input], f"{shared}.Cast", to=1)
        hidden = graph.add_node("Sub", [number, one], f"{shared}.Sub")
        graph.add_node("Mul", [hidden, large], f"{shared}.Mul", outputs=[name])
        graph.reindex()
    return name


def _hidden_keys(graph: Graph, item: Attention, extra: int) -> str:
    """`(batch, keys, heads * (size + extra))`: the scores of hidden keys in the last dim of every head, else 0."""
    name = f"flexcompress.{item.mask_input or item.mask}.{item.heads}x{item.size}+{extra}.{item.scale:g}"
    if graph.producer(name) is None:
        place = np.zeros((1, 1, item.heads, item.size + extra), np.float32)
        place[..., -1] = 1.0 / item.scale
        axis = graph.add_constant(f"{name}.axis", np.array([2], np.int64))
        column = graph.add_node("Unsqueeze", [score_of_hidden(graph, item), axis], f"{name}.Unsqueeze")
        where = graph.add_constant(f"{name}.place", place.reshape(1, 1, -1))
        graph.add_node("Mul", [column, where], f"{name}.Mul", outputs=[name])
        graph.reindex()
    return name


def expanded_mask(graph: Graph, item: Attention, base: str) -> str:
    """`(batch, 1, queries, keys)`, as the operator wants it."""
    axes = graph.add_constant(f"{base}.axes", np.array([1, 2], np.int64))
    row = graph.add_node("Unsqueeze", [score_of_hidden(graph, item), axes], f"{base}.Unsqueeze")
    length = graph.add_node("Shape", [item.query], f"{base}.Shape", start=1, end=2)
    one = graph.add_constant(f"{base}.one", np.array([1], np.int64))
    shape = graph.add_node("Concat", [one, one, length, one], f"{base}.Concat", axis=0)
    return graph.add_node("Expand", [row, shape], f"{base}.Expand")
