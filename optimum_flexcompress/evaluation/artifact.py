"""Opens whatever a stage produced (a PyTorch folder, an ONNX folder) as one kind of runnable thing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from ..errors import FlexCompressError, damage_explained
from ..quantization.saved import has_saved, peek_saved, read_saved
from ..tasks import get_task, has_head, infer_task
from ..tasks.base import Task, load_pretrained, set_padding
from .cost import ONNX_ENDINGS, PYTORCH_ENDINGS, weight_files


LABELS = ("labels", "start_positions", "end_positions")
# What dynamic, static and weight-only int8 leave in a graph.
INT8_OPERATORS = {
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "QEmbedLayerNormalization",
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "QuantizeLinear",
}


@dataclass
class Artifact:
    """A model that can be run, whatever runs it.

    Attributes:
        path: The folder, or the file in it, that was opened.
        task: What it is for.
        backend: `pytorch` or `onnxruntime`.
        precision: `fp32`, `bf16`, `fp16` or `int8`.
        model: The object of Transformers or Optimum.
        config: Its configuration.
        inputs: The names it accepts; None means that all are passed.
    """

    path: Path
    task: Task
    backend: str
    precision: str
    model: Any
    config: PretrainedConfig
    inputs: frozenset[str] | None = None

    @property
    def folder(self) -> Path:
        """The folder with the configuration and the processor."""
        return self.path.parent if self.path.is_file() else self.path

    def load_processor(self) -> Any:
        """The tokenizer or image processor saved beside the weights."""
        return self.task.load_processor(self.folder)

    def accepted(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of a batch that the model takes, labels left out, on the model's device."""
        return {
            name: value.to(self.model.device)
            for name, value in batch.items()
            if name not in LABELS and (self.inputs is None or name in self.inputs)
        }

    @torch.inference_mode()
    def forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """Runs the model once; this is what gets timed.

        Args:
            batch: Tensors by name; labels are not passed on.

        Returns:
            The model's own output.
        """
        return self.model(**self.accepted(batch))

    @torch.inference_mode()
    def generate(self, batch: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """Generates text.

        Args:
            batch: Tensors by name; labels are not passed on.
            **options: For `generate`, such as `max_new_tokens`.

        Returns:
            Token ids `(batch, length)`.
        """
        # What `generate` needs is not what one run of a decoder takes: an encoder-decoder gets no decoder inputs.
        names = ("input_ids", "attention_mask")
        inputs = {name: value.to(self.model.device) for name, value in batch.items() if name in names}
        return self.model.generate(**inputs, **options)

    def predict(self, batch: Mapping[str, torch.Tensor]) -> np.ndarray | tuple[np.ndarray, ...]:
        """Runs the model and takes from its output what the task's metrics read.

        Args:
            batch: Tensors by name.

        Returns:
            An array, or a tuple of arrays (start and end logits).
        """
        return to_numpy(self.outputs(batch))

    def outputs(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """What the task's metrics read of a model's output.

        Args:
            batch: Tensors by name.

        Returns:
            A tensor, or a tuple of tensors (start and end logits).
        """
        return self.task.read_output(self.forward(batch), batch)

    @property
    def torch_model(self) -> torch.nn.Module | None:
        """The PyTorch model, where this process holds one."""
        return self.model if self.backend == "pytorch" else None


def to_numpy(outputs: Any) -> Any:
    """Tensors, also in a tuple, as arrays; half precision as single, which NumPy can compute with."""
    if isinstance(outputs, tuple | list):
        return tuple(to_numpy(output) for output in outputs)
    if isinstance(outputs, torch.Tensor):
        return (outputs.float() if outputs.is_floating_point() else outputs).cpu().numpy()
    return np.asarray(outputs)


def open_artifact(
    path: str | os.PathLike, task: str | Task | None = None, *, threads: int | None = None, **options: Any
) -> Artifact:
    """Opens a model folder.

    Args:
        path: A folder that `save_pretrained` wrote, a folder of ONNX files with their `config.json`, or one `.onnx`
            file in such a folder (needed where the folder holds several models).
        task: A task or its name; None reads it from the configuration.
        threads: Threads of an ONNX Runtime session (PyTorch's are set by `torch.set_num_threads`); None leaves the
            choice to the runtime.
        **options: For the loader, such as `attn_implementation="eager"` or `dtype=torch.bfloat16`.

    Returns:
        The artifact.

    Raises:
        FlexCompressError: It is no model, or the folder holds more than one.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FlexCompressError(f"There is no model {path}: check the path.")
    task = get_task(task if task is not None else infer_task(path))
    return BACKENDS[find_backend(path)](path, task, threads, options)


def find_backend(path: str | os.PathLike) -> str:
    """Which runtime a model is for.

    Args:
        path: A folder or a file in one.

    Returns:
        A key of `BACKENDS`.

    Raises:
        FlexCompressError: It holds no weights, or weights for more than one runtime.
    """
    path = Path(path)
    if has_saved(folder := path.parent if path.is_file() else path):
        backend = peek_saved(folder).backend
        if backend not in BACKENDS:
            raise FlexCompressError(
                f"{path} is for the backend {backend}, which this version does not know: upgrade optimum-flexcompress."
            )
        return backend
    files = [path] if path.is_file() else weight_files(path)
    found = {
        backend
        for backend, endings in {"onnxruntime": ONNX_ENDINGS, "pytorch": PYTORCH_ENDINGS}.items()
        if any(file.name.endswith(endings) for file in files)
    }
    if len(found) == 2:
        onnx = next(file.name for file in files if file.name.endswith(".onnx"))
        raise FlexCompressError(
            f"{path} holds both PyTorch and ONNX weights: name the one to use, for example {path / onnx}, or keep "
            "them in folders of their own."
        )
    if not found:
        raise FlexCompressError(
            f"{path} is no model folder: it holds neither PyTorch nor ONNX weights; give the folder that has them."
        )
    return found.pop()


def _open_pytorch(path: Path, task: Task, threads: int | None, options: dict[str, Any]) -> Artifact:
    folder = path.parent if path.is_file() else path
    return model_artifact(_load_with_head(folder, task, options), task, path)


def _load_with_head(folder: Path, task: Task, options: dict[str, Any]) -> Any:
    """A PyTorch model in evaluation mode, refused where Transformers would make its head up.

    Raises:
        FlexCompressError: It has no head for the task.
    """
    config = load_pretrained(AutoConfig, folder)
    # Vectors need no head.
    if task.name == "feature-extraction" or has_head(task.auto_class, config):
        return task.load_model(folder, **options).eval()
    # Saved by another class, which may have a head of the same names all the same (BertForPreTraining).
    model, found = load_pretrained(task.auto_class, folder, output_loading_info=True, **options)
    if found["missing_keys"]:
        raise FlexCompressError(
            f"{folder} has no head for {task.name} (it is a {' or '.join(config.architectures or ['bare model'])}): "
            "fine-tune it first, or give --task feature-extraction."
        )
    set_padding(model)
    return model.eval()


def model_artifact(model: Any, task: Task, path: str | os.PathLike = "model") -> Artifact:
    """A PyTorch model in memory as an artifact.

    Args:
        model: The model, in evaluation mode.
        task: What it is for.
        path: Where it came from, or a name for it.
    """
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, str(model.dtype))
    return Artifact(Path(path), task, "pytorch", dtype, model, model.config, _forward_arguments(model))


def _open_torchao(path: Path, task: Task, threads: int | None, options: dict[str, Any]) -> Artifact:
    folder = path.parent if path.is_file() else path
    read_saved(folder, "torchao")
    model = _load_with_head(folder, task, options)
    return Artifact(path, task, "torchao", "int8", model, model.config, _forward_arguments(model))


def _forward_arguments(model: torch.nn.Module) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(model.forward).parameters)


def _open_ipex(path: Path, task: Task, threads: int | None, options: dict[str, Any]) -> Artifact:
    from ..modeling_ipex import IPEXQuantizedModel

    folder = path.parent if path.is_file() else path
    # It runs with the threads of PyTorch.
    model = load_pretrained(IPEXQuantizedModel.class_for(task.name), folder, **options)
    return Artifact(path, task, "ipex", "int8", model, model.config, frozenset(model.input_names))


def _open_onnx(path: Path, task: Task, threads: int | None, options: dict[str, Any]) -> Artifact:
    from onnxruntime import SessionOptions

    folder = path.parent if path.is_file() else path
    session_options = SessionOptions()
    if threads is not None:
        session_options.intra_op_num_threads = threads
    graphs = [file for file in weight_files(folder) if file.suffix == ".onnx"]
    if path.is_file():
        options = {"file_name": path.name, **options}
        graphs = [path]
    elif not task.generation and task.name != "text-generation" and len(graphs) > 1:
        raise FlexCompressError(
            f"{folder} holds several ONNX models ({', '.join(file.name for file in graphs)}): name the one to open, "
            f"for example {graphs[0]}."
        )
    with damage_explained(graphs[0] if len(graphs) == 1 else folder):
        model = load_pretrained(task.ort_class, folder, session_options=session_options, **options)
    set_padding(model)
    names = getattr(model, "input_names", None)
    inputs = frozenset(names) if names and not task.generation and task.name != "text-generation" else None
    precision = "int8" if any(is_int8(graph) for graph in graphs) else _float_type(graphs[0])
    return Artifact(path, task, "onnxruntime", precision, model, model.config, inputs)


def _open_openvino(path: Path, task: Task, threads: int | None, options: dict[str, Any]) -> Artifact:
    from ..modeling_openvino import OVQuantizedModel

    folder = path.parent if path.is_file() else path
    model = load_pretrained(OVQuantizedModel.class_for(task.name), folder, threads=threads, **options)
    return Artifact(path, task, "openvino", "int8", model, model.config, frozenset(model.input_names))


def is_int8(graph: str | os.PathLike) -> bool:
    """Whether an ONNX file computes or stores weights in int8."""
    import onnx

    def operators(nodes: Any) -> set[str]:
        found = {node.op_type for node in nodes}
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    found |= operators(attribute.g.node)
        return found

    return bool(operators(onnx.load(str(graph), load_external_data=False).graph.node) & INT8_OPERATORS)


def _float_type(graph: Path) -> str:
    import onnx

    names = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    initializers = onnx.load(str(graph), load_external_data=False).graph.initializer
    return next((names[tensor.data_type] for tensor in initializers if tensor.data_type in names), "fp32")


# Later runtimes join here: a function that opens a path, and the endings of its files in `cost.py`.
BACKENDS: dict[str, Callable[[Path, Task, int | None, dict[str, Any]], Artifact]] = {
    "ipex": _open_ipex,
    "onnxruntime": _open_onnx,
    "openvino": _open_openvino,
    "pytorch": _open_pytorch,
    "torchao": _open_torchao,
}
