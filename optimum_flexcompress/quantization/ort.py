"""Int8 models for ONNX Runtime."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import ModelProto
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorsData
from optimum.onnxruntime import ORTModel, ORTQuantizer
from optimum.onnxruntime.configuration import ORTConfig, QuantizationConfig
from optimum.utils.save_utils import maybe_save_preprocessors
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..errors import FlexCompressError, nearest
from ..export.fusion import FusionReport, fuse_graph
from ..export.graph import load_model, save_model
from ..export.onnx import ATOL, DECODER, DECODER_MERGED, DECODER_WITH_PAST, export_onnx
from ..export.short_attention import choose_attention_by_size
from ..output import atomic_folder
from .calibration import Range, measure_ranges
from .configuration import FlexORTQuantizationConfig
from .examples import calibration_feeds
from .fused import quantize_fused_operators
from .integer import IntegerOptions, products_left, products_of, quantize_integer


logger = logging.getLogger(__name__)

REPORT_NAME = "quantization_report.json"


@dataclass
class FileReport:
    """What was done to one ONNX file.

    Attributes:
        static: Products whose activations are rounded with calibrated ranges.
        dynamic: Products whose activations are rounded with ranges taken at run time.
        left: Products of weights that stay in single precision.
        tables: Int8 embedding tables.
        fused: Operators fused by ONNX Runtime's optimizer that became int8, by type.
        attentions: Attentions that were fused.
        attentions_left: Attentions that were not, and why.
        attentions_by_size: Attentions with two kernels, the one that runs being chosen by the size of the input.
        first_token_only: Whether the last layer was cut to the token that the head reads.
        dropping_layers: Layers that drop tokens and were fused as well.
        bytes_before: Size of the file in single precision.
        bytes_after: Size of the int8 file.
    """

    static: int = 0
    dynamic: int = 0
    left: int = 0
    tables: int = 0
    fused: dict[str, int] = field(default_factory=dict)
    attentions: int = 0
    attentions_left: dict[str, str] = field(default_factory=dict)
    attentions_by_size: int = 0
    first_token_only: bool = False
    dropping_layers: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


class FlexORTQuantizer(ORTQuantizer):
    """Makes ONNX models int8: whole folders, fused graphs, embedding tables, encoder-decoders.

    It does what [`~optimum.onnxruntime.ORTQuantizer`] does, and also takes models that are not exported yet, graphs
    that ONNX Runtime's transformer optimizer has fused, and all files of an encoder-decoder in one call. Static mode
    calibrates the un-merged decoder pair on what the model generates itself.

    Example:
    ```python
    >>> from optimum_flexcompress import FlexORTQuantizer
    >>> quantizer = FlexORTQuantizer.from_pretrained("compressed-model")
    >>> quantizer.quantize(save_dir="int8")
    >>> model = ORTModelForSequenceClassification.from_pretrained("int8")
    ```

    Args:
        onnx_model_path: The first of the files.
        config: The model's configuration; read from the folder when not given.
        files: All files; only the first when not given.
    """

    def __init__(
        self, onnx_model_path: Path, config: PretrainedConfig | None = None, files: Sequence[Path] | None = None
    ):
        super().__init__(Path(onnx_model_path), config)
        self.files = [Path(file) for file in files] if files else [self.onnx_model_path]
        self._exported: tempfile.TemporaryDirectory | None = None
        self.reports: dict[str, FileReport] = {}

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: ORTModel | PreTrainedModel | str | os.PathLike,
        file_name: str | None = None,
        task: str | None = None,
        processor: Any = None,
        length_config: Any = None,
        atol: float = ATOL,
    ) -> FlexORTQuantizer:
        """Opens what is to be quantized.

        Args:
            model_or_path: A folder of ONNX files, one ONNX file, a folder (or Hub id) with a PyTorch model, which is
                exported first, a PyTorch model, or an `ORTModel`.
            file_name: One file of the folder; by default all of them.
            task: For the export, where the model's class does not tell it.
            processor: For the export of a model in memory: its tokenizer or image processor, to be saved beside.
            length_config: For the export: how many tokens each layer keeps, see [`export_onnx`]; by default, what the
                model carries.
            atol: For the export: largest difference to PyTorch's outputs that is accepted, see [`export_onnx`].

        Raises:
            FlexCompressError: There is no model, it cannot be exported, or it is ONNX already and lengths are given.
        """
        if isinstance(model_or_path, ORTModel):
            _check_no_lengths(length_config)
            return cls._from_ort_model(model_or_path)
        if not isinstance(model_or_path, PreTrainedModel):
            path = Path(model_or_path).expanduser()
            if path.is_file() and path.suffix == ".onnx":
                _check_no_lengths(length_config)
                return cls(path)
            files = sorted(path.glob("*.onnx")) if path.is_dir() else []
            if file_name is not None:
                files = [file for file in files if file.name == file_name]
                if not files:
                    raise FlexCompressError(f"{path} holds no file {file_name}: check the name.")
            if files:
                _check_no_lengths(length_config)
                return cls(files[0], files=files)
        exported = tempfile.TemporaryDirectory(prefix="flexcompress-export-")
        files = export_onnx(
            model_or_path,
            Path(exported.name) / "model",
            task=task,
            processor=processor,
            length_config=length_config,
            atol=atol,
        )
        quantizer = cls(files[0], files=files)
        # Removed with the quantizer.
        quantizer._exported = exported
        return quantizer

    @classmethod
    def _from_ort_model(cls, model: ORTModel) -> FlexORTQuantizer:
        parts = getattr(model, "parts", None) or [model]
        files = [Path(part.session._model_path) for part in parts]
        return cls(files[0], model.config, files)

    def quantize(
        self,
        quantization_config: FlexORTQuantizationConfig | QuantizationConfig | None = None,
        save_dir: str | os.PathLike | None = None,
        file_suffix: str | None = None,
        calibration_tensors_range: Mapping[str, Any] | TensorsData | None = None,
        *,
        calibration_dataset: Iterable[Mapping[str, Any]] | None = None,
        num_calibration_samples: int = 200,
        new_tokens: int = 16,
        overwrite: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> Path:
        """Writes the int8 model.

        Args:
            quantization_config: How; one of Optimum's configurations is taken over as far as possible.
            save_dir: The folder to write. It holds the int8 files, the configuration, the tokenizer or image processor
                and `quantization_report.json`, and loads in the `ORTModel` classes that load the original.
            file_suffix: Put behind the names of the files, as in `model_quantized.onnx`; by default they keep their
                names, under which `from_pretrained` finds them by itself.
            calibration_tensors_range: Ranges for static mode, by tensor name, where they have been measured already.
            calibration_dataset: For static mode: examples, one mapping for each, such as the rows of a tokenised
                `datasets.Dataset`; unpadded. Columns that the model does not take are ignored.
            num_calibration_samples: How many examples are used at most.
            new_tokens: How many tokens a model with a decoder generates for each example.
            overwrite: Whether `save_dir` may be replaced.
            progress: Whether progress is shown.
            **options: Instead of `quantization_config`: the fields of [`FlexORTQuantizationConfig`], such as
                `mode="static"` or `target="avx2"`.

        Returns:
            `save_dir`.

        Raises:
            FlexCompressError: Static mode without examples, or on a merged decoder whose pair is missing; a setting is
                unknown; nothing in the model can be made int8; or `save_dir` cannot be written.
        """
        config = self.read_config(quantization_config, options)
        if save_dir is None:
            raise FlexCompressError("quantize() needs save_dir, the folder to write.")
        files = self._files_for(config)
        feeds: dict[str, list] = {}
        if config.is_static and calibration_tensors_range is None:
            if calibration_dataset is None:
                raise FlexCompressError(
                    "Static quantization needs calibration examples (calibration_dataset, --dataset): give some, or "
                    "choose dynamic."
                )
            feeds = calibration_feeds(files, calibration_dataset, num_calibration_samples, new_tokens, progress)
        with atomic_folder(save_dir, overwrite=overwrite) as folder:
            self.reports = {}
            for file in files:
                ranges = _ranges_of(calibration_tensors_range, file.name)
                model, report = self._quantize_file(file, config, feeds.get(file.name), ranges, progress)
                suffix = f"_{file_suffix}" if file_suffix else ""
                target = folder / f"{file.stem}{suffix}.onnx"
                save_model(model, target)
                report.bytes_before, report.bytes_after = _file_bytes(file), _file_bytes(target)
                self.reports[target.name] = report
            self._save_beside(folder, config)
        return Path(save_dir)

    @staticmethod
    def read_config(
        config: FlexORTQuantizationConfig | QuantizationConfig | None, options: Mapping[str, Any]
    ) -> FlexORTQuantizationConfig:
        """The settings of [`quantize`], from a configuration or from its fields.

        Raises:
            FlexCompressError: Both are given, or a field or its value is not known.
        """
        if config is None:
            known = FlexORTQuantizationConfig.__dataclass_fields__
            for name in options:
                if name not in known:
                    raise FlexCompressError(f"There is no quantization setting {name!r}.{nearest(name, known)}")
            return FlexORTQuantizationConfig(**options)
        if options:
            raise FlexCompressError(
                f"quantize() got a configuration and also {', '.join(options)}: put them into the configuration."
            )
        return FlexORTQuantizationConfig.from_optimum(config) if isinstance(config, QuantizationConfig) else config

    def _files_for(self, config: FlexORTQuantizationConfig) -> list[Path]:
        """The files to write: of a decoder that is there both merged and as a pair, the form that the mode can use."""
        by_name = {file.name: file for file in self.files}
        pair = {DECODER, DECODER_WITH_PAST} & by_name.keys()
        if DECODER_MERGED not in by_name:
            return self.files
        if not config.is_static:
            return [file for name, file in by_name.items() if name not in pair]
        if len(pair) < 2:
            raise FlexCompressError(
                f"{DECODER_MERGED} cannot be quantized statically, since ranges cannot be measured inside its branches: "
                f"export the model again, with {DECODER} and {DECODER_WITH_PAST}, or choose dynamic."
            )
        return [file for name, file in by_name.items() if name != DECODER_MERGED]

    def _quantize_file(
        self,
        file: Path,
        config: FlexORTQuantizationConfig,
        feeds: list | None,
        ranges: dict[str, Range] | None,
        progress: bool,
    ) -> tuple[ModelProto, FileReport]:
        model, fusion = load_model(file), FusionReport()
        target = config.resolved_target
        if config.is_static and any(node.op_type == "If" for node in model.graph.node):
            raise FlexCompressError(f"{file.name} holds branches, which cannot be calibrated: choose dynamic.")
        if config.fuse and not target.qdq:
            model, fusion = fuse_graph(model, self.config)
        exclude = frozenset(config.exclude)
        options = IntegerOptions(
            per_channel=config.per_channel,
            reduce_range=bool(config.reduce_range),
            # A lookup is not what TensorRT spends its time on, and it keeps tables in half precision by itself.
            embeddings=config.embeddings and not target.qdq,
            pairs=target.qdq,
            exclude=exclude,
        )
        if feeds is not None:
            ranges = measure_ranges(
                model,
                products_of(model, options).values(),
                feeds,
                config.calibration_method,
                config.percentile,
                f"Calibrating {file.stem}" if progress else None,
                symmetric=target.symmetric,
            )
        fused: dict[str, int] = {}
        if not target.qdq:
            model, fused = quantize_fused_operators(model, config.per_channel, options.reduce_range, exclude)
        counts = quantize_integer(model, options, ranges)
        if not any(counts.values()) and not fused:
            raise FlexCompressError(
                f"{file.name} has no product of single-precision weights to make int8: it may be int8 already; give the "
                "model in single precision."
            )
        by_size = 0
        if config.fuse and not target.qdq:
            model, by_size = choose_attention_by_size(model)
        logger.info("%s: %s", file.name, counts)
        return model, FileReport(
            **counts,
            left=products_left(model.graph),
            fused=fused,
            attentions=len(fusion.attentions),
            attentions_left=fusion.left,
            attentions_by_size=by_size,
            first_token_only=fusion.first_token_only,
            dropping_layers=fusion.choices,
        )

    def _save_beside(self, folder: Path, config: FlexORTQuantizationConfig) -> None:
        source = self.onnx_model_path.parent
        ORTConfig(quantization=config.to_optimum()).save_pretrained(folder)
        if self.config is not None:
            self.config.save_pretrained(folder)
        if (source / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source).save_pretrained(folder)
        maybe_save_preprocessors(source, folder)
        report = {
            "settings": config.to_dict(),
            "files": {name: vars(report) for name, report in self.reports.items()},
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _check_no_lengths(length_config: Any) -> None:
    if length_config is not None:
        raise FlexCompressError(
            "The lengths of an ONNX model are part of its graph: give the PyTorch model to choose others."
        )


def _ranges_of(ranges: Mapping[str, Any] | TensorsData | None, file_name: str) -> dict[str, Range] | None:
    """Plain ranges from what `fit()` of Optimum's quantizer returns, or from a mapping, also one for each file."""
    if ranges is None:
        return None
    if isinstance(ranges, TensorsData):
        if ranges.calibration_method != CalibrationMethod.MinMax:
            logger.info("Using the clipped ranges of the calibration.")
        return {name: tuple(float(value) for value in data.range_value) for name, data in ranges.items()}
    if file_name in ranges:
        ranges = ranges[file_name]
    return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}


def _file_bytes(file: Path) -> int:
    data = file.with_name(file.name + "_data")
    return file.stat().st_size + (data.stat().st_size if data.is_file() else 0)
