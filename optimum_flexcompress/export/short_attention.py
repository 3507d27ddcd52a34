"""Gives attention a second kernel for short inputs, chosen while the model runs.

`MultiHeadAttention` in its flash form keeps the scores of one head at a time, but splits its heads off on one thread
and does not win its cost back on short inputs. `Attention` of ONNX operator set 23 stores the scores of all heads,
`(batch, heads, queries, keys)`, and takes about two thirds of the time while these fit into the caches. Both compute
the same from the same three tensors, so a graph can hold both and look at the size of its input first.
"""

from __future__ import annotations

import logging

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, version_converter

from .graph import MICROSOFT, Graph, attribute, has_subgraphs
from .probe import can_probe


logger = logging.getLogger(__name__)

OPERATOR_SET = 23
# Scores of all heads in single precision that may be stored, in bytes. Beyond, both kernels take the same time, and
# flash attention much less memory.
MOST_SCORES = 64 * 2**20


def choose_attention_by_size(model: ModelProto, most_scores: int = MOST_SCORES) -> tuple[ModelProto, int]:
    """Replaces every flash attention by a choice between both kernels.

    All attentions of a graph follow the size of the first: the choice changes memory and time, never the result, and
    looking costs some microseconds, which a short sentence notices.

    Args:
        model: A model with fused attention, int8 or not. One with sub-graphs (merged decoders) is returned as it is.
        most_scores: Bytes of scores, of one attention in a batch, up to which they are stored.

    Returns:
        The model, which may be another one, and how many attentions have two kernels now.
    """
    if has_subgraphs(model) or not can_probe(model):
        return model, 0
    if not any(_is_flash(node) for node in model.graph.node):
        return model, 0
    converted = _with_operator_set(model)
    if converted is None:
        return model, 0
    graph = Graph(converted)
    nodes = [node for node in graph.nodes if _is_flash(node)]
    few = _few_scores(graph, nodes[0], most_scores // (4 * max(attribute(node, "num_heads") for node in nodes)))
    for node in nodes:
        _choose(graph, node, few)
    return graph.write(), len(nodes)


def _is_flash(node: NodeProto) -> bool:
    """Without a mask and a cache, and with a scale that both operators read alike."""
    if node.op_type != "MultiHeadAttention" or node.domain != MICROSOFT or any(node.input[3:]):
        return False
    return len(node.output) == 1 and attribute(node, "scale", 0.0) > 0


def _with_operator_set(model: ModelProto) -> ModelProto | None:
    version = next((item.version for item in model.opset_import if not item.domain), 1)
    if version >= OPERATOR_SET:
        return model
    try:
        return version_converter.convert_version(model, OPERATOR_SET)
    except version_converter.ConvertError as error:
        logger.info("Attention keeps one kernel: the model cannot move to operator set %d (%s).", OPERATOR_SET, error)
        return None


def _few_scores(graph: Graph, node: NodeProto, most: int) -> str:
    """A scalar: whether `batch * queries * keys` is at most `most`."""
    base = "flexcompress.few_scores"
    sizes = [
        graph.add_node("Shape", [node.input[0]], f"{base}.queries", start=0, end=2),
        graph.add_node("Shape", [node.input[1]], f"{base}.keys", start=1, end=2),
    ]
    count = graph.add_node("Concat", sizes, f"{base}.sizes", axis=0)
    count = graph.add_node("ReduceProd", [count], f"{base}.count", keepdims=0)
    limit = graph.add_constant(f"{base}.limit", np.asarray(most, np.int64))
    return graph.add_node("LessOrEqual", [count, limit], base)


def _choose(graph: Graph, node: NodeProto, few: str) -> None:
    """Puts the node into one branch of an `If` and `Attention` into the other; the output keeps its name."""
    heads, inputs, output = attribute(node, "num_heads"), list(node.input[:3]), node.output[0]
    flash = NodeProto()
    flash.CopyFrom(node)
    flash.output[0] = graph.unique_name(f"{output}_flash")
    stored = helper.make_node(
        "Attention",
        inputs,
        [graph.unique_name(f"{output}_stored")],
        name=graph.unique_name(f"{node.name}.stored"),
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=attribute(node, "scale"),
    )
    graph.remove([node])
    graph.add_node(
        "If",
        [few],
        f"{node.name}.choice",
        outputs=[output],
        then_branch=_branch(stored),
        else_branch=_branch(flash),
    )
    graph.reindex()


def _branch(node: NodeProto):
    value = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    return helper.make_graph([node], f"{node.name}.branch", [], [value])
