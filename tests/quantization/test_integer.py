"""The int8 graph: what becomes int8, and how."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimum_flexcompress.export.probe import open_session
from optimum_flexcompress.quantization.integer import IntegerOptions, products_left, products_of, quantize_integer
from tests.export.exported import relative_error


RNG = np.random.default_rng(0)


def model_of(nodes, tensors, outputs, inputs=(("x", TensorProto.FLOAT, ["n", 64]),)) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def random(*shape) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def types(model) -> list[str]:
    return [node.op_type for node in model.graph.node]


def float_weights(model) -> int:
    return sum(
        int(np.prod(tensor.dims)) for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[1] > 1
    )  # fmt: skip


def check(model, feeds, options=IntegerOptions(), ranges=None, bound=0.02):  # noqa: B008
    expected = open_session(model).run(None, feeds)
    counts = quantize_integer(model, options, ranges)
    for actual, value in zip(open_session(model).run(None, feeds), expected):
        assert 0 < relative_error(actual, value) < bound
    return counts


def linear(name="l", source="x", output="y", bias_first=False):
    bias = [f"{name}.b", f"{name}.m"] if bias_first else [f"{name}.m", f"{name}.b"]
    return [
        helper.make_node("MatMul", [source, f"{name}.w"], [f"{name}.m"], name=f"{name}/MatMul"),
        helper.make_node("Add", bias, [output], name=f"{name}/Add"),
    ]


@pytest.mark.parametrize("bias_first", [False, True])
def test_a_linear_layer_is_one_operator(bias_first):
    model = model_of(linear(bias_first=bias_first), {"l.w": random(64, 48), "l.b": random(48)}, ["y"])
    counts = check(model, {"x": random(5, 64)})
    assert types(model) == ["DynamicQuantizeMatMul"] and counts["dynamic"] == 1 and float_weights(model) == 0


def test_layers_that_read_the_same_share_its_rounding():
    nodes = linear("q", output="a") + linear("k", output="b") + linear("v", output="c")
    tensors = {f"{name}.{part}": random(*shape) for name in "qkv" for part, shape in (("w", (64, 64)), ("b", (64,)))}
    model = model_of(nodes, tensors, ["a", "b", "c"])
    check(model, {"x": random(5, 64)})
    assert sorted(types(model)) == ["DynamicQuantizeLinear"] + ["MatMulIntegerToFloat"] * 3


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed):
    shape = (48, 64) if transposed else (64, 48)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="gemm", transB=transposed)
    model = model_of([node], {"w": random(*shape), "b": random(48)}, ["y"])
    check(model, {"x": random(5, 64)})
    assert types(model) == ["DynamicQuantizeMatMul"]


def test_what_is_no_plain_linear_layer_stays():
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["scaled"], name="scaled", alpha=2.0),
        helper.make_node("MatMul", ["w", "v"], ["constant_left"], name="left"),
        helper.make_node("Transpose", ["x"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["both"], name="both"),
    ]
    model = model_of(nodes, {"w": random(64, 64), "v": random(64)}, ["scaled", "constant_left", "both"])
    assert quantize_integer(model) == {"static": 0, "dynamic": 0, "tables": 0}
    assert types(model) == [node.op_type for node in nodes]


def test_a_product_that_others_read_keeps_its_name():
    nodes = [*linear(), helper.make_node("Relu", ["l.m"], ["r"])]
    model = model_of(nodes, {"l.w": random(64, 48), "l.b": random(48)}, ["y", "r", "l.m"])
    check(model, {"x": random(5, 64)})
    assert types(model) == ["DynamicQuantizeMatMul", "Add", "Relu"]


def test_static_uses_the_ranges_it_is_given():
    x = random(50, 64)
    tensors = {"l.w": random(64, 48), "l.b": random(48)}
    model = model_of(linear(), tensors, ["y"])
    assert products_of(model) == {"l/MatMul": "x"}
    counts = check(model, {"x": x}, ranges={"x": (float(x.min()), float(x.max()))})
    assert types(model) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    assert counts == {"static": 1, "dynamic": 0, "tables": 0}
    # Half the range clips, and a clipped product is far off: the range is really used.
    clipped = model_of(linear(), tensors, ["y"])
    expected = open_session(clipped).run(None, {"x": x})[0]
    quantize_integer(clipped, ranges={"x": (-0.5, 0.5)})
    assert relative_error(open_session(clipped).run(None, {"x": x})[0], expected) > 0.2


def test_pairs_for_runtimes_with_kernels_of_their_own():
    x = random(50, 64)
    model = model_of(linear(), {"l.w": random(64, 48), "l.b": random(48)}, ["y"])
    counts = check(model, {"x": x}, IntegerOptions(pairs=True), {"x": (float(x.min()), float(x.max()))})
    assert types(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add"]
    assert counts["static"] == 1 and float_weights(model) == 0
    zeros = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("zero_point")]
    assert len(zeros) == 2 and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    scales = {t.name: list(t.dims) for t in model.graph.initializer if t.name.endswith("scale")}
    assert sorted(scales.values()) == [[], [48]]


@pytest.mark.parametrize("per_channel", [True, False])
def test_pairs_are_shared_and_keep_the_orientation(per_channel):
    x = random(50, 64)
    nodes = [
        *linear(),
        helper.make_node("Gemm", ["x", "g.w", "g.b"], ["z"], name="g", transB=1),
        helper.make_node("MatMul", ["x", "l.w"], ["again"], name="again"),
    ]
    tensors = {"l.w": random(64, 48), "l.b": random(48), "g.w": random(32, 64), "g.b": random(32)}
    model = model_of(nodes, tensors, ["y", "z", "again"])
    options = IntegerOptions(pairs=True, per_channel=per_channel)
    counts = check(model, {"x": x}, options, {"x": (float(x.min()), float(x.max()))})
    # One rounding of x, and each weight once.
    assert counts["static"] == 3 and types(model).count("QuantizeLinear") == 1
    axes = {node.input[0]: node.attribute[0].i if node.attribute else None
            for node in model.graph.node if node.op_type == "DequantizeLinear"}  # fmt: skip
    expected = {"l.w_quantized": 1, "g.w.T_quantized": 0} if per_channel else dict.fromkeys(axes, None)
    assert axes == {"x_quantized": None, **expected}


def test_per_channel_is_more_exact_than_per_tensor():
    weight = random(64, 48) * np.logspace(-2, 1, 48, dtype=np.float32)
    errors = {}
    for per_channel in (True, False):
        model = model_of(linear(), {"l.w": weight, "l.b": random(48) * 0}, ["y"])
        feeds = {"x": random(20, 64)}
        expected = open_session(model).run(None, feeds)[0]
        quantize_integer(model, IntegerOptions(per_channel=per_channel))
        actual = open_session(model).run(None, feeds)[0]
        # Feature by feature, so that the big ones do not hide the small ones.
        errors[per_channel] = np.median(np.abs(actual - expected).mean(0) / np.abs(expected).mean(0))
    assert errors[True] < 0.02 < 0.1 < errors[False]


def test_embedding_tables():
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="words"),
        helper.make_node("Gather", ["small", "kinds"], ["k"], name="kinds"),
        helper.make_node("Add", ["e", "k"], ["y"]),
    ]
    inputs = [(name, TensorProto.INT64, ["n", "m"]) for name in ("ids", "kinds")]
    tensors = {"table": random(100, 64) * np.logspace(-2, 2, 100)[:, None].astype(np.float32), "small": random(2, 64)}
    model = model_of(nodes, tensors, ["y"], inputs)
    feeds = {"ids": RNG.integers(0, 100, (3, 7)), "kinds": RNG.integers(0, 2, (3, 7))}
    counts = check(model, feeds, bound=0.01)
    sizes = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in model.graph.initializer}
    assert counts["tables"] == 1 and sizes["table_quantized"] == (TensorProto.INT8, [100, 64])
    assert "table" not in sizes and sizes["small"][0] == TensorProto.FLOAT
    model = model_of(nodes, tensors, ["y"], inputs)
    assert quantize_integer(model, IntegerOptions(embeddings=False))["tables"] == 0


def test_branches_share_the_weights_of_the_main_graph():
    def branch(name):
        output = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("MatMul", ["x", "w"], [f"{name}.m"], name=f"{name}/MatMul"),
            helper.make_node("Add", [f"{name}.m", "b"], [f"{name}.y"], name=f"{name}/Add"),
        ]
        return helper.make_graph(nodes, name, [], [output])

    node = helper.make_node("If", ["flag"], ["y"], name="if", then_branch=branch("then"), else_branch=branch("else"))
    inputs = [("x", TensorProto.FLOAT, ["n", 64]), ("flag", TensorProto.BOOL, [])]
    model = model_of([node], {"w": random(64, 48), "b": random(48)}, ["y"], inputs)
    counts = check(model, {"x": random(5, 64), "flag": np.array(True)})
    assert counts["dynamic"] == 2 and {tensor.name for tensor in model.graph.initializer} == {
        "b",
        "w_quantized",
        "w_scale",
    }


def residual(first, second, **tensors) -> onnx.ModelProto:
    """A residual stream: `y` is the sum of two tensors, one or both of which come from linear layers."""
    nodes = [*linear("a", output="p"), *linear("b", output="q"), helper.make_node("Sum", [first, second], ["y"])]
    weights = {"a.w": random(64, 64), "a.b": random(64), "b.w": random(64, 64), "b.b": random(64), **tensors}
    outputs = ["y", *{"p", "q"} - {first, second}]
    return model_of(nodes, weights, outputs)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize(("summands", "subtracted"), [(("x", "p"), "p"), (("q", "x"), "q"), (("p", "q"), "p")])
def test_residual_sums_are_differences_with_the_negative(summands, subtracted, mode):
    model = residual(*summands)
    check(model, {"x": random(5, 64)}, ranges={"x": (-4.0, 4.0)} if mode == "static" else None)
    (node,) = [node for node in model.graph.node if node.output[0] == "y"]
    assert node.op_type == "Sub" and node.input[1] == subtracted and set(node.input) == set(summands)


@pytest.mark.parametrize("options", [IntegerOptions(), IntegerOptions(per_channel=False)])
def test_weights_of_both_signs_are_stored_once(options):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="one"),
        helper.make_node("Add", ["m", "b"], ["p"]),
        helper.make_node("Sum", ["p", "x"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["n"], name="two"),
        helper.make_node("Add", ["n", "b"], ["q"]),
        helper.make_node("Sum", ["s", "q"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["o"], name="three"),
        helper.make_node("Add", ["o", "b"], ["y"]),
    ]
    model = model_of(nodes, {"w": random(64, 64) / 8, "b": random(64)}, ["y"])
    check(model, {"x": random(5, 64)}, options, bound=0.05)
    assert types(model).count("Sub") == 2
    names = ["b", "b_negative", "w_quantized", "w_scale", "w_scale_negative"]
    assert sorted(tensor.name for tensor in model.graph.initializer) == names


def test_sums_that_need_the_sign_stay():
    # The product is an output too, is added to itself, or is one of three.
    for inputs, outputs in ((["x", "p"], ["y", "p"]), (["p", "p"], ["y"]), (["x", "p", "x"], ["y"])):
        nodes = [*linear("a", output="p"), helper.make_node("Sum", inputs, ["y"])]
        model = model_of(nodes, {"a.w": random(64, 64), "a.b": random(64)}, outputs)
        check(model, {"x": random(5, 64)})
        assert types(model) == ["DynamicQuantizeMatMul", "Sum"]


def test_excluded_nodes_stay():
    model = model_of(linear(), {"l.w": random(64, 48), "l.b": random(48)}, ["y"])
    assert quantize_integer(model, IntegerOptions(exclude=frozenset({"l/MatMul"})))["dynamic"] == 0


def test_constants_are_seen_through_identities():
    """Exporters store equal weights and biases (zeros, in GPT-2) once, and pass them on."""
    nodes = [
        helper.make_node("Identity", ["b"], ["b.1"], name="i0"),
        helper.make_node("Identity", ["b.1"], ["b.2"], name="i1"),
        helper.make_node("Identity", ["w"], ["w.1"], name="i2"),
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="first"),
        helper.make_node("Gemm", ["h", "w.1", "b.1"], ["g"], name="second"),
        helper.make_node("Gemm", ["g", "w.1", "b.2"], ["y"], name="third"),
    ]
    model = model_of(nodes, {"w": random(64, 64) / 8, "b": random(64)}, ["y"])
    assert products_left(model.graph) == 3
    assert list(products_of(model)) == ["first", "second", "third"]
    counts = check(model, {"x": random(5, 64)}, bound=0.05)
    assert counts["dynamic"] == 3 and products_left(model.graph) == 0
    assert "Identity" not in types(model) and not float_weights(model)
