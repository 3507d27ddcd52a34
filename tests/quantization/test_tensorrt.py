"""Int8 for TensorRT: what its parser takes, and that the numbers are right, on ONNX Runtime's CPU provider."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from optimum.onnxruntime import ORTModelForSequenceClassification

from optimum_flexcompress import set_lengths
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.export.graph import load_model
from optimum_flexcompress.export.probe import open_session
from optimum_flexcompress.quantization import quantize_folder
from optimum_flexcompress.quantization.calibration import measure_ranges
from tests.export.exported import relative_error
from tests.quantization.real_model import check_embeddings, demo_model, encoded_questions
from tests.quantization.test_families import examples
from tests.quantization.test_integer import linear, model_of, random
from tests.tiny import build, inputs_for, outputs_of


@pytest.fixture(scope="module", params=["stock", "compressed"])
def converted(request, exported, tmp_path_factory):
    model, folder = exported("bert", "BertForSequenceClassification", request.param)
    output = tmp_path_factory.mktemp("tensorrt") / request.param
    quantize_folder(folder, output, "static", "tensorrt", calibration_dataset=examples(model))
    return model, output


def test_what_the_parser_takes(converted):
    model, folder = converted
    onnx_model = load_model(folder / "model.onnx")
    graph = onnx_model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    # Standard operators only, and per-channel scales, which came with operator set 13.
    assert {node.domain for node in graph.node} == {""} and onnx_model.opset_import[0].version >= 13
    assert [item.domain for item in onnx_model.opset_import] == [""]
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = numpy_helper.to_array(tensors[node.input[2]])
            assert zero.dtype == np.int8 and not zero.any()
        if node.op_type == "Gather" and node.input[0] in tensors:
            # Lookups read floating-point tables.
            assert tensors[node.input[0]].data_type != TensorProto.INT8
        if node.op_type == "Gemm" and len(node.input) > 2:
            assert tensors[node.input[2]].data_type == TensorProto.FLOAT
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
    linears = sum(1 for module in model.modules() if type(module).__name__ == "Linear")
    assert len(weights) == linears
    for node in weights:
        weight, scale = tensors[node.input[0]], tensors[node.input[1]]
        axis = node.attribute[0].i
        reader = next(other for other in graph.node if node.output[0] in other.input)
        # Along the output features: the columns of a MatMul, the rows of a transposed Gemm.
        transposed = reader.op_type == "Gemm" and any(a.name == "transB" and a.i for a in reader.attribute)
        assert weight.data_type == TensorProto.INT8 and axis == (0 if transposed else 1)
        assert list(scale.dims) == [weight.dims[axis]]
        # The other factor is rounded too, or there would be no int8 product.
        assert made_by[reader.input[0]].op_type == "DequantizeLinear"
    kinds = {tensor.data_type for tensor in graph.initializer}
    assert TensorProto.INT32 not in kinds and TensorProto.UINT8 not in kinds


def test_it_computes_what_the_model_computes(converted):
    model, folder = converted
    int8 = ORTModelForSequenceClassification.from_pretrained(folder)
    inputs = inputs_for(model)
    assert 0 < relative_error(int8(**inputs).logits.numpy(), outputs_of(model, inputs)["logits"].numpy()) < 0.2


def test_dropping_tokens_takes_standard_operators_only(tmp_path):
    model = set_lengths(build("bert", "BertForSequenceClassification"), [6, 4, 3])
    quantize_folder(model, tmp_path / "int8", "static", "tensorrt", calibration_dataset=examples(model))
    onnx_model = load_model(tmp_path / "int8" / "model.onnx")
    kinds = {node.op_type for node in onnx_model.graph.node}
    assert {node.domain for node in onnx_model.graph.node} == {""} and {"TopK", "QuantizeLinear"} <= kinds
    int8 = ORTModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert int8(**inputs_for(model, batch=2, length=9)).logits.isfinite().all()


def test_ranges_around_zero_fit_the_rounding():
    model = model_of(linear(), {"l.w": random(64, 48), "l.b": random(48)}, ["y"])
    x = np.abs(random(2000, 64))
    (low, high) = measure_ranges(model, ["x"], [{"x": x}], "mse", symmetric=True)["x"]
    (_, one_sided) = measure_ranges(model, ["x"], [{"x": x}], "mse")["x"]

    def error(end):
        return float(((np.clip(np.rint(x / end * 127), -127, 127) * end / 127 - x) ** 2).sum())

    # 127 levels instead of 255 for the same numbers: it pays to cut more off.
    assert -low == high < one_sided and error(high) < error(one_sided)


def test_agreement_on_a_real_model(tmp_path):
    encoded, labels = encoded_questions()
    export_onnx(demo_model(), tmp_path / "fp32", "feature-extraction", validate=False)
    quantize_folder(tmp_path / "fp32", tmp_path / "int8", "static", "tensorrt", calibration_dataset=encoded[::8])

    def embed(folder):
        session = open_session(folder / "model.onnx")
        names = [value.name for value in session.get_inputs()]
        return np.stack(
            [session.run(None, {name: np.asarray([row[name]]) for name in names})[0][0].mean(0) for row in encoded]
        )

    check_embeddings(embed(tmp_path / "fp32"), embed(tmp_path / "int8"), labels)
