"""The pictures of a report, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from .formatting import format_bytes, format_count, format_seconds, format_speedup


try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
except ImportError as error:
    raise MissingExtraError("matplotlib", "report") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

    from .report import ModelResult, Report


# Told apart with any kind of colour vision, and legible on white and on black.
COLOURS = ("#4878a8", "#e08a2e", "#3f9b6c", "#c0628f", "#8a79c7", "#b5602f", "#5aa5b5", "#8f8f3a")
# Stands for the colour of the text around, which differs between light and dark pages.
INK = "#010203"
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
}
CLASSES_SHOWN = 12


def colours(report: Report) -> dict[str, str]:
    """A colour for each model, the same in all pictures."""
    return {model.name: COLOURS[index % len(COLOURS)] for index, model in enumerate(report.models)}


def metric_against_latency(report: Report, shape: str) -> str | None:
    """The main metric over the time for one batch; up and to the left is better.

    Args:
        report: The report.
        shape: One of its shapes, or `stream`.

    Returns:
        SVG, or None where fewer than two models have both figures.
    """
    points = []
    for model in report.models:
        timing = model.stream if shape == "stream" else model.latency.get(shape)
        value = model.metrics.get(report.metric)
        if timing and value is not None:
            points.append((model.name, timing["median"] * 1e3, value * (100 if report.unit == "share" else 1)))
    if len(points) < 2:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.5), layout="constrained")
        axes = figure.subplots()
        palette = colours(report)
        for name, time, value in points:
            marker, size = ("s", 52) if name == report.baseline else ("o", 62)
            axes.scatter(time, value, marker=marker, s=size, color=palette[name], zorder=3)
        times, values = [point[1] for point in points], [point[2] for point in points]
        axes.set_xlim(0, max(times) * 1.3)
        spread = max(max(values) - min(values), 0.02 * max(map(abs, values)), 1e-9)
        axes.set_ylim(min(values) - 0.35 * spread, max(values) + 0.35 * spread)
        if not report.greater_is_better:
            axes.invert_yaxis()
        unit = " (%)" if report.unit in ("share", "percent") else ""
        title = "real lengths, one by one" if shape == "stream" else shape.replace("x", " × ")
        axes.set_title(f"{report.metric} against latency, {title}")
        axes.set_xlabel("milliseconds per batch (left is faster)" if shape != "stream" else "milliseconds per input")
        axes.set_ylabel(f"{report.metric}{unit} (up is better)")
        axes.grid(True)
        label_points(axes, points)
        return svg(figure)


def _shifts(width: float, scale: float) -> Iterator[tuple[int, int, tuple[float, float]]]:
    """Side, step and shift of the places for a name: right and left of its point, then further up and down."""
    for step, side in itertools.product(range(16), (1, -1)):
        for turn in (1, -1) if step else (1,):
            yield side, step, (0 if side > 0 else -width - 16 * scale, 7 * step * turn * scale)


def _is_free(box: Bbox, frame: Bbox, others: Sequence[Bbox]) -> bool:
    inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    return inside and not any(box.overlaps(other) for other in others)


def label_points(axes: Axes, points: Sequence[tuple[str, float, float]], **style: Any) -> list[Annotation]:
    """Names beside points, moved apart where points lie close together: none covers a point or another name.

    Args:
        axes: With everything else drawn and their limits set.
        points: Name, x and y of each.
        **style: Of the text.

    Returns:
        The names, in the order of the points.
    """
    figure = axes.figure
    # Places everything, which is what distances between names depend on.
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    centres = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox.from_extents(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in centres]
    labels = {}
    for index in sorted(range(len(points)), key=lambda index: (centres[index][0], centres[index][1])):
        name, x, y = points[index]
        label = axes.annotate(
            name, (x, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9, **style
        )
        others = taken[:index] + taken[index + 1 :]
        box = label.get_window_extent()
        places = ((side, step, box.translated(*shift)) for side, step, shift in _shifts(box.width, scale))
        # Where all is taken, names overlap.
        side, step, moved = next((place for place in places if _is_free(place[-1], frame, others)), (1, 0, box))
        label.xyann = (8 * side, (moved.y0 - box.y0) / scale)
        label.set_horizontalalignment("left" if side > 0 else "right")
        if step > 1:
            # So far away that it needs saying which point is meant.
            axes.annotate(
                "",
                (x, y),
                xytext=label.xyann,
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3},
            )
        taken.append(moved)
        labels[index] = label
    return [labels[index] for index in range(len(points))]


def size_bars(report: Report) -> str:
    """Weights on disk, parameters, multiply-accumulates and memory of each model, as bars."""
    length = next(iter(reversed(report.models[0].macs)), None)
    panels = [
        ("weights on disk", [model.size for model in report.models], format_bytes),
        ("parameters", [model.parameters for model in report.models], format_count),
    ]
    if length is not None and all(length in model.macs for model in report.models):
        title = f"MACs, {length} tokens" if length.isdigit() else "MACs"
        panels.append((title, [model.macs[length] for model in report.models], format_count))
    if all(model.memory for model in report.models):
        panels.append(("memory while running", [model.memory["model"] for model in report.models], format_bytes))
    with rc_context(STYLE):
        height = 0.9 + 0.34 * len(report.models)
        figure = Figure(figsize=(11.2, height), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for index, (axes, (title, values, show)) in enumerate(zip(all_axes, panels)):
            _bars(axes, report, values, [show(value) for value in values], names=index == 0)
            axes.set_title(title)
        return svg(figure)


def latency_bars(report: Report) -> str | None:
    """Time for one batch of every shape, with the distance between the quartiles and the speed-up."""
    shapes = [shape for shape in report.shapes() if all(shape in model.latency for model in report.models)]
    panels = [(shape.replace("x", " × "), [model.latency[shape] for model in report.models]) for shape in shapes]
    if all(model.stream for model in report.models):
        panels.append(("real lengths", [model.stream for model in report.models]))
    if not panels:
        return None
    with rc_context(STYLE):
        height = 0.9 + 0.34 * len(report.models)
        rows = -(-len(panels) // 4)
        across = -(-len(panels) // rows)
        figure = Figure(figsize=(11.2, height * rows), layout="constrained")
        all_axes = figure.subplots(rows, across, squeeze=False).ravel()
        for index, (axes, (title, timings)) in enumerate(zip(all_axes, panels)):
            values = [timing["median"] for timing in timings]
            notes = [
                format_seconds(timing["median"])
                + ("" if model.name == report.baseline else f" · {format_speedup(timing.get('speedup'))}")
                for model, timing in zip(report.models, timings)
            ]
            spreads = [timing["iqr"] / 2 for timing in timings]
            _bars(axes, report, values, notes, names=index % across == 0, spreads=spreads)
            axes.set_title(title)
        for axes in all_axes[len(panels) :]:
            axes.set_axis_off()
        return svg(figure)


def _bars(axes, report: Report, values: list[float], notes: list[str], names: bool, spreads=None) -> None:
    palette = colours(report)
    places = range(len(values))
    error = {"ecolor": INK, "elinewidth": 0.9, "alpha": 0.7}
    axes.barh(
        places, values, height=0.62, color=[palette[m.name] for m in report.models], xerr=spreads, error_kw=error
    )
    for place, value, note, spread in zip(places, values, notes, spreads or [0] * len(values)):
        axes.annotate(
            note, (value + spread, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    axes.set_yticks(list(places), [model.name for model in report.models] if names else [""] * len(values))
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, max(values) * 1.75 if max(values) else 1)
    axes.invert_yaxis()


def class_changes(report: Report, model: ModelResult) -> str | None:
    """The classes whose accuracy changed most.

    Returns:
        SVG, or None where no class changed.
    """
    changes = [change for change in model.comparison.get("per_class", ()) if change["change"]]
    if not changes:
        return None
    most = sorted(changes, key=lambda change: -abs(change["change"]))[:CLASSES_SHOWN]
    most.sort(key=lambda change: change["change"])
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 0.9 + 0.27 * len(most)), layout="constrained")
        axes = figure.subplots()
        values = [100 * change["change"] for change in most]
        axes.barh(range(len(most)), values, height=0.66, color=[COLOURS[2] if v > 0 else COLOURS[5] for v in values])
        reach = max(map(abs, values))
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:+.1f}",
                (value, place),
                xytext=(5 if value > 0 else -5, 0),
                textcoords="offset points",
                va="center",
                ha="left" if value > 0 else "right",
                fontsize=8.5,
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(most)), [f"{_short(c['name'])} ({c['count']})" for c in most])
        axes.set_xlim(-1.4 * reach if min(values) < 0 else 0, 1.4 * reach if max(values) > 0 else 0)
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
        axes.invert_yaxis()
        figure.suptitle(f"{model.name}: change of accuracy by class", x=0.01, ha="left", fontsize=10.5, color=INK)
        axes.set_xlabel("points (rows of the class in brackets)")
        axes.grid(True, axis="x")
        return svg(figure)


def _short(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element without background, fixed size or fixed ink."""
    buffer = io.StringIO()
    # No date and no metadata: the same figures give the same file.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1).replace(
        re.search(r'height="[\d.]+pt" ', text).group(0), "", 1
    )
