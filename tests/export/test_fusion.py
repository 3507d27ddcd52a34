"""Fused graphs compute what the exported ones compute."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from optimum_flexcompress.architectures import describe
from optimum_flexcompress.export import attention, export_onnx, fusion
from optimum_flexcompress.export.fusion import fuse_graph
from optimum_flexcompress.export.graph import Graph, attribute, load_model
from optimum_flexcompress.export.probe import largest_difference, made_up_feeds, open_session
from tests.export.exported import KINDS, make, run
from tests.tiny import inputs_for


HEADS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForTokenClassification",
    "distilbert": "DistilBertForQuestionAnswering",
    "bart": "BartForQuestionAnswering",
    "t5": "T5ForTokenClassification",
    "vit": "ViTForImageClassification",
}
READS_FIRST_TOKEN = [
    ("bert", "BertForSequenceClassification"),
    ("roberta", "RobertaForSequenceClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("vit", "ViTForImageClassification"),
]


def heads_of(model) -> list[int]:
    found = []
    for stack in describe(model).stacks.values():
        for layer in stack.layers:
            found += [item.num_heads for item in (layer.attention, layer.cross_attention) if item is not None]
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", HEADS)
def test_fused_equals_unfused(exported, family, kind):
    model, folder = exported(family, HEADS[family], kind)
    plain = load_model(folder / "model.onnx")
    fused, report = fuse_graph(plain, model.config)
    nodes = [node for node in fused.graph.node if node.op_type == "MultiHeadAttention"]
    expected = heads_of(model)
    # The token head of T5 has an encoder only.
    assert sorted(attribute(node, "num_heads") for node in nodes) == expected
    assert len(report.attentions) == len(expected) and report.left == {}
    assert not any(node.op_type == "Softmax" for node in fused.graph.node)
    for seed, scale in ((5, 1), (6, 3)):
        end = model.config.eos_token_id if family == "bart" else None
        feeds = made_up_feeds(plain, seed, scale, image_size=16, vocabulary=64, end_token=end)
        assert largest_difference(fused, plain, [feeds]) < 1e-4


@pytest.mark.parametrize("padding", ["right", "left", "scattered", "none"])
def test_any_padding_mask(exported, padding):
    model, folder = exported("bert", "BertForTokenClassification", "stock")
    plain = load_model(folder / "model.onnx")
    fused, _ = fuse_graph(plain, model.config)
    feeds = made_up_feeds(plain, seed=3, scale=2)
    mask = np.ones_like(feeds["attention_mask"])
    if padding != "none":
        mask[0, {"right": slice(9, None), "left": slice(0, 5), "scattered": slice(1, None, 3)}[padding]] = 0
    feeds["attention_mask"] = mask
    expected = open_session(plain).run(None, feeds)[0]
    np.testing.assert_allclose(open_session(fused).run(None, feeds)[0], expected, atol=1e-4, rtol=1e-4)


def test_a_hidden_key_has_no_weight_at_all(exported):
    model, folder = exported("bert", "BertForTokenClassification", "stock")
    fused = open_session(fuse_graph(load_model(folder / "model.onnx"), model.config)[0])
    inputs = {name: value.numpy() for name, value in inputs_for(model).items()}
    inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    first = fused.run(None, inputs)[0]
    inputs["input_ids"] = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], 17)
    visible = inputs["attention_mask"] == 1
    np.testing.assert_array_equal(fused.run(None, inputs)[0][visible], first[visible])


@pytest.mark.parametrize(("family", "name"), READS_FIRST_TOKEN)
def test_the_last_layer_computes_the_first_token_only(exported, family, name):
    model, folder = exported(family, name, "stock")
    fused, report = fuse_graph(load_model(folder / "model.onnx"), model.config)
    assert report.first_token_only
    feeds = made_up_feeds(fused, seed=1, image_size=16, vocabulary=64)
    probe = onnx.ModelProto()
    probe.CopyFrom(fused)
    products = [node for node in fused.graph.node if node.op_type == "MatMul"]
    probe.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in products)
    shapes = [value.shape for value in open_session(probe, optimize=False).run(None, feeds)[1:]]
    cut = [shape for shape in shapes if len(shape) == 3 and shape[1] == 1]
    # Query, attention output and both feed-forward products of one layer of three; its keys and values stay.
    assert len(cut) == 4 and len([shape for shape in shapes if len(shape) == 3]) == 18


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_heads_that_read_every_token_get_every_token(exported, name):
    model, folder = exported("bert", name, "stock")
    assert not fuse_graph(load_model(folder / "model.onnx"), model.config)[1].first_token_only


def test_a_fusion_that_would_be_wrong_is_not_done(exported, caplog):
    model, folder = exported("bert", "BertForTokenClassification", "stock")
    plain = load_model(folder / "model.onnx")

    def wrong_heads(graph, item):
        if "layer.1" in item.name:
            item.heads, item.size = 2 * item.heads, item.size // 2
        attention.fuse(graph, item)

    fused, report = fuse_graph(plain, model.config, dataclasses.replace(fusion.ONNX_RUNTIME, attention=wrong_heads))
    assert len(report.attentions) == 2 and not any("layer.1" in name for name in report.attentions)
    assert [name for name in report.left if "layer.1" in name] and "changes the outputs" in caplog.text
    assert largest_difference(fused, plain, [made_up_feeds(plain, seed=8, vocabulary=64)]) < 1e-4


def test_what_cannot_be_fused_is_left_with_a_reason(exported):
    model, folder = exported("llama", "LlamaForCausalLM", "stock")
    plain = load_model(folder / "model.onnx")
    fused, report = fuse_graph(plain, model.config)
    assert report.attentions == [] and len(report.left) == 3 and all(report.left.values())
    assert largest_difference(fused, plain, [made_up_feeds(plain, vocabulary=64)]) < 1e-4
    _, folder = exported("bart", "BartForConditionalGeneration", "stock")
    merged = load_model(folder / "decoder_model_merged.onnx")
    assert fuse_graph(merged)[0] is merged


def test_export_with_fusion(tmp_path):
    model = make("bert", "BertForSequenceClassification", "compressed")
    export_onnx(model, tmp_path / "plain")
    export_onnx(model, tmp_path / "fused", fuse=True)
    kinds = {node.op_type for node in load_model(tmp_path / "fused" / "model.onnx").graph.node}
    assert "MultiHeadAttention" in kinds
    inputs = inputs_for(model)
    expected = run(tmp_path / "plain" / "model.onnx", inputs)["logits"]
    np.testing.assert_allclose(run(tmp_path / "fused" / "model.onnx", inputs)["logits"], expected, atol=1e-4)


def test_unused_parts_of_a_graph_go_and_used_ones_stay():
    one = onnx.helper.make_node("Add", ["x", "weight"], ["y"], name="used")
    two = onnx.helper.make_node("Mul", ["x", "lost"], ["z"], name="unused")
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["outer"], ["inner"])], "g", [], [onnx.ValueInfoProto(name="inner")]
    )
    branch = onnx.helper.make_node("If", ["flag"], ["out"], name="branch", then_branch=inner, else_branch=inner)
    tensors = [onnx.numpy_helper.from_array(np.ones(2, np.float32), name) for name in ("weight", "lost", "outer")]
    values = [onnx.helper.make_tensor_value_info("x", 1, [2]), onnx.helper.make_tensor_value_info("flag", 9, [])]
    outputs = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in ("y", "out")]
    model = onnx.helper.make_model(onnx.helper.make_graph([two, branch, one], "main", values, outputs, tensors))
    Graph(model).write()
    assert {node.name for node in model.graph.node} == {"used", "branch"}
    assert {tensor.name for tensor in model.graph.initializer} == {"weight", "outer"}
