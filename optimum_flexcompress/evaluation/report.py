"""The result of a benchmark: as an object, as JSON, as a table for the terminal, as one HTML page."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import FlexCompressError
from ..output import write_text_atomically
from .environment import describe_environment
from .formatting import (
    MISSING,
    counted,
    format_bytes,
    format_change,
    format_count,
    format_metric,
    format_seconds,
    format_share,
    format_speedup,
    text_table,
)
from .latency import Timing


JSON_NAME = "report.json"
HTML_NAME = "report.html"
FORMAT_VERSION = 1


@dataclass
class ModelResult:
    """What was measured of one model.

    Attributes:
        name: Its name in the report.
        path: Where it was opened.
        backend: What ran it.
        precision: `fp32`, `int8`, ...
        lane: The environment of another interpreter that it ran in; None is the benchmark's own.
        parameters: Their number, tied ones once.
        size: Bytes of its weights on disk.
        macs: Multiply-accumulates for one input, by its length in tokens (or `image`).
        metrics: The task's metrics.
        change: Of the main metric, against the baseline.
        comparison: What [`optimum_flexcompress.evaluation.compare_predictions`] found against the baseline.
        latency: By shape (`1x128`: batch 1, 128 tokens; `1x128+32`: and 32 generated ones): `median` and `iqr` in
            seconds, `samples`, `calls`, `threads`, `throughput` in inputs (or generated tokens) per second, and
            `speedup` over the baseline.
        stream: The same for inputs of real lengths one by one: seconds for one, `p95`, `mean_length`, `rows`, and
            `first_pass`, the mean seconds for one when none of them had been seen before.
        memory: Bytes, what [`optimum_flexcompress.evaluation.measure_peak_memory`] returned.
        lengths: Of a model that drops tokens: its length configuration (`config`) and what it comes to, as tokens of
            an input and tokens left after each layer: for the longest length that was timed (`kept`), and on average
            over the data set (`real`).
        words: Which words of one text survive to which layer, as a [`optimum_flexcompress.evaluation.TokenTrace`]; or
            why that cannot be told (`note`).
        before: Name of the model that it was made of, where that is known.
    """

    name: str
    path: str
    backend: str
    precision: str
    parameters: int
    size: int
    macs: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    change: float | None = None
    comparison: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, dict[str, Any]] = field(default_factory=dict)
    stream: dict[str, Any] | None = None
    memory: dict[str, int] | None = None
    lengths: dict[str, Any] | None = None
    lane: str | None = None
    words: dict[str, Any] | None = None
    before: str | None = None

    def faster_than(self, other: ModelResult) -> dict[str, float]:
        """How many times as fast as another model of the same report, by shape: the median of the rounds' ratios."""
        shapes = [shape for shape in self.latency if shape in other.latency]
        return {shape: _faster(self.latency[shape], other.latency[shape]) for shape in shapes}


