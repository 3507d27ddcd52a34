"""Runs ONNX graphs on made-up inputs, to learn what their tensors hold and to compare two graphs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import ModelProto, TensorProto
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

from .graph import EXTERNAL_DATA_BYTES


Feeds = dict[str, np.ndarray]
# Small and all different, so that no two axes of a tensor are mistaken for each other.
_SIZES = {
    "batch_size": 2,
    "sequence_length": 7,
    "encoder_sequence_length": 11,
    "decoder_sequence_length": 5,
    "past_sequence_length": 3,
    "past_decoder_sequence_length": 3,
    "num_channels": 3,
}


def open_session(model: ModelProto | str | os.PathLike, optimize: bool = True, threads: int = 0) -> InferenceSession:
    """Opens a model on the CPU.

    Args:
        model: The model, or its file.
        optimize: Whether ONNX Runtime may optimise the graph.
        threads: Threads within an operator; 0 leaves the choice to ONNX Runtime.
    """
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, ModelProto) else os.fspath(model)
    return InferenceSession(source, options, providers=["CPUExecutionProvider"])


def can_probe(model: ModelProto) -> bool:
    """Whether a model is small enough to be opened from memory."""
    return model.ByteSize() < EXTERNAL_DATA_BYTES


def made_up_feeds(
    model: ModelProto,
    seed: int = 0,
    scale: int = 1,
    image_size: int = 224,
    vocabulary: int = 8,
    end_token: int | None = None,
    length: int | None = None,
) -> Feeds:
    """Inputs that a model accepts: random token ids and numbers, and masks with padding on the right.

    Args:
        model: The model, whose symbolic axes have the names that Optimum gives them.
        seed: Of the random numbers.
        scale: Multiplies the lengths, not the image size.
        image_size: Height and width of images.
        vocabulary: Token ids are below this.
        end_token: A token that every row holds once: heads of encoder-decoders read the last one.
        length: Of all sequences, instead of sizes of their own.

    Returns:
        One array for each input.
    """
    rng = np.random.default_rng(seed)
    initializers = {tensor.name for tensor in model.graph.initializer}
    feeds: Feeds = {}
    for value in model.graph.input:
        if value.name in initializers:
            continue
        kind = value.type.tensor_type.elem_type
        shape = [
            axis.dim_value if axis.HasField("dim_value") else _axis_size(axis.dim_param, scale, image_size, length)
            for axis in value.type.tensor_type.shape.dim
        ]
        if kind == TensorProto.BOOL:
            # The switch of a merged decoder: take the branch that reads the cache.
            feeds[value.name] = np.ones(shape, bool)
        elif kind in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
            feeds[value.name] = rng.standard_normal(shape).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
        elif "mask" in value.name:
            mask = np.ones(shape, np.int64)
            if len(shape) == 2 and shape[1] > 2:
                for row in range(1, shape[0]):
                    mask[row, shape[1] - 1 - row % (shape[1] - 2) :] = 0
            feeds[value.name] = mask
        elif "type_ids" in value.name:
            feeds[value.name] = np.zeros(shape, np.int64)
        elif "position" in value.name:
            feeds[value.name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(np.int64)
        else:
            ids = rng.integers(0, vocabulary, shape)
            if end_token is not None and len(shape) == 2:
                ids[ids == end_token] = (end_token + 1) % vocabulary
                ids[:, 0] = end_token
            feeds[value.name] = ids
    return feeds


def _axis_size(name: str, scale: int, image_size: int, length: int | None) -> int:
    """The size of a symbolic axis; names such as `past_sequence_length + sequence_length` are sums."""
    total = 0
    for part in name.split("+"):
        part = part.strip()
        if part.isdigit():
            total += int(part)
        elif part in ("height", "width"):
            total += image_size
        elif "sequence" in part:
            total += length or _SIZES.get(part, 7) * scale
        else:
            total += _SIZES.get(part, 2)
    return total


def values_of(model: ModelProto, tensors: Iterable[str], feeds: Iterable[Feeds]) -> list[dict[str, np.ndarray]]:
    """Runs a model and returns inner tensors.

    Args:
        model: The model; unchanged.
        tensors: Names of tensors of its main graph.
        feeds: The inputs of each run.

    Returns:
        For each run the values, by name.
    """
    tensors = list(dict.fromkeys(tensors))
    probe = ModelProto()
    probe.CopyFrom(model)
    known = {value.name for value in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    session = open_session(probe, optimize=False)
    return [dict(zip(tensors, session.run(tensors, inputs))) for inputs in feeds]


class Reference:
    """What a model computes, to compare rewritten versions of it with.

    Args:
        model: The model.
        feeds: The inputs of each run.
    """

    def __init__(self, model: ModelProto, feeds: Iterable[Feeds]):
        self.feeds = list(feeds)
        session = open_session(model)
        self.outputs = [session.run(None, inputs) for inputs in self.feeds]

    def difference(self, model: ModelProto) -> float:
        """Largest difference of any output, relative to the largest magnitude of that output, at least 1."""
        session = open_session(model)
        worst = 0.0
        for inputs, expected in zip(self.feeds, self.outputs):
            for ours, theirs in zip(session.run(None, inputs), expected):
                if ours.shape != theirs.shape or not np.isfinite(ours).all():
                    return float("inf")
                if ours.size:
                    scale = max(1.0, float(np.abs(theirs).max()))
                    worst = max(worst, float(np.abs(ours - theirs).max()) / scale)
        return worst


def largest_difference(model: ModelProto, reference: ModelProto, feeds: Iterable[Feeds]) -> float:
    """See [`Reference.difference`]."""
    return Reference(reference, feeds).difference(model)


def same_constant(values: Iterable[Mapping[str, np.ndarray]], name: str) -> float | None:
    """The number that the tensor `name` held in every run, or None if it is no single number."""
    found = {float(run[name].reshape(-1)[0]) if run[name].size == 1 else None for run in values}
    return found.pop() if len(found) == 1 else None
