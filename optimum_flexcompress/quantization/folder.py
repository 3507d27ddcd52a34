"""From a model folder to an int8 folder in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..evaluation.formatting import counted
from ..export.onnx import ATOL
from ..output import check_output_folder
from .configuration import FlexORTQuantizationConfig
from .ort import FileReport, FlexORTQuantizer
from .targets import SLOW


@dataclass
class QuantizedFolder:
    """What [`quantize_folder`] wrote.

    Attributes:
        path: The folder.
        config: The settings, with the target that was chosen.
        files: What was done to each file, by name.
    """

    path: Path
    config: FlexORTQuantizationConfig
    files: dict[str, FileReport]

    def summary(self) -> str:
        """A few lines for people."""
        lines = []
        for name, file in self.files.items():
            products = file.static + file.dynamic + sum(file.fused.values())
            kind = "static" if file.static and not file.dynamic else "dynamic" if not file.static else "mixed"
            parts = [
                f"{name}: {file.bytes_before / 1e6:.1f} MB -> {file.bytes_after / 1e6:.1f} MB",
                f"{counted(products, 'int8 product')} ({kind})",
            ]
            if file.tables:
                parts.append(counted(file.tables, "int8 embedding table"))
            if file.attentions:
                parts.append(f"{counted(file.attentions, 'attention')} fused")
            if file.dropping_layers:
                parts.append(counted(file.dropping_layers, "layer drops tokens", "layers drop tokens"))
            if file.first_token_only:
                parts.append("last layer cut to the first token")
            if file.left:
                parts.append(
                    counted(file.left, "product of weights", "products of weights") + " left in single precision"
                )
            lines.append(", ".join(parts))
        if self.config.resolved_target.reduce_range:
            lines.append(SLOW)
        return "\n".join(lines)


def quantize_folder(
    model: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    mode: str = "dynamic",
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
) -> QuantizedFolder:
    """Exports a model if it is not ONNX yet, fuses its graphs and makes them int8.

    Args:
        model: A folder with a PyTorch model (compressed or stock) or with its ONNX files, or a model.
        output: The folder to write; `from_pretrained` of the matching `ORTModel` class loads it as it is.
        mode: `dynamic` or `static`.
        target: The processor: `avx2`, `avx512`, `avx512_vnni`, `arm64`, `tensorrt`, or `auto` for this machine's.
        calibration_dataset: For static mode: tokenised, unpadded examples, such as a split of
            [`Prepared.dataset`](~optimum_flexcompress.tasks.Prepared).
        num_calibration_samples: How many of them are used at most.
        task: For the export, where the model's class does not tell it.
        length_config: For the export: how many tokens each layer of the encoder keeps, see
            [`~optimum_flexcompress.export.export_onnx`]; by default, what the model carries.
        atol: For the export: largest difference to PyTorch's outputs that is accepted, see the same.
        overwrite: Whether `output` may be replaced.
        progress: Whether progress is shown.
        **options: Further fields of [`FlexORTQuantizationConfig`], such as `per_channel=False`.

    Returns:
        What was written.

    Raises:
        FlexCompressError: See [`FlexORTQuantizer.from_pretrained`] and [`FlexORTQuantizer.quantize`].
    """
    source = model if isinstance(model, str | os.PathLike) else None
    check_output_folder(output, overwrite=overwrite, source=source)
    config = FlexORTQuantizer.read_config(None, {"mode": mode, "target": target, **options})
    quantizer = FlexORTQuantizer.from_pretrained(model, task=task, length_config=length_config, atol=atol)
    path = quantizer.quantize(
        config,
        output,
        calibration_dataset=calibration_dataset,
        num_calibration_samples=num_calibration_samples,
        overwrite=overwrite,
        progress=progress,
    )
    return QuantizedFolder(path, config, quantizer.reports)
