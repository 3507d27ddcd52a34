"""The report as one self-contained HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import MissingExtraError
from .environment import describe_environment
from .formatting import counted, format_bytes, format_change, format_metric, format_share
from .tokens import TokenTrace, step_name


try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise MissingExtraError("Jinja2", "report") from error

if TYPE_CHECKING:
    from .report import Report


def render_page(report: Report) -> str:
    """Renders a report.

    Args:
        report: The report.

    Returns:
        HTML with everything inside: no script, no font, no picture is fetched from anywhere.
    """
    from . import plots, pruning_plots, token_plots

    shapes = [*report.shapes(), *(["stream"] if any(model.stream for model in report.models) else [])]
    scatter = [plots.metric_against_latency(report, shape) for shape in shapes]
    others = [model for model in report.models if model.name != report.baseline]
    classes = [plots.class_changes(report, model) for model in others]
    return (
        _templates()
        .get_template("report.html")
        .render(
            report=report,
            others=others,
            summary=report.summary_rows(),
            times=report.time_rows(),
            colours=plots.colours(report),
            cards=[_card(report, model) for model in others],
            latency=Markup(plots.latency_bars(report) or ""),
            sizes=Markup(plots.size_bars(report)),
            gains=report.length_rows(),
            steps=report.step_rows(),
            kept=[Markup(picture) for picture in token_plots.kept_of_report(report)],
            pruned=[
                (model.name, [{"wide": wide, "svg": Markup(picture)} for wide, picture in pictures])
                for model in report.models
                if (pictures := pruning_plots.of_folder(model.path))
            ],
            words=[(model.name, model.words) for model in report.models if model.words],
            read_trace=TokenTrace.from_dict,
            step_name=step_name,
            scatter=[Markup(picture) for picture in scatter if picture],
            classes=[Markup(picture) for picture in classes if picture],
            environment=describe_environment(report.environment),
            counted=counted,
            format_share=format_share,
            format_bytes=format_bytes,
        )
    )


def render_words(trace: TokenTrace, title: str) -> str:
    """Renders which words of a text survive to which layer.

    Args:
        trace: What [`trace_tokens`] returned.
        title: Of the page.

    Returns:
        HTML with everything inside.
    """
    return _templates().get_template("words_page.html").render(trace=trace, title=title, step_name=step_name)


def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("optimum_flexcompress.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _card(report: Report, model) -> dict:
    """The figures that a reader looks for first."""
    baseline = report[report.baseline]
    timings = [timing for timing in (*model.latency.values(), model.stream) if timing and timing.get("speedup")]
    best = max((timing["speedup"] for timing in timings), default=None)
    least = min((timing["speedup"] for timing in timings), default=None)
    if best is None:
        speed = None
    elif best - least < 0.05:
        speed = f"{best:.1f}×"
    else:
        speed = f"{least:.1f}–{best:.1f}×"
    return {
        "name": model.name,
        "metric": format_metric(model.metrics.get(report.metric), report.unit),
        "change": format_change(model.change, report.unit),
        "worse": model.change is not None and (model.change < 0) == report.greater_is_better and model.change != 0,
        "speed": speed,
        "size": f"{baseline.size / model.size:.1f}×" if model.size else None,
        "flipped": model.comparison.get("flipped"),
        "agreement": model.comparison.get("agreement"),
    }
