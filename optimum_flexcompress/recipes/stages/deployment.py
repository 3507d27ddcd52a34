"""The stages that make a trained model ready to serve, and measure it: export, quantize, benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .base import Stage, StageContext, register_stage


@dataclass
class ExportSettings:
    """Settings of the stage `export`.

    Attributes:
        model: The stage (or `input`) whose model is exported.
        opset: ONNX opset; the exporter's default where left out.
        fuse: Whether ONNX Runtime's transformer fusions are applied to the graph.
    """

    model: str = "distill"
    opset: int | None = None
    fuse: bool = True


@register_stage("export")
class Export(Stage):
    """Writes the model as ONNX."""

    Settings = ExportSettings
    settings: ExportSettings
    produces = "ONNX fp32"

    def inputs(self) -> list[str]:
        """See the base class."""
        return [self.settings.model]

    def describe(self) -> str:
        """See the base class."""
        return f"exporting {self.settings.model} to ONNX"

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        from ...export import export_onnx

        settings = self.settings
        export_onnx(
            context.artifact(settings.model),
            context.output,
            task=context.task.name,
            opset=settings.opset,
            fuse=settings.fuse,
        )
        return {}


@dataclass
class QuantizeSettings:
    """Settings of the stage `quantize`.

    Attributes:
        model: The stage (or `input`) whose ONNX graphs, or whose model, become int8.
        mode: "dynamic" measures activations as they come, "static" calibrates them on training examples beforehand.
        target: Instruction set to quantize for, or "auto" for this machine's.
        per_channel: One scale per output channel of a weight, rather than one for all.
        calibration_samples: How many training examples a static model is calibrated on.
    """

    model: str = "export"
    mode: Literal["dynamic", "static"] = "dynamic"
    target: str = "auto"
    per_channel: bool = True
    calibration_samples: int = 200


@dataclass
class BenchmarkSettings:
    """Settings of the stage `benchmark`.

    Attributes:
        models: The stages (or `input`) that are measured side by side.
        baseline: The one of them that the others are compared with.
    """

    models: list[str] = field(default_factory=lambda: ["finetune", "distill", "quantize"])
    baseline: str = "finetune"


@register_stage("benchmark")
class Benchmark(Stage):
    """Measures models side by side and writes the report."""

    Settings = BenchmarkSettings
    settings: BenchmarkSettings
    produces = "report"
    entry_point = "report.html"

    def inputs(self) -> list[str]:
        """See the base class."""
        return list(dict.fromkeys([*self.settings.models, self.settings.baseline]))

    def describe(self) -> str:
        """See the base class."""
        return "measuring " + ", ".join(self.settings.models)

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        from ...evaluation import run_benchmark

        settings = self.settings
        report = run_benchmark(
            {name: context.artifact(name) for name in self.inputs()},
            baseline=settings.baseline,
            task=context.task,
            data=context.data,
            output=context.output,
        )
        context.say(str(report))
        return {}


@register_stage("quantize")
class Quantize(Stage):
    """Makes the model int8 for ONNX Runtime."""

    Settings = QuantizeSettings
    settings: QuantizeSettings
    produces = "ONNX int8"

    def inputs(self) -> list[str]:
        """See the base class."""
        return [self.settings.model]

    def describe(self) -> str:
        """See the base class."""
        return f"making {self.settings.model} int8 ({self.settings.mode})"

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        raise NotImplementedError
