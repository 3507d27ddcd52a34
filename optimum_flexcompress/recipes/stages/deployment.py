"""The stages that make a trained model ready to serve, and measure it: export, quantize, benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...errors import FlexCompressError
from ...evaluation.limits import check_threads, check_timing
from ...token_dropping import FULL
from .base import Stage, StageContext, model_of, register_stage
from .lengths import Pick
from .training import load_config


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ExportSettings:
    """Settings of the stage `export`.

    Attributes:
        model: The stage (or `input`) whose model is exported.
        lengths: How many tokens each layer of the encoder keeps: the stage `pick` that chose, a list of counts or
            fractions, or "full"; what the model carries where left out.
        opset: ONNX opset; the exporter's default where left out.
        fuse: Whether ONNX Runtime's transformer fusions are applied to the graph.
    """

    model: str = "distill"
    lengths: str | list[Any] | None = None
    opset: int | None = None
    fuse: bool = True


class _WithLengths(Stage):
    """What the stages share that write a graph: its lengths are part of it."""

    def inputs(self) -> list[str]:
        """See the base class."""
        return [self.settings.model, *([self._pick] if self._pick else [])]

    @property
    def _pick(self) -> str | None:
        """The stage that chooses the lengths."""
        lengths = self.settings.lengths
        return lengths if isinstance(lengths, str) and lengths != FULL else None

    def check_sources(self, stages: Mapping[str, Stage]) -> None:
        """See the base class."""
        if self._pick is not None and not isinstance(stages.get(self._pick), Pick):
            raise FlexCompressError(
                f'lengths names "{self._pick}", which is no stage of the type pick: name one, give a list, or "{FULL}".'
            )

    def _check_lengths(self, model: PreTrainedModel) -> None:
        from ...architectures import describe
        from ...token_dropping import LengthConfig, check_lengths, dropping_stack

        if self._pick is not None:
            dropping_stack(describe(model))
        elif self.settings.lengths is not None:
            lengths = LengthConfig.parse(self.settings.lengths)
            if lengths is not None:
                check_lengths(model, lengths)

    @property
    def _shown_lengths(self) -> str:
        lengths = self.settings.lengths
        return f", lengths {lengths}" if lengths is not None else ""

    def _lengths(self, context: StageContext) -> Any:
        from ...search import Front

        if self._pick is None:
            return self.settings.lengths
        return Front.load(context.artifact(self._pick)).picked.lengths


@register_stage("export")
class Export(_WithLengths):
    """Writes the model as ONNX."""

    Settings = ExportSettings
    settings: ExportSettings
    produces = "ONNX fp32"

    def describe(self) -> str:
        """See the base class."""
        return f"exporting {self.settings.model} to ONNX{self._shown_lengths}"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> None:
        """Looks whether there is going to be a model to export, and at its lengths."""
        self._check_lengths(model_of(models, self.settings.model))

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
            length_config=self._lengths(context),
        )
        return {}


@dataclass
class QuantizeSettings:
    """Settings of the stage `quantize`.

    Attributes:
        model: The stage (or `input`) whose ONNX files, or whose model, become int8.
        lengths: As in the stage `export`; not with ONNX files, which have theirs already.
        mode: "dynamic" measures activations as they come, "static" calibrates them on training examples beforehand.
        target: Processor to quantize for, or "auto" for this machine's.
        per_channel: One scale per output feature of a weight, rather than one for all.
        calibration_samples: How many training examples a static model is calibrated on.
        options: Any other field of `FlexORTQuantizationConfig`.
    """

    model: str = "export"
    lengths: str | list[Any] | None = None
    mode: Literal["dynamic", "static"] = "dynamic"
    target: str = "auto"
    per_channel: bool = True
    calibration_samples: int = 200
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.calibration_samples < 1:
            raise FlexCompressError(f"calibration_samples must be at least 1, not {self.calibration_samples}.")


@register_stage("quantize")
class Quantize(_WithLengths):
    """Makes the model int8 for ONNX Runtime."""

    Settings = QuantizeSettings
    settings: QuantizeSettings
    produces = "ONNX int8"

    def describe(self) -> str:
        """See the base class."""
        return f"making {self.settings.model} int8 ({self.settings.mode}{self._shown_lengths})"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> None:
        """Looks at the target, the options and the lengths."""
        from ...quantization import FlexORTQuantizer

        if self.settings.lengths is not None:
            self._check_lengths(model_of(models, self.settings.model))
        FlexORTQuantizer.read_config(None, self._options())

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        from ...quantization import quantize_folder

        source = context.artifact(self.settings.model)
        quantized = quantize_folder(
            source,
            context.output,
            calibration_dataset=self._calibration_data(context, source) if self.settings.mode == "static" else None,
            num_calibration_samples=self.settings.calibration_samples,
            task=context.task.name,
            progress=True,
            length_config=self._lengths(context),
            **self._options(),
        )
        for line in quantized.summary().splitlines():
            context.say(f"{context.name}: {line}")
        return {"target": quantized.config.target}

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        return {
            **settings.options,
            "mode": settings.mode,
            "target": settings.target,
            "per_channel": settings.per_channel,
        }

    def _calibration_data(self, context: StageContext, source: Any) -> Any:
        from ...data import take

        prepared = context.prepare(context.task.load_processor(source), model=load_config(source))
        if "train" not in prepared.dataset:
            raise FlexCompressError(
                f"static int8 is calibrated on training examples, and {context.dataset} has no training split: give a "
                "data set with one, or set mode: dynamic."
            )
        return take(prepared.dataset["train"], self.settings.calibration_samples, context.seed)


@dataclass
class BenchmarkSettings:
    """Settings of the stage `benchmark`.

    Attributes:
        models: The stages (or `input`) that are measured side by side.
        baseline: The one that the others are compared with; measured too when `models` does not name it.
        batch_sizes: Batch sizes to time.
        lengths: Lengths in tokens to time, each with every batch size; by default the longest input of the recipe.
        new_tokens: How many tokens generating models generate.
        stream_rows: How many examples are timed one by one at their real lengths.
        rounds: Interleaved rounds for each figure.
        max_seconds: Rough bound for timing one shape, all models together.
        threads: Threads for PyTorch and ONNX Runtime.
        memory: Whether peak memory is measured.
    """

    models: list[str] = field(default_factory=lambda: ["finetune", "distill", "quantize"])
    baseline: str = "finetune"
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    lengths: list[int] | None = None
    new_tokens: int = 32
    stream_rows: int = 64
    rounds: int = 15
    max_seconds: float = 60.0
    threads: int | None = None
    memory: bool = True

    def __post_init__(self):
        check_timing(self.batch_sizes, self.lengths, self.rounds, self.stream_rows, self.max_seconds)
        check_threads(self.threads)


@register_stage("benchmark")
class Benchmark(Stage):
    """Measures models side by side and writes the report."""

    Settings = BenchmarkSettings
    settings: BenchmarkSettings
    produces = "report"
    makes_model = False
    entry_point = "report.html"

    _above: Mapping[str, Stage] = {}

    def inputs(self) -> list[str]:
        """See the base class."""
        return list(dict.fromkeys([self.settings.baseline, *self.settings.models]))

    def check_sources(self, stages: Mapping[str, Stage]) -> None:
        """Remembers the stages above, which say what each model was made from."""
        self._above = dict(stages)

    def describe(self) -> str:
        """See the base class."""
        return f"measuring {', '.join(self.inputs())} side by side"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> None:
        """Looks whether the report could be written."""
        from ...evaluation.benchmark import require_report_extra

        require_report_extra()

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
            columns=context.data_settings.columns,
            max_length=context.max_length,
            batch_sizes=settings.batch_sizes,
            lengths=settings.lengths or [self._longest_input(context)],
            new_tokens=settings.new_tokens,
            stream_rows=settings.stream_rows,
            rounds=settings.rounds,
            max_seconds=settings.max_seconds,
            threads=settings.threads,
            memory=settings.memory,
            dataset_name=Path(context.dataset).name,
            before=self._before(context),
            originals=self._originals(context),
        )
        context.say(str(report))
        return {
            f"{model.name} {report.metric}": float(model.metrics[report.metric])
            for model in report.models
            if report.metric in model.metrics
        }

    def _before(self, context: StageContext) -> dict[str, str]:
        """For each model the measured one that it is to be compared with, step by step.

        That is one made ready in the same way: of the same training with other lengths, else of the nearest training
        before it; where there is none, the nearest measured model that it was made from.
        """
        measured = self.inputs()
        made = {name: self._made_of(context, name) for name in self._above}
        trained = {name: self._trained(name, made) for name in measured}
        found = {}
        for position, name in enumerate(measured):
            (origin, form), above = trained[name], measured[:position]
            ancestors = [] if origin is None else _nearest_first(origin, made)
            # Nothing but lengths tells two graphs of one training apart.
            alike = [other for stage in ancestors for other in reversed(above) if trained[other] == (stage, form)]
            nearest = [other for other in _nearest_first(name, made)[1:] if other in measured]
            before = next(iter(alike or nearest), None)
            if before is not None:
                found[name] = before
        return found

    def _originals(self, context: StageContext) -> dict[str, str | Path]:
        """For each measured graph the folder of the PyTorch model that it was made from."""
        made = {name: self._made_of(context, name) for name in self._above}
        found = {name: self._trained(name, made) for name in self.inputs()}
        return {name: context.artifact(origin) for name, (origin, form) in found.items() if form and origin in made}

    def _made_of(self, context: StageContext, name: str) -> list[str]:
        return self._above[name].made_of(Path(context.artifact(name)))

    def _trained(self, name: str, made: Mapping[str, list[str]]) -> tuple[str | None, tuple[type, ...]]:
        """The stage that made a PyTorch model, and through which types of stages it went from there."""
        form: tuple[type, ...] = ()
        while isinstance(self._above.get(name), _WithLengths):
            form, name = (type(self._above[name]), *form), made[name][0]
        return name, form

    def _longest_input(self, context: StageContext) -> int:
        processor = context.task.load_processor(context.artifact(self.settings.baseline))
        # Image processors have no such limit, and their inputs one size.
        return min(context.max_length, getattr(processor, "model_max_length", context.max_length))


def _nearest_first(name: str, made: Mapping[str, list[str]]) -> list[str]:
    """A stage and what it was made of, and so on, by distance."""
    found = [name]
    for stage in found:
        found += [source for source in made.get(stage, []) if source not in found]
    return found
