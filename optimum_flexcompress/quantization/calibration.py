"""Measures the ranges of activations that static int8 rounds with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import ModelProto
from onnxruntime import InferenceSession
from tqdm.auto import tqdm

from ..errors import FlexCompressError
from ..export.probe import Feeds, can_probe, open_session


Range = tuple[float, float]
BINS = 2048
# Fractions of the measured range that `mse` tries.
_FRACTIONS = np.linspace(1.0, 0.2, 41)


def measure_ranges(
    model: ModelProto,
    tensors: Iterable[str],
    feeds: Sequence[Feeds],
    method: str = "mse",
    percentile: float = 99.99,
    progress: str | None = None,
    symmetric: bool = False,
) -> dict[str, Range]:
    """Runs a model on examples and finds a range for each of its tensors.

    Args:
        model: The model in single precision; unchanged.
        tensors: Names of tensors of its main graph.
        feeds: One batch of inputs after the other. Feed examples unpadded: what a model computes for padding widens
            the ranges for nothing.
        method: `minmax` keeps the whole range, `percentile` the middle `percentile` of the values, `mse` what gives
            the smallest squared error when rounded to 256 levels.
        percentile: In percent.
        progress: The text of a progress bar; None shows none.
        symmetric: Whether numbers are going to be rounded to as many levels below zero as above it, which matters to
            `mse`.

    Returns:
        `(low, high)` for each tensor.

    Raises:
        FlexCompressError: There are no examples, or a range is not finite.
    """
    tensors = list(dict.fromkeys(tensors))
    if not feeds:
        raise FlexCompressError("There are no calibration examples: give a data set with at least one row.")
    if not can_probe(model):
        raise FlexCompressError("The model has more than 2 GB: quantize it dynamically, which needs no calibration.")
    session = _session(model, tensors)
    passes = 1 if method == "minmax" else 2
    bar = tqdm(total=passes * len(feeds), desc=progress, disable=progress is None, leave=False)
    with bar:
        low, high = _extremes(session, tensors, feeds, bar)
        for name in tensors:
            if not (np.isfinite(low[name]) and np.isfinite(high[name])):
                raise FlexCompressError(
                    f"The calibration examples give {low[name]}..{high[name]} in {name}: the model overflows on them; "
                    "check its weights and the examples."
                )
        if method == "minmax":
            return {name: (low[name], high[name]) for name in tensors}
        histograms = _histograms(session, tensors, feeds, low, high, bar)
    return {
        name: range_of(histograms[name], (low[name], high[name]), method, percentile, symmetric) for name in tensors
    }


def range_of(
    counts: np.ndarray, extremes: Range, method: str, percentile: float = 99.99, symmetric: bool = False
) -> Range:
    """The range to round a tensor with.

    Args:
        counts: Histogram of its values over evenly spaced bins.
        extremes: Where the bins start and end.
        method: `percentile` or `mse`, as for [`measure_ranges`].
        percentile: Likewise.
        symmetric: Likewise.
    """
    edges = np.linspace(*extremes, len(counts) + 1)
    if method == "percentile":
        return _percentile_range(counts, edges, percentile)
    return _least_symmetric_error_range(counts, edges) if symmetric else _least_error_range(counts, edges)


def _session(model: ModelProto, tensors: list[str]) -> InferenceSession:
    probe = ModelProto()
    probe.CopyFrom(model)
    known = {value.name for value in probe.graph.output} | {value.name for value in probe.graph.input}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    return open_session(probe)


def _runs(session: InferenceSession, tensors: list[str], feeds: Sequence[Feeds], bar: tqdm):
    inputs = {value.name for value in session.get_inputs()}
    computed = [name for name in tensors if name not in inputs]
    for batch in feeds:
        values = dict(zip(computed, session.run(computed, batch)))
        for name in tensors:
            yield name, values[name] if name in values else batch[name]
        bar.update()


def _extremes(session, tensors, feeds, bar) -> tuple[dict[str, float], dict[str, float]]:
    low, high = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)
    for name, value in _runs(session, tensors, feeds, bar):
        if value.size:
            # np.minimum, unlike min(), lets a nan through.
            low[name] = float(np.minimum(low[name], value.min()))
            high[name] = float(np.maximum(high[name], value.max()))
    return low, high


def _histograms(session, tensors, feeds, low: Mapping[str, float], high: Mapping[str, float], bar):
    counts = {name: np.zeros(BINS, np.int64) for name in tensors}
    for name, value in _runs(session, tensors, feeds, bar):
        counts[name] += np.histogram(value, BINS, (low[name], high[name]))[0]
    return counts


def _percentile_range(counts: np.ndarray, edges: np.ndarray, percentile: float) -> Range:
    share = np.concatenate(([0.0], counts.cumsum() / max(counts.sum(), 1)))
    outside = (1 - percentile / 100) / 2
    low = edges[np.searchsorted(share, outside, side="right") - 1]
    high = edges[np.searchsorted(share, 1 - outside, side="left")]
    return min(float(low), 0.0), max(float(high), 0.0)


def _least_error_range(counts: np.ndarray, edges: np.ndarray) -> Range:
    """Shrinks both ends, one after the other, to where rounding to 256 levels costs least."""
    centers = (edges[:-1] + edges[1:]) / 2
    low, high = float(edges[0]), float(edges[-1])

    def error(start: float, end: float) -> float:
        step = (end - start) / 255
        if step == 0:
            return float("inf")
        zero = np.rint(-start / step)
        rounded = (np.clip(np.rint(centers / step) + zero, 0, 255) - zero) * step
        return float((counts * (rounded - centers) ** 2).sum())

    for _ in range(2):
        high = min((edges[-1] * fraction for fraction in _FRACTIONS), key=lambda end: error(low, end))
        low = min((edges[0] * fraction for fraction in _FRACTIONS), key=lambda start: error(start, high))
    return float(low), float(high)


def _least_symmetric_error_range(counts: np.ndarray, edges: np.ndarray) -> Range:
    """Shrinks the range around zero to where rounding to 127 levels on either side costs least."""
    centers = (edges[:-1] + edges[1:]) / 2
    bound = float(np.abs(edges).max())

    def error(end: float) -> float:
        if end == 0:
            return float("inf")
        rounded = np.clip(np.rint(centers / end * 127), -127, 127) * end / 127
        return float((counts * (rounded - centers) ** 2).sum())

    end = float(min((bound * fraction for fraction in _FRACTIONS), key=error))
    return -end, end
