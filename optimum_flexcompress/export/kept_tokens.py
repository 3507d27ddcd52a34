"""Attention that also says how much each token received, and layers that go on with the tokens they keep.

Where tokens are dropped, an exported graph computes the attention maps twice: for the context, and for the sums by
which tokens are chosen. ONNX Runtime's fused attention keeps its maps to itself, and the maps of a whole batch,
`(batch, heads, queries, keys)`, are more than a processor's cache holds: writing and reading them takes longer than
computing them. Sample by sample they fit, so a `Scan` over the batch computes both from maps that never leave the
cache, in the time of the fused attention alone.

Rows of tokens are picked where the exporter put them, after the norm of the self-attention. What comes between the
attention and the choice is computed token by token, and can just as well be computed for the tokens that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from .attention import Attention, NotFusable, scores_of
from .first_token import cut, first_token_gathers, inner_nodes
from .graph import MICROSOFT, Graph, attribute
from .hidden_keys import score_of_hidden, widened_projections
from .probe import Feeds, values_of


@dataclass
class Significance:
    """The sums of one layer's attention maps.

    Attributes:
        node: The node that returns them, `(batch, keys)`.
        softmax: The name of the softmax whose maps are summed.
        query: The query, before heads are split off.
        key: The key.
        weights: `(batch, 1, 1, queries)`, what each query counts; None where all count 1.
    """

    node: NodeProto
    softmax: str
    query: str
    key: str
    weights: str | None


def find_significances(graph: Graph) -> list[Significance]:
    """Finds the sums of attention maps over heads and queries."""
    found = []
    for node in graph.nodes:
        if node.op_type != "ReduceSum" or len(node.input) < 2:
            continue
        axes = graph.constant(node.input[1])
        if axes is None or list(axes) != [1, 2] or attribute(node, "keepdims", 1):
            continue
        weights, softmax = None, graph.producer(node.input[0], "Softmax")
        product = graph.producer(node.input[0], "MatMul")
        if product is not None:
            weights, softmax = product.input[0], graph.producer(product.input[1], "Softmax")
        if softmax is not None:
            try:
                scores = scores_of(graph, softmax)
            except NotFusable:
                continue
            found.append(Significance(node, softmax.name or softmax.output[0], scores.query, scores.key, weights))
    return found


def matching(significances: list[Significance], item: Attention) -> Significance | None:
    """The sums of the maps of one attention."""
    return next((one for one in significances if (one.query, one.key) == (item.query, item.key)), None)


def fuse_with_significance(graph: Graph, item: Attention, significance: Significance) -> None:
    """Replaces an attention and the sums of its maps by a `Scan` over the samples.

    Args:
        graph: The graph; call its `write` when done.
        item: A measured attention.
        significance: The sums of its maps.
    """
    base = f"{item.name.replace('/', '.')}.kept"
    body = _Body(graph, item, base)
    maps = body.maps()
    outputs = [body.context(maps), body.received(maps, significance.weights)]
    context, received = (graph.unique_name(f"{base}.{name}") for name in ("context", "received"))
    graph.add_node(
        "Scan",
        body.inputs.values(),
        base,
        outputs=[context, received],
        body=body.graph(outputs),
        num_scan_inputs=len(body.inputs),
    )
    joined = graph.add_constant(f"{base}.joined", np.array([0, 0, -1], np.int64))
    merged = graph.add_node("Reshape", [context, joined], f"{base}.Reshape")
    graph.reindex()
    graph.replace_reads(item.output, merged)
    graph.replace_reads(significance.node.output[0], received)


class _Body:
    """What is done with one sample.

    In come query, key and value `(tokens, heads, size)`, out go the context, in the same form, and the sums
    `(tokens,)`. Products read heads where they are: to move them first is work for one thread only.
    """

    def __init__(self, graph: Graph, item: Attention, base: str):
        self.outer, self.item, self.base = graph, item, base
        self.inputs: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        self.nodes: list[NodeProto] = []

    def add(self, op_type: str, inputs: list[str], domain: str = "", **attributes) -> str:
        name = self.outer.unique_name(f"{self.base}.{op_type}")
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def constant(self, name: str, value: list[int]) -> str:
        return self.outer.add_constant(f"{self.base}.{name}", np.array(value, np.int64))

    def sample_of(self, name: str, tensor: str, rank: int) -> str:
        """Scans over a tensor; returns the name that its part for one sample has in the body."""
        self.inputs[name], self.ranks[name] = tensor, rank
        return f"{self.base}.sample.{name}"

    def split(self, name: str, tensor: str) -> str:
        """One sample of a projection, with its heads split off."""
        shape = self.constant(f"{name}.split", [0, 0, self.item.heads, -1])
        whole = self.outer.add_node("Reshape", [tensor, shape], f"{self.base}.{name}.Reshape")
        return self.sample_of(name, whole, 3)

    def maps(self) -> str:
        """The attention maps, `(heads, queries, keys)`."""
        item, graph = self.item, self.outer
        projections, mask = (item.query, item.key), item.mask
        hides_keys = item.mask_is_row or item.mask_input is not None
        if hides_keys:
            widened = widened_projections(graph, item, self.base)
            if widened is not None:
                projections, mask = widened, None
            else:
                axes = self.constant("row", [1, 2])
                mask = graph.add_node("Unsqueeze", [score_of_hidden(graph, item), axes], f"{self.base}.mask")
        query, key = (self.split(name, tensor) for name, tensor in zip(("query", "key"), projections))
        scores = self.add(
            "FusedMatMul",
            [query, key],
            MICROSOFT,
            alpha=float(item.scale),
            transB=1,
            transBatchA=1,
            transBatchB=1,
        )
        if mask is not None:
            scores = self.add("Add", [scores, self.sample_of("mask", mask, 3)])
        return self.add("Softmax", [scores], axis=-1)

    def context(self, maps: str) -> str:
        """`(queries, heads, size)`."""
        product = self.add("FusedMatMul", [maps, self.split("value", self.item.value)], MICROSOFT, transBatchB=1)
        return self.add("Transpose", [product], perm=(1, 0, 2))

    def received(self, maps: str, weights: str | None) -> str:
        """`(keys,)`: the sums over heads and queries."""
        if weights is not None:
            maps = self.add("MatMul", [self.sample_of("weights", weights, 3), maps])
        return self.add("ReduceSum", [maps, self.constant("axes", [0, 1])], keepdims=0)

    def graph(self, outputs: list[str]) -> GraphProto:
        """The body, to be called when everything is in it."""

        def value(name: str, rank: int) -> ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)

        inputs = [value(f"{self.base}.sample.{name}", rank) for name, rank in self.ranks.items()]
        return helper.make_graph(
            self.nodes, self.base, inputs, [value(name, rank) for name, rank in zip(outputs, (3, 1))]
        )


def _choices(graph: Graph) -> list[NodeProto]:
    """The nodes that pick rows of tokens."""
    return [node for node in graph.nodes if node.op_type == "GatherND" and attribute(node, "batch_dims", 0) == 1]


def read_padding_directly(graph: Graph, feeds: list[Feeds]) -> bool:
    """Takes what says which tokens are no padding from the input that says so.

    The exported graph reads it off the mask that is added to attention scores, `(batch, 1, queries, keys)`, which
    nothing else needs once attention is fused.

    Args:
        graph: The graph, as exported; call its `write` when done.
        feeds: Inputs to compare with, some of them with padding.

    Returns:
        Whether there was something to take.
    """
    done = False
    names = [node.output[0] for node in graph.nodes if node.op_type == "Greater"]
    runs = values_of(graph.model, names, feeds)
    for name in names:
        source = next((source for source in graph.inputs if _is_whether(name, source, runs, feeds)), None)
        if source is not None:
            visible = graph.add_node("Cast", [source], f"{source}.visible", to=TensorProto.BOOL)
            graph.replace_reads(name, visible)
            done = True
    return done


def _is_whether(name: str, source: str, runs: list[Feeds], feeds: list[Feeds]) -> bool:
    """Whether a tensor says where an input of the graph is not 0."""
    return any((inputs[source] == 0).any() for inputs in feeds) and all(
        np.array_equal(run[name], inputs[source] != 0) for run, inputs in zip(runs, feeds)
    )


def spare_unread_choices(graph: Graph, feeds: list[Feeds]) -> bool:
    """Takes out a choice of tokens of which only the first, which is always kept, is read later.

    Args:
        graph: The graph, as exported; call its `write` when done.
        feeds: Inputs to check with that the first token is kept.

    Returns:
        Whether there was one.
    """
    done = False
    for gather in first_token_gathers(graph):
        inner = inner_nodes(graph, gather)
        for choice in _choices(graph):
            readers = graph.consumers(choice.output[0])
            if readers and graph.is_only_read_by(choice.output[0], gather, *inner):
                runs = values_of(graph.model, [choice.input[1]], feeds)
                if all((run[choice.input[1]][:, 0] == 0).all() for run in runs):
                    graph.replace_reads(choice.output[0], choice.input[0])
                    done = True
    return done


def choose_early(graph: Graph, feeds: Feeds) -> int:
    """Picks rows of tokens before what is computed token by token.

    Args:
        graph: The graph, attention already fused; call its `write` when done.
        feeds: Inputs to measure shapes with.

    Returns:
        How many choices were moved.
    """
    moved = 0
    graph.write()
    for name in [choice.name for choice in _choices(graph)]:
        (choice,) = [node for node in graph.nodes if node.name == name]
        if not graph.is_only_read_by(choice.input[0], choice):
            continue

        def pick(tensor: str, number: int, choice: NodeProto = choice) -> str:
            return graph.add_node("GatherND", [tensor, choice.input[1]], f"{choice.name}.{number}", batch_dims=1)

        if cut(graph, choice, feeds, pick):
            graph.replace_reads(choice.output[0], choice.input[0])
            graph.write()
            moved += 1
    return moved
