"""The picture of a front."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from .front import Front, Point, relative_loss


try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter
except ImportError as error:
    raise MissingExtraError("matplotlib", "report") from error


if TYPE_CHECKING:
    from matplotlib.axes import Axes


PICTURE = "front"
"""Name of the files, before `.png` and `.svg`."""
_BLUE, _ORANGE, _GREY, _BROWN = "#4878a8", "#e08a2e", "#9a9a9a", "#a85f10"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "front",
}
# A loss beyond this is none that one would choose, and showing it would squeeze the others together.
_SHOWN_LOSS = 0.1


def draw_front(front: Front, folder: str | os.PathLike) -> list[Path]:
    """Draws all scored configurations, the front among them, the full model and the pick.

    Args:
        front: The front.
        folder: Where `front.png` and `front.svg` go.

    Returns:
        The files.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.grid(True, color="#000000", alpha=0.1, linewidth=0.6)
        percent = " (%)" if front.unit in ("share", "percent") else ""
        axes.set_ylabel(f"{front.metric}{percent}, {'up' if front.greater_is_better else 'up (lower)'} is better")
        if front.kind == "model":
            _draw_models(axes, front)
        else:
            _draw_configurations(axes, front)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        if front.kind == "model":
            _name_models(axes, front)
        files = [Path(folder) / f"{PICTURE}.{ending}" for ending in ("png", "svg")]
        for file in files:
            _save(figure, file)
    return files


def _draw_configurations(axes: Axes, front: Front) -> None:
    def place(point: Point) -> tuple[float, float]:
        return 100 * point.relative_cost, _shown(front, point)

    axes.scatter(*zip(*map(place, front.scored)), s=16, color=_GREY, alpha=0.7, linewidths=0, label="scored")
    costs, metrics = zip(*map(place, front.points))
    axes.step(costs, metrics, where="post", color=_BLUE, linewidth=1.2, alpha=0.6, zorder=2)
    axes.scatter(costs, metrics, s=30, color=_BLUE, zorder=3, label="front")
    axes.scatter(*place(front.full), marker="s", s=60, color="black", zorder=4, label="full model")
    _frame(axes, front)
    if front.picked is not None:
        _mark_pick(axes, front, place(front.picked))
    cost = "multiply-accumulates" if front.objective == "macs" else f"latency in {front.runtime}"
    axes.set_title(f"{front.metric} against {cost}: {len(front.scored)} configurations")
    axes.set_xlabel(f"{cost}, % of the full model ({front.show_cost(front.full)}); left is cheaper")


def _draw_models(axes: Axes, front: Front) -> None:
    """Whole models, to choose one from: each is going to get its name."""

    def draw(points: Sequence[Point], **style: Any) -> None:
        if points:
            axes.scatter([point.cost for point in points], [_shown(front, point) for point in points], **style)

    beaten = [point for point in front.scored if point not in front.points and point != front.full]
    draw(beaten, s=34, color=_GREY, zorder=3, label="beaten by another")
    draw([point for point in front.points if point != front.full], s=40, color=_BLUE, zorder=3, label="front")
    draw([front.full], marker="s", s=60, color="black", zorder=4, label="baseline")
    if front.picked is not None:
        ring = {"facecolors": "none", "edgecolors": _ORANGE, "linewidths": 2.2}
        draw([front.picked], s=150, zorder=5, label="picked", **ring)
    _limit(axes, front, front.scored)
    # Names stand to the right of their points.
    axes.set_xlim(0, 1.2 * max(point.cost for point in front.scored))
    shape = front.options.get("shape")
    title = f"{front.metric} against the time of one batch{f' ({shape})' if shape else ''}"
    if front.picked is not None:
        faster = f"{1 / front.picked.relative_cost:.2f} times as fast"
        title += f"\npicked: {front.name(front.picked)}, {_change(front)}, {faster}"
    axes.set_title(title)
    axes.set_xlabel("milliseconds; left is faster")


def _name_models(axes: Axes, front: Front) -> None:
    from ..evaluation.plots import label_points

    points = [(front.name(point), point.cost, _shown(front, point)) for point in front.scored]
    for point, label in zip(front.scored, label_points(axes, points)):
        if point == front.picked:
            label.set_color(_BROWN)


def _shown(front: Front, point: Point) -> float:
    return 100 * point.metric if front.unit == "share" else point.metric


def _frame(axes: Axes, front: Front) -> None:
    """Shows where one picks, not the worst that was tried: a few bad configurations would squeeze it flat."""
    sign = 1 if front.greater_is_better else -1
    best = max((*front.points, front.full), key=lambda point: sign * point.metric).metric
    near = [
        point
        for point in front.points
        if relative_loss(point.metric, best, front.greater_is_better) <= _SHOWN_LOSS or point == front.picked
    ]
    near.append(front.full)
    _limit(axes, front, near)
    axes.set_xlim(0, 100 * max(point.relative_cost for point in (*front.points, front.full)) * 1.06)
    bottom = axes.get_ylim()[0]
    below = sum(sign * _shown(front, point) < sign * bottom for point in front.scored)
    if below:
        lie = "lies" if below == 1 else "lie"
        text = f"{below} of {len(front.scored)} {lie} below what is shown"
        axes.text(0.02, 0.02, text, transform=axes.transAxes, fontsize=8.5, color="#606060", zorder=6)


def _limit(axes: Axes, front: Front, points: Sequence[Point]) -> None:
    values = [_shown(front, point) for point in points]
    low, high = min(values), max(values)
    spread = max(high - low, 0.01 * abs(high), 1e-6)
    axes.set_ylim(low - 0.25 * spread, high + 0.25 * spread)
    if not front.greater_is_better:
        axes.invert_yaxis()


def _change(front: Front) -> str:
    loss = 100 * front.drop(front.picked)
    return f"loses {loss:.2f} %" if loss > 0 else f"gains {-loss:.2f} %" if loss < 0 else "loses nothing"


def _mark_pick(axes: Axes, front: Front, place: tuple[float, float]) -> None:
    axes.scatter(*place, s=150, facecolors="none", edgecolors=_ORANGE, linewidths=2.2, zorder=5, label="picked")
    text = f"{front.name(front.picked)}\n{_change(front)} of the {front.metric} at {place[0]:.0f} % of the cost"
    # Below and to the right of a front there is nothing but what it beats.
    axes.annotate(
        text,
        place,
        xytext=(0.98, 0.05),
        textcoords="axes fraction",
        ha="right",
        va="bottom",
        fontsize=9.5,
        color=_BROWN,
        arrowprops={"arrowstyle": "-", "color": _ORANGE, "linewidth": 0.9, "shrinkB": 8},
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2},
        zorder=6,
    )


def _save(figure: Figure, file: Path) -> None:
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    metadata = {"Date": None, "Creator": None} if file.suffix == ".svg" else {"Software": None}
    try:
        figure.savefig(temporary, format=file.suffix[1:], dpi=150, metadata=metadata)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
