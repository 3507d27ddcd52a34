"""Graphs that ONNX Runtime's transformer optimizer has fused already."""

from __future__ import annotations

from collections import Counter

import pytest
from onnx import TensorProto
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForSequenceClassification, ORTQuantizer

from optimum_flexcompress import FlexORTQuantizer
from optimum_flexcompress.export.graph import load_model
from tests.export.exported import relative_error
from tests.tiny import inputs_for, outputs_of


@pytest.fixture(scope="module")
def fused(exported, tmp_path_factory):
    model, folder = exported("bert", "BertForSequenceClassification", "stock")
    target = tmp_path_factory.mktemp("fused")
    graph = optimizer.optimize_model(
        str(folder / "model.onnx"), "bert", num_heads=4, hidden_size=32, optimization_options=FusionOptions("bert")
    )
    graph.save_model_to_file(str(target / "model.onnx"))
    model.config.save_pretrained(target)
    kinds = Counter(node.op_type for node in load_model(target / "model.onnx").graph.node)
    assert kinds["Attention"] == 3 and kinds["EmbedLayerNormalization"] == 1
    return model, target


def test_a_fused_graph_becomes_int8(fused, tmp_path):
    model, folder = fused
    quantizer = FlexORTQuantizer.from_pretrained(folder)
    quantizer.quantize(save_dir=tmp_path / "int8")
    kinds = Counter(node.op_type for node in load_model(tmp_path / "int8" / "model.onnx").graph.node)
    assert kinds["QAttention"] == 3 and kinds["QEmbedLayerNormalization"] == 1
    assert not {"Attention", "EmbedLayerNormalization", "MatMul", "Gemm"} & kinds.keys()
    assert quantizer.reports["model.onnx"].fused == {"Attention": 3, "EmbedLayerNormalization": 1}
    int8 = ORTModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    inputs = inputs_for(model)
    assert 0 < relative_error(int8(**inputs).logits.numpy(), outputs_of(model, inputs)["logits"].numpy()) < 0.15


def test_its_embedding_tables_are_int8(fused, tmp_path):
    _, folder = fused
    FlexORTQuantizer.from_pretrained(folder).quantize(save_dir=tmp_path / "int8")
    tables = {
        tensor.name: tensor.data_type
        for tensor in load_model(tmp_path / "int8" / "model.onnx").graph.initializer
        if "embeddings.weight_quantized" in tensor.name
    }
    assert len(tables) == 3 and set(tables.values()) <= {TensorProto.INT8, TensorProto.UINT8}


def test_what_optimum_says_to_such_a_graph(fused, tmp_path):
    # The reason for all this: if this passes one day, Optimum has learnt it.
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    with pytest.raises(RuntimeError, match="Unable to find data type for weight_name"):
        ORTQuantizer.from_pretrained(fused[1]).quantize(config, tmp_path / "int8")
