"""The picture of a front."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import MissingExtraError
from .front import Front, Point


try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter
except ImportError as error:
    raise MissingExtraError("matplotlib", "report") from error


PICTURE = "front"
"""Name of the files, before `.png` and `.svg`."""
_BLUE, _ORANGE, _GREY = "#4878a8", "#e08a2e", "#9a9a9a"
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


def draw_front(front: Front, folder: str | os.PathLike) -> list[Path]:
    """Draws all scored configurations, the front among them, the full model and the pick.

    Args:
        front: The front.
        folder: Where `front.png` and `front.svg` go.

    Returns:
        The files.
    """
    scale = 100 if front.unit == "share" else 1
    percent = " (%)" if front.unit in ("share", "percent") else ""

    def place(point: Point) -> tuple[float, float]:
        return 100 * point.relative_cost, scale * point.metric

    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.grid(True, color="#000000", alpha=0.1, linewidth=0.6)
        axes.scatter(*zip(*map(place, front.scored)), s=16, color=_GREY, alpha=0.7, linewidths=0, label="scored")
        costs, metrics = zip(*map(place, front.points))
        axes.step(costs, metrics, where="post", color=_BLUE, linewidth=1.2, alpha=0.6, zorder=2)
        axes.scatter(costs, metrics, s=30, color=_BLUE, zorder=3, label="front")
        axes.scatter(*place(front.full), marker="s", s=60, color="black", zorder=4, label="full model")
        _frame(axes, front, scale)
        if front.picked is not None:
            _mark_pick(axes, front, place(front.picked))
        if not front.greater_is_better:
            axes.invert_yaxis()
        cost = "multiply-accumulates" if front.objective == "macs" else f"latency in {front.runtime}"
        axes.set_title(f"{front.metric} against {cost}: {len(front.scored)} configurations")
        axes.set_xlabel(f"{cost}, % of the full model ({front.show_cost(front.full)}); left is cheaper")
        axes.set_ylabel(f"{front.metric}{percent}, {'up' if front.greater_is_better else 'up (lower)'} is better")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        files = [Path(folder) / f"{PICTURE}.{ending}" for ending in ("png", "svg")]
        for file in files:
            _save(figure, file)
    return files


def _frame(axes, front: Front, scale: float) -> None:
    """Shows the front, not the worst that was tried: a few bad configurations would squeeze it flat."""
    values = [scale * point.metric for point in (*front.points, front.full)]
    low, high = min(values), max(values)
    spread = max(high - low, 0.01 * abs(high), 1e-6)
    axes.set_ylim(low - 0.25 * spread, high + 0.25 * spread)
    axes.set_xlim(0, 100 * max(point.relative_cost for point in (*front.points, front.full)) * 1.06)


def _mark_pick(axes, front: Front, place: tuple[float, float]) -> None:
    axes.scatter(*place, s=150, facecolors="none", edgecolors=_ORANGE, linewidths=2.2, zorder=5, label="picked")
    loss = 100 * front.drop(front.picked)
    change = f"loses {loss:.2f} %" if loss > 0 else f"gains {-loss:.2f} %" if loss < 0 else "loses nothing"
    text = f"{front.name(front.picked)}\n{change} of the {front.metric} at {place[0]:.0f} % of the cost"
    # Below and to the right of a front there is nothing but what it beats.
    axes.annotate(
        text,
        place,
        xytext=(0.98, 0.05),
        textcoords="axes fraction",
        ha="right",
        va="bottom",
        fontsize=9.5,
        color="#a85f10",
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
