"""Attention with two kernels computes what one computes, and the size of the input decides which one runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import version_converter

from optimum_flexcompress.export.fusion import fuse_graph
from optimum_flexcompress.export.graph import load_model, subgraphs
from optimum_flexcompress.export.probe import largest_difference, made_up_feeds, open_session
from optimum_flexcompress.export.short_attention import OPERATOR_SET, choose_attention_by_size
from optimum_flexcompress.quantization import quantize_folder
from tests.export.exported import KINDS


# Families whose attention has no mask but that of padding, and a head.
HEADS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForTokenClassification",
    "distilbert": "DistilBertForQuestionAnswering",
    "vit": "ViTForImageClassification",
}


def inner_types(model: onnx.ModelProto) -> list[str]:
    return sorted(node.op_type for outer in model.graph.node for graph in subgraphs(outer) for node in graph.node)


def fused_model(exported, family, kind="stock"):
    model, folder = exported(family, HEADS[family], kind)
    return fuse_graph(load_model(folder / "model.onnx"), model.config)[0]


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", HEADS)
def test_both_kernels_compute_the_same(exported, family, kind):
    fused = fused_model(exported, family, kind)
    count = sum(node.op_type == "MultiHeadAttention" for node in fused.graph.node)
    # All scores, or none, may be stored: every input takes the same branch.
    for most in (2**40, 0):
        chosen, replaced = choose_attention_by_size(copy_of(fused), most)
        assert replaced == count > 0
        assert inner_types(chosen) == ["Attention"] * count + ["MultiHeadAttention"] * count
        for seed, scale in ((5, 1), (6, 3)):
            feeds = made_up_feeds(fused, seed, scale, image_size=16, vocabulary=64)
            assert largest_difference(chosen, fused, [feeds]) < 1e-5


def test_the_size_of_the_input_decides(exported):
    # Heads of 4 bytes a score: up to 3 sequences of 10 tokens.
    fused = fused_model(exported, "bert")
    heads = next(
        item.i for node in fused.graph.node if node.op_type == "MultiHeadAttention" for item in node.attribute
        if item.name == "num_heads"
    )  # fmt: skip
    chosen, _ = choose_attention_by_size(fused, 4 * heads * 3 * 10 * 10)
    conditions = {node.input[0] for node in chosen.graph.node if node.op_type == "If"}
    assert len(conditions) == 1
    condition = conditions.pop()
    chosen.graph.output.append(onnx.ValueInfoProto(name=condition))
    session = open_session(chosen)
    for shape, few in {(1, 10): True, (3, 10): True, (4, 10): False, (3, 11): False, (1, 17): True}.items():
        ids = np.ones(shape, np.int64)
        feeds = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
        assert session.run([condition], feeds)[0] == few, shape


def test_models_without_flash_attention_are_returned_as_they_are(exported):
    for family, name in (("t5", "T5ForTokenClassification"), ("llama", "LlamaForCausalLM")):
        model, folder = exported(family, name, "stock")
        fused = fuse_graph(load_model(folder / "model.onnx"), model.config)[0]
        before = fused.SerializeToString()
        # T5 adds its position biases to the scores: that attention is not of the flash kind.
        chosen, count = choose_attention_by_size(fused)
        assert count == 0 and chosen is fused and fused.SerializeToString() == before
    _, folder = exported("bart", "BartForConditionalGeneration", "stock")
    merged = load_model(folder / "decoder_model_merged.onnx")
    assert choose_attention_by_size(merged) == (merged, 0)


def test_a_model_that_cannot_move_to_the_operator_set_keeps_one_kernel(exported, monkeypatch, caplog):
    def refuse(model, version):
        raise version_converter.ConvertError("no adapter")

    fused = fused_model(exported, "bert")
    monkeypatch.setattr(version_converter, "convert_version", refuse)
    with caplog.at_level("INFO", logger="optimum_flexcompress"):
        assert choose_attention_by_size(fused) == (fused, 0)
    assert "no adapter" in caplog.text


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_int8_models_have_both_kernels(exported, tmp_path, mode):
    model, folder = exported("bert", HEADS["bert"], "stock")
    rows = [{"input_ids": [2, 5, 9, 7], "attention_mask": [1] * 4, "token_type_ids": [0] * 4}]
    result = quantize_folder(folder, tmp_path / "int8", mode, calibration_dataset=rows if mode == "static" else None)
    int8 = load_model(tmp_path / "int8" / "model.onnx")
    assert result.files["model.onnx"].attentions_by_size == len(inner_types(int8)) // 2 == 3
    assert [item.version for item in int8.opset_import if not item.domain] == [OPERATOR_SET]
    assert "Sub" in {node.op_type for node in int8.graph.node}
    onnx.checker.check_model(int8)
