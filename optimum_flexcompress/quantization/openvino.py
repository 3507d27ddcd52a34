"""Int8 models for OpenVINO: our export, quantized by NNCF, saved as IR."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto
from optimum.utils.save_utils import maybe_save_preprocessors
from transformers import AutoConfig, PreTrainedModel

from ..errors import FlexCompressError, MissingExtraError, nearest
from ..evaluation.formatting import counted
from ..export.fusion import FusionReport
from ..export.graph import MICROSOFT, load_model, save_model
from ..export.onnx import ATOL, export_onnx
from ..export.plain_attention import SHARED_PRODUCTS, plain_graph
from ..output import atomic_folder, check_output_folder
from ..tasks import get_task, infer_task
from . import targets
from .examples import calibration_feeds
from .saved import installed_versions, write_saved


BACKEND = "openvino"
IR_NAME = "openvino_model.xml"
WEIGHTS_NAME = "openvino_model.bin"
TARGETS = ("avx2", "avx512", "avx512_vnni")
# Of these tasks the models run once for a batch, in one file.
TASKS = (
    "feature-extraction",
    "fill-mask",
    "image-classification",
    "question-answering",
    "text-classification",
    "token-classification",
)
# What this module asks of OpenVINO's own quantization, and no other setting.
_SETTINGS = ("per_channel", "embeddings", "fuse", "calibration_method")


@dataclass
class OpenVINOFolder:
    """What [`quantize_openvino`] wrote.

    Attributes:
        path: The folder.
        target: The processor that it was made for.
        bytes_before: Size of the graph in single precision.
        bytes_after: Size of the IR.
        products: Products with int8 weights.
        report: What was done to the graph first.
    """

    path: Path
    target: targets.Target
    bytes_before: int
    bytes_after: int
    products: int
    report: FusionReport

    def summary(self) -> str:
        """A few lines for people."""
        parts = [
            f"{IR_NAME}: {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB",
            f"{counted(self.products, 'int8 product')} (static)",
        ]
        if self.report.choices:
            parts.append(counted(self.report.choices, "layer drops tokens", "layers drop tokens"))
        if self.report.first_token_only:
            parts.append("last layer cut to the first token")
        return ", ".join(parts) + (f"\n{targets.SLOW}" if self.target.reduce_range else "")


def find_target(name: str, mode: str) -> targets.Target:
    """The target of that name.

    Args:
        name: `avx2`, `avx512`, `avx512_vnni`, or `auto` for the processor of this machine.
        mode: `static`.

    Raises:
        FlexCompressError: OpenVINO has no int8 for the target or the mode.
    """
    if mode == "dynamic":
        raise FlexCompressError(
            "Dynamic int8 is hardly faster than single precision in OpenVINO: choose --mode static, and give --dataset, or "
            "--backend ort, whose dynamic int8 is."
        )
    target = targets.find_target(name, mode)
    if target.name not in TARGETS:
        raise FlexCompressError(
            f"The backend openvino makes int8 for x86 processors ({', '.join(TARGETS)}), not for {target.name}: choose "
            "another --target, or --backend ort."
        )
    return target


def import_nncf() -> Any:
    """The module `nncf`.

    Raises:
        MissingExtraError: It or OpenVINO is not installed.
    """
    for package in ("openvino", "nncf"):
        try:
            module = __import__(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise MissingExtraError(package, "openvino") from None
    return module


def quantize_openvino(
    model: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    mode: str = "static",
    target: str = "auto",
    *,
    calibration_dataset: Iterable[Mapping[str, Any]] | None = None,
    num_calibration_samples: int = 200,
    task: str | None = None,
    length_config: Any = None,
    atol: float = ATOL,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> OpenVINOFolder:
    """Exports a model if it is not ONNX yet, and makes it int8 for OpenVINO.

    Args:
        model: A folder (or Hub id) with a PyTorch model, compressed or stock; a folder with, or the file of, a model
            that [`export_onnx`] wrote in single precision, unfused; or a PyTorch model in memory.
        output: The folder to write; the `OVQuantizedModel` classes open it.
        mode: `static`. What OpenVINO has instead of calibrated ranges, int8 weights whose activations are rounded in
            groups at run time, takes one and a half times as long.
        target: The processor: `avx2`, `avx512`, `avx512_vnni`, or `auto` for this machine's.
        calibration_dataset: Tokenised, unpadded examples.
        num_calibration_samples: How many of them are used at most.
        task: What the model is for; by default, what its `config.json` says.
        length_config: For the export: how many tokens each layer of the encoder keeps; by default, what the model
            carries.
        atol: For the export: largest difference to PyTorch's outputs that is accepted, see [`export_onnx`].
        overwrite: Whether `output` may be replaced.
        progress: Whether progress is shown.
        **options: `per_channel=False` for one scale for each weight matrix, `embeddings=False` to leave embedding
            tables in single precision, `fuse=False` to leave the graph as it was exported.

    Returns:
        What was written.

    Raises:
        MissingExtraError: OpenVINO or NNCF is not installed.
        FlexCompressError: The task or the target cannot be done, examples are missing, a setting is unknown, or `output`
            cannot be written.
    """
    nncf = import_nncf()
    chosen = find_target(target, mode)
    _check_options(options)
    output = check_output_folder(output, overwrite=overwrite, source=model)
    if calibration_dataset is None:
        raise FlexCompressError(
            "Int8 for OpenVINO needs calibration examples (calibration_dataset, --dataset): give some."
        )
    with tempfile.TemporaryDirectory() as temporary:
        file, task = _exported(model, Path(temporary), task, length_config, atol)
        feeds = calibration_feeds([file], calibration_dataset, num_calibration_samples, 0, progress)[file.name]
        config = AutoConfig.from_pretrained(file.parent)
        graph, report = _prepared(file, config, options.get("fuse", True))
        plain = Path(temporary) / "plain.onnx"
        save_model(graph, plain)
        with atomic_folder(output, overwrite=overwrite) as folder:
            quantized = _quantize(nncf, plain, feeds, chosen, options, progress)
            _save(quantized, folder)
            shutil.copyfile(file.parent / "config.json", folder / "config.json")
            maybe_save_preprocessors(file.parent, folder)
            write_saved(
                folder,
                BACKEND,
                "main",
                installed_versions("optimum-flexcompress", "openvino", "nncf", "torch", "transformers"),
                [IR_NAME, WEIGHTS_NAME],
                task=task,
                mode=mode,
                target=chosen.name,
                inputs=[port.get_any_name() for port in quantized.inputs],
                outputs=[port.get_any_name() for port in quantized.outputs],
                options=options,
                samples=len(feeds),
            )
            sizes = (folder / IR_NAME).stat().st_size + (folder / WEIGHTS_NAME).stat().st_size
        return OpenVINOFolder(output, chosen, file.stat().st_size, sizes, _int8_products(quantized), report)


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _SETTINGS:
            raise FlexCompressError(f"There is no quantization setting {name!r}.{nearest(name, _SETTINGS)}")
    method = options.get("calibration_method")
    if method not in (None, "minmax"):
        raise FlexCompressError(f"OpenVINO is calibrated with minmax, not with {method!r}: leave --calibration away.")


def _exported(
    model: PreTrainedModel | str | os.PathLike, temporary: Path, task: str | None, length_config: Any, atol: float
) -> tuple[Path, str]:
    """The ONNX file in single precision, beside its configuration, and the task."""
    if isinstance(model, PreTrainedModel):
        source, onnx = None, []
        if task is None:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(temporary / "config")
            task = infer_task(temporary / "config")
    else:
        source = Path(model).expanduser()
        onnx = [source] if source.suffix == ".onnx" else sorted(source.glob("*.onnx")) if source.is_dir() else []
    name = get_task(task if task is not None else infer_task(source)).name
    if name not in TASKS:
        raise FlexCompressError(
            f"The backend openvino runs no {name} models, only {', '.join(TASKS)}: choose --backend ort, which runs them "
            "all."
        )
    if not onnx:
        (file,) = export_onnx(model, temporary / "onnx", name, length_config=length_config, atol=atol)
        return file, name
    if length_config is not None:
        raise FlexCompressError(
            "The lengths of an ONNX model are part of its graph: give the PyTorch model to choose others."
        )
    if len(onnx) > 1:
        raise FlexCompressError(
            f"{source} holds several ONNX models: name the one to quantize, for example {onnx[0]}."
        )
    return onnx[0], name


def _prepared(file: Path, config: Any, fuse: bool) -> tuple[ModelProto, FusionReport]:
    graph = load_model(file)
    kinds = {node.op_type for node in graph.graph.node}
    if any(node.domain == MICROSOFT for node in graph.graph.node) or kinds & {"QuantizeLinear", "DequantizeLinear"}:
        raise FlexCompressError(
            f"{file} is fused for ONNX Runtime or int8 already: give the PyTorch model, or an export of it in single "
            "precision without fusion."
        )
    return plain_graph(graph, config) if fuse else (graph, FusionReport())


def _quantize(
    nncf: Any, file: Path, feeds: list, target: targets.Target, options: Mapping[str, Any], progress: bool
) -> Any:
    import openvino

    graph = openvino.Core().read_model(file)
    advanced: dict[str, Any] = {}
    fix = "ENABLE" if target.reduce_range else "DISABLE"
    if not options.get("per_channel", True):
        parameters = nncf.quantization.advanced_parameters.QuantizationParameters(per_channel=False)
        advanced["weights_quantization_params"] = parameters
    with _quiet(nncf, progress):
        return nncf.quantize(
            graph,
            nncf.Dataset(feeds),
            subset_size=len(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            # Sums of maps choose tokens: rounded to 8 bits, the attention to most tokens would be 0.
            ignored_scope=nncf.IgnoredScope(
                patterns=[SHARED_PRODUCTS],
                types=[] if options.get("embeddings", True) else ["Gather"],
                validate=False,
            ),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=getattr(nncf.OverflowFix, fix), **advanced
            ),
        )


@contextlib.contextmanager
def _quiet(nncf: Any, progress: bool) -> Iterator[None]:
    """NNCF logs every node that it leaves alone, and has no switch for its progress bars."""
    logger = logging.getLogger("nncf")
    before = logger.level
    nncf.set_log_level(logging.WARNING)
    try:
        with contextlib.nullcontext() if progress else contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        nncf.set_log_level(before)


def _save(model: Any, folder: Path) -> None:
    import openvino

    # Half precision would spare nothing that counts: what is not int8 is norms and biases.
    openvino.save_model(model, folder / IR_NAME, compress_to_fp16=False)


def _int8_products(model: Any) -> int:
    """How many products have int8 weights, behind the operators that bring them back to numbers."""
    count = 0
    for node in model.get_ops():
        if node.get_type_name() == "MatMul":
            source = node.input_value(1).get_node()
            while source.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape", "Transpose"):
                source = source.input_value(0).get_node()
            count += source.get_type_name() == "Constant" and source.get_element_type().to_string() in ("i8", "u8")
    return count
