"""What a benchmark measured, as it stands in the card of a model."""

from __future__ import annotations

from collections.abc import Callable

from huggingface_hub import EvalResult

from .evaluation.environment import describe_environment
from .evaluation.formatting import (
    format_bytes,
    format_change,
    format_count,
    format_metric,
    format_seconds,
    format_share,
    format_speedup,
)
from .evaluation.report import ModelResult, Report


def eval_results(report: Report, name: str, dataset_id: str | None = None) -> list[EvalResult]:
    """The metrics of one model, for the `model-index` of a card.

    Args:
        report: The benchmark.
        name: The model's name in it.
        dataset_id: Id of the data set on the Hub; where there is none, its name stands for it.
    """
    return [
        EvalResult(
            task_type=report.task,
            dataset_type=dataset_id or report.dataset,
            dataset_name=report.dataset,
            dataset_split=report.split,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in report[name].metrics.items()
    ]


def figure_lines(report: Report, name: str) -> list[str]:
    """The figures of one model beside those of the baseline, as Markdown.

    Args:
        report: The benchmark.
        name: The model's name in it.
    """
    model, before = report[name], report[report.baseline]
    columns = [model] if model is before else [before, model]
    heads = ["this model"] if model is before else [f"before (`{before.name}`)", f"this model (`{name}`)"]
    lines = [
        f"On {report.dataset}, split {report.split}, {report.rows:,} rows.",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for title, cell in _rows(report, columns):
        cells = [cell(column) for column in columns]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    environment = report.environment
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    return [
        *lines,
        "",
        "Times are for one batch (batch x tokens), medians of rounds in which the models took turns, on "
        f"{describe_environment(environment)}. All versions: {versions}; Python {environment['python']}.",
    ]


def _rows(report: Report, columns: list[ModelResult]) -> list[tuple[str, Callable[[ModelResult], str]]]:
    """Title and content of each row; a content is empty where the model has none."""

    def metric(name: str) -> Callable[[ModelResult], str]:
        def cell(model: ModelResult) -> str:
            value = model.metrics.get(name)
            # The unit is that of the main metric; others are shown as they are.
            shown = (
                format_metric(value, report.unit if name == report.metric else "number") if value is not None else ""
            )
            change = model.change if name == report.metric and model.name != report.baseline else None
            return shown + ("" if change is None else f" ({format_change(change, report.unit)})")

        return cell

    def time(timing: dict | None, model: ModelResult) -> str:
        if not timing:
            return ""
        faster = "" if model.name == report.baseline else f" ({format_speedup(timing.get('speedup'))} faster)"
        return format_seconds(timing.get("median")) + faster

    def shape(name: str) -> Callable[[ModelResult], str]:
        return lambda model: time(model.latency.get(name), model)

    def macs(length: str) -> Callable[[ModelResult], str]:
        return lambda model: format_count(model.macs[length]) if length in model.macs else ""

    names = list(dict.fromkeys(name for column in columns for name in column.metrics))
    # The main metric first.
    names.sort(key=lambda name: name != report.metric)
    lengths = list(dict.fromkeys(length for column in columns for length in column.macs))
    return [
        ("runs in", lambda model: f"{model.backend} {model.precision}"),
        *((name, metric(name)) for name in names),
        ("agrees with the model before", lambda model: _share(model.comparison.get("agreement"))),
        ("parameters", lambda model: format_count(model.parameters)),
        ("weights on disk", lambda model: format_bytes(model.size)),
        *((f"MACs, {length} tokens" if length.isdigit() else "MACs", macs(length)) for length in lengths),
        ("memory", lambda model: format_bytes(model.memory["model"]) if model.memory else ""),
        *((f"time, {name}", shape(name)) for name in report.shapes()),
        ("time, inputs of real lengths one by one", lambda model: time(model.stream, model)),
    ]


def _share(value: float | None) -> str:
    return "" if value is None else format_share(value)