@dataclass
class Report:
    """A benchmark's result.

    Attributes:
        task: Name of the task.
        dataset: Name of the data set.
        split: The split that metrics are of.
        rows: Its number of rows.
        metric: The main metric's name.
        unit: How to show it, see [`optimum_flexcompress.tasks.Prepared`].
        greater_is_better: Its direction.
        baseline: Name of the model that the others are compared with.
        models: The results, the baseline first.
        environment: What [`optimum_flexcompress.evaluation.environment_info`] returned.
        settings: How it was measured.
        created: When, ISO 8601, UTC.
        version: Of this format.
    """

    task: str
    dataset: str
    split: str
    rows: int
    metric: str
    unit: str
    greater_is_better: bool
    baseline: str
    models: list[ModelResult]
    environment: dict[str, Any]
    settings: dict[str, Any]
    created: str
    version: int = FORMAT_VERSION

    def __getitem__(self, name: str) -> ModelResult:
        """The result of one model, by its name."""
        return next(model for model in self.models if model.name == name)

    def shapes(self) -> list[str]:
        """The shapes that were timed."""
        return list(dict.fromkeys(shape for model in self.models for shape in model.latency))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        """The report that [`Report.to_dict`] was called on.

        Raises:
            FlexCompressError: It is not one, or of a newer version.
        """
        if not isinstance(content, dict) or content.get("version", 0) > FORMAT_VERSION:
            raise FlexCompressError("This report was written by a newer version: upgrade optimum-flexcompress.")
        missing = [part.name for part in fields(cls) if part.name not in content]
        if missing:
            raise FlexCompressError(f"This is no benchmark report: it lacks {', '.join(missing)}.")
        known = {part.name: content[part.name] for part in fields(cls)}
        known["models"] = [ModelResult(**model) for model in known["models"]]
        return cls(**known)

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike) -> Report:
        """Reads a report.

        Args:
            path: The folder given to [`Report.save`], or its JSON file.

        Returns:
            The report.

        Raises:
            FlexCompressError: There is none, or it is damaged.
        """
        path = Path(path)
        path = path / JSON_NAME if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise FlexCompressError(
                f"There is no report {path}: check the path, or run the benchmark first."
            ) from error
        except json.JSONDecodeError as error:
            raise FlexCompressError(f"{path} is not valid JSON ({error.msg}): run the benchmark again.") from error

    def save(self, folder: str | os.PathLike, html: bool = True) -> Path:
        """Writes `report.json` and `report.html`, and pictures of dropped tokens where a model drops some.

        Args:
            folder: An existing folder; see [`optimum_flexcompress.output.atomic_folder`].
            html: Whether to write the page, which needs the extra `report`.

        Returns:
            The folder.

        Raises:
            MissingExtraError: Jinja2 or matplotlib is missing.
        """
        folder = Path(folder)
        page = self.to_html() if html else None
        write_text_atomically(folder / JSON_NAME, self.to_json())
        if page is not None:
            from .token_plots import save_pictures

            save_pictures(self, folder)
            write_text_atomically(folder / HTML_NAME, page)
        return folder

    def to_html(self) -> str:
        """One self-contained page, plots included.

        Raises:
            MissingExtraError: Jinja2 or matplotlib is missing.
        """
        from .page import render_page

        return render_page(self)

    def summary_rows(self) -> tuple[list[str], list[list[str]]]:
        """The main table: what each model knows and what it weighs."""
        lengths = list(dict.fromkeys(length for model in self.models for length in model.macs))[-1:]
        arrow = "↑" if self.greater_is_better else "↓"
        header = ["model", "runs in", f"{self.metric} {arrow}", "change", "agrees", "parameters", "size"]
        header += [f"MACs ({length})" if length.isdigit() else "MACs" for length in lengths] + ["memory"]
        rows = []
        for model in self.models:
            own = model.name == self.baseline
            rows.append(
                [
                    model.name,
                    f"{model.backend} {model.precision}",
                    format_metric(model.metrics.get(self.metric), self.unit),
                    MISSING if own else format_change(model.change, self.unit),
                    MISSING if own else format_share(model.comparison.get("agreement")),
                    format_count(model.parameters),
                    format_bytes(model.size),
                    *(format_count(model.macs.get(length)) for length in lengths),
                    format_bytes(model.memory["model"]) if model.memory else MISSING,
                ]
            )
        return header, rows

    def time_rows(self) -> tuple[list[str], list[list[str]]]:
        """The second table: median time and speed-up for each shape, and for inputs of real lengths."""
        shapes = self.shapes()
        streams = any(model.stream for model in self.models)
        header = ["model", *(column for shape in shapes for column in (shape, "faster"))]
        header += ["real lengths", "faster"] if streams else []
        rows = []
        for model in self.models:
            row = [model.name]
            for shape in shapes:
                timing = model.latency.get(shape, {})
                row += [format_seconds(timing.get("median")), format_speedup(timing.get("speedup"))]
            if streams:
                timing = model.stream or {}
                row += [format_seconds(timing.get("median")), format_speedup(timing.get("speedup"))]
            rows.append(row)
        return header, rows

    def step_rows(self) -> tuple[list[str], list[list[str]]]:
        """What every step gained and lost: each model against the one before it, both measured in the same rounds.

        Shares are those of the model before that are left. Without known steps there are no rows.
        """
        names = {model.name for model in self.models}
        pairs = [(model, self[model.before]) for model in self.models if model.before in names]
        shapes, streams = self.shapes(), any(model.stream and other.stream for model, other in pairs)
        header = ["model", "after", self.metric, "size", "MACs", *(f"{shape} faster" for shape in shapes)]
        header += ["real lengths faster"] if streams else []
        rows = []
        for model, other in pairs:
            value, earlier = (found.metrics.get(self.metric) for found in (model, other))
            length = next((length for length in reversed(model.macs) if other.macs.get(length)), None)
            row = [
                model.name,
                other.name,
                format_change(None if value is None or earlier is None else value - earlier, self.unit),
                format_share(model.size / other.size) if other.size else MISSING,
                format_share(model.macs[length] / other.macs[length]) if length else MISSING,
            ]
            faster = model.faster_than(other)
            row += [format_speedup(faster.get(shape)) for shape in shapes]
            row += [format_speedup(_faster(model.stream, other.stream))] if streams else []
            rows.append(row)
        return header, rows

    def length_rows(self) -> tuple[list[str], list[list[str]]]:
        """The last table: what dropping tokens gains, each model against the closest one that keeps them all.

        That is the last one above it with the same runtime, precision and sizes. Without such pairs there are no rows.
        """
        shapes = self.shapes()
        pairs = [(model, other) for model in self.models if (other := self._without_dropping(model))]
        streams = any(model.stream and other.stream for model, other in pairs)
        header = ["model", "instead of", self.metric, *(["MACs"] if any(model.macs for model, _ in pairs) else [])]
        header += [f"{shape} faster" for shape in shapes] + (["real lengths faster"] if streams else [])
        rows = []
        for model, other in pairs:
            value, before = (found.metrics.get(self.metric) for found in (model, other))
            row = [model.name, other.name]
            row.append(format_change(None if value is None or before is None else value - before, self.unit))
            if model.macs:
                length = list(model.macs)[-1]
                row.append(format_share(model.macs[length] / other.macs[length]) if length in other.macs else MISSING)
            faster = model.faster_than(other)
            row += [format_speedup(faster.get(shape)) for shape in shapes]
            if streams:
                row.append(format_speedup(_faster(model.stream, other.stream)))
            rows.append(row)
        return header, rows

    def _without_dropping(self, model: ModelResult) -> ModelResult | None:
        if model.lengths is None:
            return None
        alike = [
            other
            for other in self.models
            if other.lengths is None
            and (other.backend, other.precision, other.parameters)
            == (model.backend, model.precision, model.parameters)
        ]
        above = [other for other in alike if self.models.index(other) < self.models.index(model)]
        return above[-1] if above else alike[0] if alike else None

    def table(self) -> str:
        """The report for a terminal."""
        rows = counted(self.rows, "row")
        parts = [f"{self.task} on {self.dataset}, split {self.split} ({rows}); baseline: {self.baseline}"]
        parts.append(text_table(*self.summary_rows()))
        header, rows = self.time_rows()
        if len(header) > 1:
            parts.append(
                "Time for one batch (batch x tokens), median of interleaved rounds; speed-up over the baseline"
            )
            parts.append(text_table(header, rows))
        header, rows = self.step_rows()
        if rows:
            parts.append("Step by step: each model against the one that it was made from")
            parts.append(text_table(header, rows))
        header, rows = self.length_rows()
        if rows:
            parts.append("What dropping tokens gains")
            parts.append(text_table(header, rows))
        parts.append(describe_environment(self.environment))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.table()


def _faster(timing: dict[str, Any] | None, other: dict[str, Any] | None) -> float | None:
    """How many times faster, measured in the same rounds; None where one of them was not timed."""
    if not timing or not other:
        return None
    first, second = (
        Timing(*(values[name] for name in ("median", "iqr", "samples", "calls", "threads", "seconds")))
        for values in (timing, other)
    )
    return first.speedup_over(second)
