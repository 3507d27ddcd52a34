"""Rounding, and the ranges it uses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimum_flexcompress import FlexCompressError
from optimum_flexcompress.quantization.calibration import measure_ranges
from optimum_flexcompress.quantization.weights import quantize_symmetric, unsigned_range


@pytest.mark.parametrize("reduce_range", [False, True])
def test_weights_are_off_by_half_a_step_at_most(reduce_range):
    weight = np.random.default_rng(0).standard_normal((48, 20)).astype(np.float32) * np.logspace(-3, 3, 20)
    weight[:, 3] = 0
    for axis, shape in ((1, (20,)), (0, (48,)), (None, ())):
        values, scale = quantize_symmetric(weight.astype(np.float32), axis, reduce_range)
        spread = scale if axis is None else np.expand_dims(scale, 1 - axis)
        assert values.dtype == np.int8 and scale.shape == shape and (scale > 0).all()
        assert np.abs(values).max() == (64 if reduce_range else 127)
        assert (np.abs(values * spread - weight) <= spread * 0.5001).all()
        assert (values[:, 3] == 0).all()


@pytest.mark.parametrize(("low", "high"), [(-1.5, 3.0), (0.2, 5.0), (-4.0, -1.0), (0.0, 0.0)])
def test_zero_is_exact_and_the_range_is_covered(low, high):
    scale, zero = unsigned_range(low, high)
    assert scale > 0 and 0 <= zero <= 255
    # What is rounded to the zero point is exactly 0, so padding and dead units stay 0.
    assert (0 - float(zero)) * scale <= min(low, 0) + scale / 2 + 1e-6
    assert (255 - float(zero)) * scale >= max(high, 0) - scale / 2 - 1e-6


def twice() -> onnx.ModelProto:
    """`y = 2 x`."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    two = numpy_helper.from_array(np.float32(2), "two")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "two"], ["y"])], "g", value[:1], value[1:], [two])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def ranges(batches, method, **kwargs):
    return measure_ranges(
        twice(), ["x", "y"], [{"x": batch.astype(np.float32)} for batch in batches], method, **kwargs
    )


def test_minmax_sees_every_batch():
    found = ranges([np.array([-1.0, 2]), np.array([-3.0, 1])], "minmax")
    assert found == {"x": (-3.0, 2.0), "y": (-6.0, 4.0)}


def test_percentile_cuts_both_ends():
    values = np.arange(-1000, 1001) / 1000
    low, high = ranges([values, values], "percentile", percentile=90)["x"]
    assert low == pytest.approx(-0.9, abs=0.01) and high == pytest.approx(0.9, abs=0.01)


def test_least_error_drops_a_lone_outlier_but_no_even_spread():
    even = np.linspace(-1, 1, 10_001)
    low, high = ranges([even], "mse")["x"]
    assert low == pytest.approx(-1, abs=0.03) and high == pytest.approx(1, abs=0.03)
    # What the outlier costs when it is cut off, (25 - high) ** 2, against what it costs all others when it is not.
    normal = np.random.default_rng(0).standard_normal(1_000_000)
    low, high = ranges([np.append(normal, 25.0)], "mse")["x"]
    assert 6 < high < 15 and -6 < low < -3

    def error(start, end):
        scale, zero = unsigned_range(start, end)
        rounded = (np.clip(np.rint(normal / scale) + zero, 0, 255) - float(zero)) * scale
        return ((rounded - normal) ** 2).sum()

    assert error(low, high) < error(normal.min(), 25.0) / 3


def test_no_examples_and_overflow():
    with pytest.raises(FlexCompressError, match="no calibration examples"):
        ranges([], "minmax")
    with pytest.raises(FlexCompressError, match="overflows"):
        ranges([np.array([1.0, np.nan])], "mse")
