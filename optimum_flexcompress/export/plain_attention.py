"""Attention in standard operators, in the form that OpenVINO runs fastest.

OpenVINO compiles products of queries and keys, a softmax and the product with the values into one kernel, as long as
nothing else reads the maps and the mask is a row of numbers for each sample. Where tokens are dropped, the sums of the
maps are needed too, and the exported graph computes the maps twice. To compute them once, in operators of their own,
takes less time than a second kernel; the mask then goes into the product (see [`widened_projections`]), because to add
it would be one more pass over all maps.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto
from transformers import PretrainedConfig

from .attention import SPLIT_HEADS, SWAP_LAST, Attention
from .fusion import Form, FusionReport, fuse_graph
from .graph import MICROSOFT, Graph, attribute
from .hidden_keys import score_of_hidden, widened_projections
from .kept_tokens import Significance


SHARED = ".shared_maps"
# Finds the products that compute maps that are shared, or read them, by their names.
SHARED_PRODUCTS = r".*\.shared_maps\.(scores|context|received)"
_KEY_MASK, _MASK = 4, 5


def plain_graph(model: ModelProto, config: PretrainedConfig | None = None) -> tuple[ModelProto, FusionReport]:
    """Does what [`fuse_graph`] does, in standard operators.

    Args:
        model: An exported model in single precision.
        config: The model's configuration.

    Returns:
        A new model, and what was done.
    """
    return fuse_graph(model, config, Form(_mark, _share_maps, _write_out))


def _mark(graph: Graph, item: Attention) -> None:
    """Replaces an attention by one operator for the time being, whose queries can be cut like any token."""
    base = f"{item.name.replace('/', '.')}.plain"
    inputs = [item.query, item.key, item.value]
    if item.mask_input is not None or item.mask_is_row:
        half = graph.add_constant(f"{base}.half", np.float32(-0.5))
        visible = graph.add_node("Greater", [score_of_hidden(graph, item), half], f"{base}.Greater")
        inputs += ["", graph.add_node("Cast", [visible], f"{base}.Cast", to=6)]
    elif item.mask is not None:
        inputs += ["", "", item.mask]
    output = graph.add_node(
        "MultiHeadAttention", inputs, base, domain=MICROSOFT, num_heads=item.heads, scale=float(item.scale)
    )
    graph.reindex()
    graph.replace_reads(item.output, output)


def _write_out(graph: Graph) -> None:
    """Writes the operators that [`_mark`] put in as what they consist of."""
    for node in [node for node in graph.nodes if node.op_type == "MultiHeadAttention"]:
        heads, base = attribute(node, "num_heads"), node.name
        mask = node.input[_MASK] if len(node.input) > _MASK else None
        if len(node.input) == _KEY_MASK + 1:
            visible = graph.producer(graph.producer(node.input[_KEY_MASK], "Cast").input[0], "Greater")
            axes = graph.add_constant(f"{base}.axes", np.array([1, 2], np.int64))
            mask = graph.add_node("Unsqueeze", [visible.input[0], axes], f"{base}.mask")
        maps = _maps(graph, node.input[0], node.input[1], heads, attribute(node, "scale"), mask, base)
        merged = _context(graph, maps, node.input[2], heads, base)
        graph.reindex()
        graph.replace_reads(node.output[0], merged)
    _gather_rows(graph)


def _gather_rows(graph: Graph) -> None:
    """Picks rows of tokens out of those of all samples: OpenVINO would copy the whole tensor first."""
    places: dict[str, str] = {}
    for node in [node for node in graph.nodes if node.op_type == "GatherND" and attribute(node, "batch_dims", 0) == 1]:
        (rows, index), base = node.input, node.name
        if index not in places:
            zero, one = (graph.add_constant(f"{base}.{value}", np.array(value)) for value in (0, 1))
            axes = [graph.add_constant(f"{base}.axes", np.array([value])) for value in (-1, 1)]
            batch, length = (
                graph.add_node("Squeeze", [graph.add_node("Shape", [rows], base, start=axis, end=axis + 1)], base)
                for axis in (0, 1)
            )
            starts = graph.add_node("Mul", [graph.add_node("Range", [zero, batch, one], base), length], base)
            starts = graph.add_node("Unsqueeze", [starts, axes[1]], base)
            places[index] = graph.add_node("Add", [graph.add_node("Squeeze", [index, axes[0]], base), starts], base)
        flat = graph.add_node("Flatten", [rows], base, axis=2)
        picked = graph.add_node("Gather", [flat, places[index]], base)
        graph.reindex()
        graph.replace_reads(node.output[0], picked)


def _share_maps(graph: Graph, item: Attention, significance: Significance) -> None:
    """Sums the maps of the attention itself, instead of maps that are computed for the sums."""
    base = f"{item.name.replace('/', '.')}{SHARED}"
    projections, mask = (item.query, item.key), item.mask
    if item.mask_input is not None or item.mask_is_row:
        # Products in half precision take dims in pairs.
        widened = widened_projections(graph, item, base, extra=1 + (item.size + 1) % 2)
        if widened is not None:
            projections, mask = widened, None
        else:
            axes = graph.add_constant(f"{base}.axes", np.array([1, 2], np.int64))
            mask = graph.add_node("Unsqueeze", [score_of_hidden(graph, item), axes], f"{base}.mask")
    maps = _maps(graph, *projections, item.heads, item.scale, mask, base)
    merged = _context(graph, maps, item.value, item.heads, base)
    if significance.weights is not None:
        maps = graph.add_node("MatMul", [significance.weights, maps], f"{base}.received")
    axes = graph.add_constant(f"{base}.heads", np.array([1, 2], np.int64))
    received = graph.add_node("ReduceSum", [maps, axes], f"{base}.sums", keepdims=0)
    graph.reindex()
    graph.replace_reads(item.output, merged)
    graph.replace_reads(significance.node.output[0], received)


def _split(graph: Graph, tensor: str, heads: int, order: tuple[int, ...], base: str) -> str:
    shape = graph.add_constant(f"{base}.split", np.array([0, 0, heads, -1], np.int64))
    whole = graph.add_node("Reshape", [tensor, shape], f"{base}.Reshape")
    return graph.add_node("Transpose", [whole], f"{base}.Transpose", perm=order)


def _maps(graph: Graph, query: str, key: str, heads: int, scale: float, mask: str | None, base: str) -> str:
    """The attention maps, `(batch, heads, queries, keys)`."""
    query = _split(graph, query, heads, SPLIT_HEADS, f"{base}.query")
    # OpenVINO lets the product swap the last two axes, where they are swapped by themselves.
    key = _split(graph, key, heads, SPLIT_HEADS, f"{base}.key")
    key = graph.add_node("Transpose", [key], f"{base}.key.swapped", perm=SWAP_LAST)
    scores = graph.add_node("MatMul", [query, key], f"{base}.scores")
    if scale != 1:
        factor = graph.add_constant(f"{base}.scale", np.float32(scale))
        scores = graph.add_node("Mul", [scores, factor], f"{base}.Mul")
    if mask is not None:
        scores = graph.add_node("Add", [scores, mask], f"{base}.Add")
    return graph.add_node("Softmax", [scores], f"{base}.Softmax", axis=-1)


def _context(graph: Graph, maps: str, value: str, heads: int, base: str) -> str:
    """`(batch, queries, width)`, the heads joined again."""
    value = _split(graph, value, heads, SPLIT_HEADS, f"{base}.value")
    product = graph.add_node("MatMul", [maps, value], f"{base}.context")
    joined = graph.add_node("Transpose", [product], f"{base}.joined", perm=SPLIT_HEADS)
    shape = graph.add_constant(f"{base}.merged", np.array([0, 0, -1], np.int64))
    return graph.add_node("Reshape", [joined, shape], f"{base}.Reshape")
