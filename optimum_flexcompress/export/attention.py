"""Finds attention in an exported graph and replaces it by one operator of ONNX Runtime.

The exporter writes attention as some twenty operators around a softmax; ONNX Runtime then stores the scores of all
heads, `(batch, heads, queries, keys)`, several times over. `MultiHeadAttention` does not, where it may use its flash
kernel, and that kernel takes no mask. A mask that only hides padded keys can be hidden from the kernel, though: give
every head one more dim, in which the query is 1 and the key is 0 or a large negative number, and the product of query
and key contains the mask.

Nothing here trusts names or constants of the graph for the number of heads, the scale or the meaning of the mask:
they are measured by running the graph, because compressed models have other numbers in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto

from .graph import MICROSOFT, Graph, attribute
from .hidden_keys import HIDDEN, expanded_mask, widened_projections
from .probe import Feeds, same_constant, values_of


SPLIT_HEADS = (0, 2, 1, 3)
SWAP_LAST = (0, 1, 3, 2)
SPLIT_HEADS_SWAPPED = (0, 2, 3, 1)


class NotFusable(Exception):
    """Why an attention is left as it is."""


@dataclass
class Attention:
    """One attention in a graph, as far as it is known.

    Attributes:
        name: Where it comes from, for messages.
        softmax: Its softmax node.
        query: `(batch, queries, heads * size)`, before the heads are split off.
        key: `(batch, keys, heads * size)`.
        value: `(batch, keys, heads * value size)`.
        output: `(batch, queries, heads * value size)`.
        split_query: The query as `(batch, heads, queries, size)`.
        mask: What is added to the scores, or None.
        uncut_mask: What `mask` is a slice of; the same, where it is cut to the number of keys that it has anyway.
        factors: Scalars that multiply the scores, and those that divide them.
        heads: Number of heads.
        size: Dims of a head.
        scale: What scores are multiplied by.
        mask_input: The graph input that says which keys are hidden, where `mask` does nothing else.
        mask_is_row: Whether `mask` is `(batch, 1, 1, keys)` and does nothing but hide keys.
    """

    name: str
    softmax: NodeProto
    query: str
    key: str
    value: str
    output: str
    split_query: str
    mask: str | None
    uncut_mask: str | None
    factors: tuple[list[str], list[str]]
    heads: int = 0
    size: int = 0
    scale: float = 1.0
    mask_input: str | None = field(default=None)
    mask_is_row: bool = False


def find_attentions(graph: Graph) -> tuple[list[Attention], dict[str, str]]:
    """Finds what looks like attention.

    Args:
        graph: The exported graph.

    Returns:
        The attentions found; and for each softmax that is not one of them, by name, the reason.
    """
    found, reasons = [], {}
    for node in graph.nodes:
        if node.op_type == "Softmax":
            try:
                found.append(_match(graph, node))
            except NotFusable as error:
                reasons[node.name or node.output[0]] = str(error)
    names = [item.name for item in found]
    for item in found:
        if names.count(item.name) > 1:
            item.name = item.softmax.output[0]
    return found, reasons


@dataclass
class Scores:
    """What goes into a softmax: see the same names in [`Attention`]."""

    query: str
    key: str
    split_query: str
    mask: str | None
    factors: tuple[list[str], list[str]]


def scores_of(graph: Graph, softmax: NodeProto) -> Scores:
    """Reads the scores of an attention.

    Raises:
        NotFusable: They are no product of queries and keys.
    """
    factors: tuple[list[str], list[str]] = ([], [])
    scores, mask = _without_cast(graph, softmax.input[0]), None
    add = graph.producer(scores, "Add")
    if add is not None:
        is_product = [_is_product(graph, name) for name in add.input]
        if is_product.count(True) != 1:
            raise NotFusable("its mask cannot be told from its scores")
        scores, mask = add.input[is_product.index(True)], add.input[is_product.index(False)]
    product = graph.producer(_peel(graph, scores, factors), "MatMul")
    if product is None:
        raise NotFusable("its scores are no plain product of queries and keys")
    query, split_query = _merged(graph, _peel(graph, product.input[0], factors), SPLIT_HEADS, "query")
    key = _key(graph, _peel(graph, product.input[1], factors), factors)
    return Scores(query, key, split_query, mask, factors)


def _match(graph: Graph, softmax: NodeProto) -> Attention:
    scores = scores_of(graph, softmax)
    weighted = _only_reader(graph, softmax.output[0], "MatMul")
    if weighted.input[0] != softmax.output[0]:
        raise NotFusable("its weights are not the left factor of a product")
    value, _ = _merged(graph, weighted.input[1], SPLIT_HEADS, "value")
    transpose = _only_reader(graph, weighted.output[0], "Transpose")
    if tuple(attribute(transpose, "perm")) != SPLIT_HEADS:
        raise NotFusable("its heads are joined in an unusual way")
    output = _only_reader(graph, transpose.output[0], "Reshape").output[0]
    name = (softmax.name or softmax.output[0]).strip("/").rsplit("/", 1)[0]
    cut = graph.producer(scores.mask, "Slice") if scores.mask is not None else None
    uncut = cut.input[0] if cut is not None else None
    return Attention(
        name, softmax, scores.query, scores.key, value, output, scores.split_query, scores.mask, uncut, scores.factors
    )


def _without_cast(graph: Graph, tensor: str) -> str:
    """T5 takes its softmax in single precision, which scores in single precision already are."""
    cast = graph.producer(tensor, "Cast")
    return cast.input[0] if cast is not None and attribute(cast, "to") == TensorProto.FLOAT else tensor


def _peel(graph: Graph, tensor: str, factors: tuple[list[str], list[str]]) -> str:
    """Follows a tensor back through multiplications with scalars, which are noted down."""
    while (node := graph.producer(tensor, "Mul", "Div")) is not None:
        scalars = [_looks_scalar(graph, name) for name in node.input]
        if scalars == [False, True]:
            factors[node.op_type == "Div"].append(node.input[1])
            tensor = node.input[0]
        elif scalars == [True, False] and node.op_type == "Mul":
            factors[0].append(node.input[0])
            tensor = node.input[1]
        else:
            break
    return tensor


def _looks_scalar(graph: Graph, tensor: str) -> bool:
    value = graph.constant(tensor)
    if value is not None:
        return value.size == 1
    # Exporters compute the scale from a shape: Shape, Slice, Cast, Sqrt, Div.
    return graph.producer(tensor, "Sqrt", "Div", "Cast", "Pow", "Reciprocal") is not None


def _is_product(graph: Graph, tensor: str) -> bool:
    return graph.producer(_peel(graph, tensor, ([], [])), "MatMul") is not None


def _merged(graph: Graph, tensor: str, permutation: tuple[int, ...], what: str) -> tuple[str, str]:
    """From `(batch, heads, length, size)` back to `(batch, length, heads * size)`."""
    transpose = graph.producer(tensor, "Transpose")
    if transpose is None or tuple(attribute(transpose, "perm")) != permutation:
        raise NotFusable(f"its {what} is not a projection with split heads (cached, rotated or shared by heads)")
    reshape = graph.producer(transpose.input[0], "Reshape")
    if reshape is None:
        raise NotFusable(f"its {what} is not split into heads by a reshape")
    return reshape.input[0], tensor


def _key(graph: Graph, tensor: str, factors: tuple[list[str], list[str]]) -> str:
    transpose = graph.producer(tensor, "Transpose")
    if transpose is not None and tuple(attribute(transpose, "perm")) == SWAP_LAST:
        return _merged(graph, _peel(graph, transpose.input[0], factors), SPLIT_HEADS, "key")[0]
    return _merged(graph, tensor, SPLIT_HEADS_SWAPPED, "key")[0]


def _only_reader(graph: Graph, tensor: str, op_type: str) -> NodeProto:
    # Reading the shape of a tensor does not need its values.
    readers = [node for node in graph.consumers(tensor) if node.op_type != "Shape"]
    if any(node.op_type == "IsNaN" for node in readers):
        raise NotFusable("rows that are hidden entirely are set to zero, which the fused operator does not do")
    if len(readers) != 1 or readers[0].op_type != op_type or tensor in graph.outputs:
        raise NotFusable("something else reads what it computes, such as the attention weights")
    return readers[0]


def measure(graph: Graph, attentions: list[Attention], feeds: list[Feeds]) -> dict[str, str]:
    """Runs the graph and fills in heads, size, scale and mask input of every attention.

    Args:
        graph: The graph.
        attentions: What [`find_attentions`] returned; those that are not what they seem are removed.
        feeds: Inputs to run it on, with hidden keys if it has a mask.

    Returns:
        For each removed attention, by name, the reason.
    """
    names = [
        name
        for item in attentions
        for name in (item.query, item.key, item.value, item.output, item.split_query, *item.factors[0])
    ]
    names += [name for item in attentions for name in (*item.factors[1], item.mask, item.uncut_mask) if name]
    computed = [name for name in names if name not in graph.initializers and name not in graph.inputs]
    constants = {name: graph.constant(name) for name in names if name in graph.initializers}
    runs = [{**run, **constants, **inputs} for run, inputs in zip(values_of(graph.model, computed, feeds), feeds)]
    reasons = {}
    for item in list(attentions):
        try:
            _measure(item, runs, list(graph.inputs))
        except NotFusable as error:
            reasons[item.name] = str(error)
            attentions.remove(item)
    return reasons


def _measure(item: Attention, runs: list[dict[str, np.ndarray]], inputs: list[str]) -> None:
    for run in runs:
        query, key, value, output = (run[name] for name in (item.query, item.key, item.value, item.output))
        batch, heads, length, size = run[item.split_query].shape
        if item.heads and (item.heads, item.size) != (heads, size):
            raise NotFusable("its number of heads depends on the input")
        item.heads, item.size = heads, size
        width = value.shape[-1]
        expected = {
            "query": (query, (batch, length, heads * size)),
            "key": (key, (batch, key.shape[1], heads * size)),
            "value": (value, (batch, key.shape[1], width)),
            "output": (output, (batch, length, width)),
        }
        for what, (array, shape) in expected.items():
            if array.shape != shape or width % heads:
                raise NotFusable(f"its {what} has the shape {array.shape} where {shape} was expected")
    for names, sign in zip(item.factors, (1, -1)):
        for name in names:
            factor = same_constant(runs, name)
            if not factor:
                raise NotFusable("its scale is not a constant number")
            item.scale *= factor**sign
    if item.uncut_mask is not None and all(np.array_equal(run[item.mask], run[item.uncut_mask]) for run in runs):
        # The cut would keep the key alive, whose shape it reads.
        item.mask = item.uncut_mask
    if item.mask is not None:
        item.mask_input = next(
            (name for name in inputs if all(_only_hides_keys(run, item, name) for run in runs)), None
        )
        item.mask_is_row = item.mask_input is None and all(_is_hiding_row(run, item) for run in runs)
        if item.mask_input is None and not item.mask_is_row:
            for run in runs:
                shape = run[item.mask].shape
                batch, length, keys = run[item.query].shape[0], run[item.query].shape[1], run[item.key].shape[1]
                if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, item.heads):
                    raise NotFusable(f"its mask has the shape {shape}")
                if shape[2:] != (length, keys):
                    raise NotFusable(f"its mask has the shape {shape}, not one row for each query")


def _only_hides_keys(run: dict[str, np.ndarray], item: Attention, name: str) -> bool:
    """Whether the mask adds nothing where the graph input `name` is 1 and forbids a key where it is 0."""
    visible, mask = run[name], run[item.mask]
    if visible.dtype.kind != "i" or visible.shape != run[item.key].shape[:2] or mask.ndim != 4 or visible.all():
        return False
    visible = visible[:, None, None, :].astype(bool)
    try:
        visible, mask = np.broadcast_arrays(visible, mask)
    except ValueError:
        return False
    return bool((mask[visible] == 0).all() and (mask[~visible] <= HIDDEN).all())


def _is_hiding_row(run: dict[str, np.ndarray], item: Attention) -> bool:
    mask, (batch, keys) = run[item.mask], run[item.key].shape[:2]
    return mask.shape == (batch, 1, 1, keys) and bool(((mask == 0) | (mask <= HIDDEN)).all())


def fuse(graph: Graph, item: Attention) -> None:
    """Replaces one attention by `MultiHeadAttention`.

    Args:
        graph: The graph; call its `write` when done.
        item: A measured attention.
    """
    base = f"{item.name.replace('/', '.')}.fused"
    inputs, scale = [item.query, item.key, item.value], item.scale
    if item.mask is not None:
        widened = None
        hides_keys = item.mask_input is not None or item.mask_is_row
        if hides_keys:
            widened = widened_projections(graph, item, base)
        if widened is not None:
            inputs[:2] = widened
        else:
            mask = expanded_mask(graph, item, base) if hides_keys else item.mask
            inputs += ["", "", mask]
    old = graph.producer(item.output)
    output = graph.unique_name(f"{base}_output")
    graph.add_node(
        "MultiHeadAttention",
        inputs,
        base,
        outputs=[output],
        domain=MICROSOFT,
        num_heads=item.heads,
        scale=float(scale),
    )
    graph.reindex()
    if item.output in graph.outputs:
        old.output[0] = graph.unique_name(item.output)
        graph.nodes[-1].output[0] = item.output
        graph.reindex()
    else:
        graph.replace_reads(item.output, output)
