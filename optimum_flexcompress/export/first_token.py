"""Spares the last layer of a classifier the tokens that its head never looks at.

Heads of BERT, RoBERTa, DistilBERT and ViT read the first token only. In the last layer, then, only keys and values are
needed of the others: queries, attention, output projection, norms and feed-forward network of the first token are
enough. The result is the same, and the last layer costs about a fifth.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto

from .graph import Graph, attribute
from .probe import Feeds, values_of


# Operators that compute a token from the same token of their inputs, as long as they do not reduce over other axes.
ELEMENTWISE = {"Add", "Sum", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Relu", "Sigmoid", "Gelu", "FastGelu"}
TOKENWISE = ELEMENTWISE | {"LayerNormalization", "MatMul", "MultiHeadAttention", "BiasGelu", "Identity"}


def keep_first_token(graph: Graph, feeds: Feeds) -> bool:
    """Cuts to the first token as early as possible.

    Args:
        graph: The graph, attention already fused; call its `write` when done.
        feeds: Inputs to measure shapes with.

    Returns:
        Whether anything was saved.
    """
    for gather in first_token_gathers(graph):
        zero, one = (graph.add_constant(f"flexcompress.first_token.{i}", np.array([i], np.int64)) for i in (0, 1))

        def slice_first(name: str, number: int, zero: str = zero, one: str = one) -> str:
            return graph.add_node("Slice", [name, zero, one, one], f"flexcompress.first_token.{number}")

        return cut(graph, gather, feeds, slice_first)
    return False


def first_token_gathers(graph: Graph) -> list[NodeProto]:
    """The nodes that take the first token of a tensor that nothing else reads."""
    found = []
    for node in graph.nodes:
        if node.op_type == "Gather" and attribute(node, "axis") == 1:
            index = graph.constant(node.input[1])
            if index is not None and index.ndim == 0 and int(index) == 0:
                if graph.is_only_read_by(node.input[0], node):
                    found.append(node)
    return found


def cut(graph: Graph, gather: NodeProto, feeds: Feeds, pick: Callable[[str, int], str]) -> bool:
    """Makes everything that matters only to the tokens that `gather` takes compute these tokens only.

    Args:
        graph: The graph.
        gather: A node that takes tokens of its first input.
        feeds: Inputs to measure shapes with.
        pick: Adds a node that takes the same tokens of the tensor it is given, with a number for its name, and returns
            what comes of it.

    Returns:
        Whether anything was saved. The first input of `gather` then has the taken tokens only.
    """
    inner = inner_nodes(graph, gather)
    tensors = [name for node in inner for name in _token_inputs(graph, node)] + [gather.input[0]]
    computed = [name for name in tensors if name not in graph.inputs]
    (values,) = values_of(graph.model, computed, [feeds])
    shapes = {name: value.shape for name, value in values.items()}
    batch, length = shapes[gather.input[0]][:2]
    # What all samples share has only the same first token.
    allowed = ((batch, length), (1, length)) if gather.op_type == "Gather" else ((batch, length),)
    if any(len(shape) != 3 or shape[:2] not in allowed for shape in shapes.values()):
        return False
    products = [node for node in inner if node.op_type == "MatMul"]
    if length < 2 or not products:
        return False
    made = {name for node in inner for name in node.output}
    picked: dict[str, str] = {}
    for node in inner:
        for name in _token_inputs(graph, node):
            if name in made:
                continue
            if name not in picked:
                picked[name] = pick(name, len(picked))
            for position, read in enumerate(node.input):
                if read == name and not (node.op_type == "MultiHeadAttention" and position > 0):
                    node.input[position] = picked[name]
    graph.reindex()
    return True


def inner_nodes(graph: Graph, gather: NodeProto) -> list[NodeProto]:
    """The nodes that matter to nothing but the tokens that `gather` takes."""
    inner: list[NodeProto] = []
    waiting = [gather.input[0]]
    while waiting:
        node = graph.producer(waiting.pop(), *TOKENWISE)
        if node is None or any(node is other for other in inner) or not _is_tokenwise(graph, node):
            continue
        readers = [reader for name in node.output for reader in graph.consumers(name)]
        if not graph.is_only_read_by(node.output[0], gather, *inner) or any(_reads_as_key(r, node) for r in readers):
            # It may qualify once another of its readers has been taken in: that reader puts it back in line.
            continue
        inner.append(node)
        waiting.extend(_token_inputs(graph, node))
    return inner


def _is_tokenwise(graph: Graph, node: NodeProto) -> bool:
    if node.op_type == "MatMul":
        weight = graph.constant(node.input[1])
        return weight is not None and weight.ndim == 2
    if node.op_type == "LayerNormalization":
        return attribute(node, "axis", -1) in (-1, 2)
    if node.op_type == "MultiHeadAttention":
        # With a mask for every query (and not just for keys), the mask would have to be cut as well.
        return not any(node.input[5:]) and len(node.output) == 1
    for name in node.input:
        value = graph.constant(name)
        if value is not None and not (value.ndim < 2 or value.shape[-2] == 1):
            return False
    return True


def _token_inputs(graph: Graph, node: NodeProto) -> list[str]:
    """The inputs that have a token axis: not the constants, and of an attention only the query."""
    names = node.input[:1] if node.op_type == "MultiHeadAttention" else node.input
    return [name for name in names if name and graph.constant(name) is None]


def _reads_as_key(reader: NodeProto, node: NodeProto) -> bool:
    return reader.op_type == "MultiHeadAttention" and any(name in node.output for name in reader.input[1:])
