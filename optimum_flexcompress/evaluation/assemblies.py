"""Pictures of assemblies: what they are made of, and what they cost and are worth."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import MissingExtraError


try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingExtraError("matplotlib", "report") from error


_COLOURS = {1: "#e6e6e6", 2: "#bcd3e8", 3: "#8fb3d6", 4: "#6a97c4", 6: "#3f6f9f"}
_OTHER = "#2f5377"
_LINES = ("#4878a8", "#e08a2e", "#5f9e6e", "#a85f8f", "#8a7a4f", "#777777", "#c44e52")
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}

Plan = Mapping[str, Sequence[Mapping[str, int]]]
"""An assembly as JSON: by stack pieces, `{"layer": i}` or `{"granularity": g, "block": j}`."""


def draw_assemblies(plans: Mapping[str, Plan], file: str | os.PathLike) -> Path:
    """Draws which layers and modules each assembly uses: a row for each assembly, a column for each original layer.

    Args:
        plans: The assemblies, by title, top row first.
        file: The picture to write, with an ending that matplotlib knows, such as `.png` or `.svg`.

    Returns:
        Its path.
    """
    stacks = list(next(iter(plans.values())))
    depths = {name: sum(_size(piece) for piece in next(iter(plans.values()))[name]) for name in stacks}
    with rc_context(_STYLE):
        figure = Figure(figsize=(1.6 + 0.32 * sum(depths.values()), 0.9 + 0.34 * len(plans)), layout="constrained")
        axes = figure.subplots(1, len(stacks), width_ratios=list(depths.values()), sharey=True, squeeze=False)[0]
        for panel, name in zip(axes, stacks):
            for row, plan in enumerate(plans.values()):
                place = 0
                for piece in plan[name]:
                    size = _size(piece)
                    box = Rectangle(
                        (place + 0.06, row + 0.12),
                        size - 0.12,
                        0.76,
                        facecolor=_COLOURS.get(size, _OTHER),
                        edgecolor="white",
                    )
                    panel.add_patch(box)
                    label = str(place) if size == 1 else f"{place}-{place + size - 1}"
                    panel.text(
                        place + size / 2,
                        row + 0.5,
                        label,
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if size > 3 else "black",
                    )
                    place += size
            panel.set(xlim=(0, depths[name]), ylim=(len(plans), 0), xticks=[], title=f"{name}, {depths[name]} layers")
            panel.set_yticks([row + 0.5 for row in range(len(plans))], list(plans))
            panel.tick_params(length=0)
            for spine in panel.spines.values():
                spine.set_visible(False)
        return _save(figure, file)


def draw_against_ratio(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], file: str | os.PathLike, title: str = ""
) -> Path:
    """Draws values against the ratio, a panel for each kind of value and a line for each way to the model.

    Args:
        panels: By the title of a panel, and then by label, points of ratio and value. A label keeps its colour in all panels.
        file: The picture to write.
        title: Above all panels.

    Returns:
        Its path.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    with rc_context(_STYLE):
        columns = min(len(panels), 3)
        rows = math.ceil(len(labels) / columns)
        figure = Figure(figsize=(4.6 * len(panels), 3.2 + 0.2 * rows), layout="constrained")
        for panel, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            for label, points in lines.items():
                index = labels.index(label)
                panel.plot(
                    *zip(*sorted(points)),
                    marker="o",
                    markersize=4,
                    linewidth=1.3,
                    linestyle="-" if index < 2 else ":",
                    color=_LINES[index % len(_LINES)],
                    label=label,
                )
            panel.set_title(name, fontsize="medium")
            panel.set_xlabel("layers of the full model over those of the assembly")
            panel.grid(True, alpha=0.2)
        handles = {label: handle for p in figure.axes for handle, label in zip(*p.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
        if title:
            figure.suptitle(title, x=0.01, ha="left")
        return _save(figure, file)


def _size(piece: Mapping[str, int]) -> int:
    return piece.get("granularity", 1)


def _save(figure: Figure, file: str | os.PathLike) -> Path:
    path = Path(file)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, facecolor="white")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
