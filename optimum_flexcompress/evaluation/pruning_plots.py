"""The pictures of a pruning: heads and what they attend to, sizes by layer, curves of the run."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .plots import COLOURS, INK, STYLE, Figure, rc_context, svg
from .pruning import JSON_NAME, LayerPruning, PruningReport


HEADS = "heads"
PAPER_INK = "#24292f"
DPI = 130
# What is shown of the kinds that attention goes to, in panels of their own; both neighbours make one.
PANELS = (
    ("special tokens", ("special",)),
    ("current token", ("current",)),
    ("neighbours", ("previous", "next")),
    ("content words", ("content",)),
    ("other words", ("other",)),
)
GONE = "#c9ced2"
KEPT, FFN = COLOURS[0], COLOURS[1]
# Of a bar with its number, and of all bars of a stack, in inches; in narrower ones the numbers stand upright.
BAR_WIDTH, WIDEST = 0.31, 8.0
# What has room beside another picture on a page, in inches.
NARROW = 7.5


def save_pictures(report: PruningReport, folder: str | os.PathLike) -> list[Path]:
    """Writes `pruning_<name>.png` for every picture.

    Args:
        report: What to draw.
        folder: An existing folder.

    Returns:
        The files.
    """
    files = []
    with _style(PAPER_INK):
        for name, figure in figures(report, PAPER_INK):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
            files.append(Path(folder) / f"pruning_{name}.png")
            files[-1].write_bytes(buffer.getvalue())
    return files


def of_folder(folder: str | os.PathLike) -> list[tuple[bool, str]]:
    """The pictures for a page.

    Args:
        folder: Of a model, or a file.

    Returns:
        For each whether it wants the whole width, and SVG; nothing where the folder says nothing of pruning.
    """
    if not (Path(folder) / JSON_NAME).is_file():
        return []
    report = PruningReport.load(folder)
    with rc_context(STYLE):
        return [(figure.get_figwidth() > NARROW, svg(figure)) for _, figure in figures(report)]


@contextmanager
def _style(ink: str) -> Iterator[None]:
    with rc_context({key: ink if value == INK else value for key, value in STYLE.items()}):
        yield


def figures(report: PruningReport, ink: str = INK) -> Iterator[tuple[str, Figure]]:
    """Every picture with its name, in the order in which they tell the story.

    Args:
        report: What to draw.
        ink: Colour of text and lines.
    """
    yield "sizes", sizes(report, ink)
    if report.attention is not None:
        for stack in report.stacks:
            if any(layer.heads for layer in report.stacks[stack]):
                yield HEADS if len(report.stacks) == 1 else f"{HEADS}_{stack}", heads(report, stack, ink)
        yield "attention", kept_and_removed(report, ink)
    if report.curves:
        yield "curves", curves(report, ink)


# -- Sizes --------------------------------------------------------------------------------------------------------


def sizes(report: PruningReport, ink: str) -> Figure:
    """Heads and FFN dims that are left, layer by layer, and the width of the residual stream."""
    stacks = report.stacks
    wanted = {name: BAR_WIDTH * len(layers) * len(_series_of(layers)) for name, layers in stacks.items()}
    widest = min(max([*wanted.values(), 4.2]), WIDEST)
    figure = Figure(figsize=(2.2 + widest, 0.4 + 2.9 * len(stacks)), layout="constrained")
    grid = figure.subplots(len(stacks), 2, width_ratios=[1.6, widest], squeeze=False)
    for axes in grid[1:, 0]:
        axes.set_axis_off()
    kept, of = report.hidden["kept"], report.hidden["of"]
    width = grid[0, 0]
    width.bar([0], [1.0], width=0.5, color=GONE)
    width.bar([0], [kept / of], width=0.5, color=COLOURS[2])
    width.annotate(f"{kept} of {of}", (0, kept / of), xytext=(0, 4), textcoords="offset points", ha="center")
    width.set_title("hidden dims")
    width.set_xlim(-0.9, 0.9)
    width.set_xticks([])
    tops = [1.18]
    for axes, (name, layers) in zip(grid[:, 1], stacks.items()):
        upright = wanted[name] > WIDEST
        _layer_bars(axes, layers, upright)
        axes.set_title(f"left of each layer of the {name}")
        tops.append(1.45 if upright else 1.18)
    for axes, top in zip((width, *grid[:, 1]), tops):
        axes.set_ylim(0, top)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.grid(True, axis="y")
    figure.suptitle(
        f"{report.sparsity:.1%} of the parameters of the layers are gone", x=0.01, ha="left", fontsize=11, color=ink
    )
    return figure


def _series_of(layers: list[LayerPruning]) -> list[tuple[str, str, list[tuple[int, int]]]]:
    """Label, colour, and for each layer how many are left of how many."""
    series = [("heads", KEPT, [(len(layer.kept_heads), layer.heads) for layer in layers])]
    if any(layer.cross_heads for layer in layers):
        counts = [(len(layer.kept_cross_heads), layer.cross_heads) for layer in layers]
        series.append(("cross-attention heads", COLOURS[4], counts))
    return [*series, ("FFN dims", FFN, [(layer.kept_ffn, layer.ffn) for layer in layers])]


def _layer_bars(axes: Any, layers: list[LayerPruning], upright: bool) -> None:
    series = _series_of(layers)
    width = 0.8 / len(series)
    for index, (label, colour, counts) in enumerate(series):
        places = [layer + (index - (len(series) - 1) / 2) * width for layer in range(len(layers))]
        axes.bar(places, [float(of > 0) for _, of in counts], width=0.92 * width, color=GONE)
        shares = [kept / of if of else 0.0 for kept, of in counts]
        axes.bar(places, shares, width=0.92 * width, color=colour, label=label)
        for place, share, (kept, _) in zip(places, shares, counts):
            axes.annotate(
                str(kept),
                (place, share),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                rotation=90 if upright else 0,
            )
    axes.set_xticks(range(len(layers)), [str(index + 1) for index in range(len(layers))])
    axes.set_xlabel("layer")
    axes.legend(frameon=False, fontsize=8, ncols=len(series), loc="upper right", borderaxespad=0.1)


# -- Heads --------------------------------------------------------------------------------------------------------


def heads(report: PruningReport, stack: str, ink: str) -> Figure:
    """Which heads are left, next to what each attended to before, and attends to now."""
    layers, attention = report.stacks[stack], report.attention
    across = max(layer.heads for layer in layers)
    cell = min(max(2.1 / across, 0.09), 0.3)
    panels = 1 + len(PANELS)
    figure = Figure(
        figsize=(1.3 + panels * (cell * across + 0.25), 1.0 + 2 * (cell * len(layers) + 0.4)), layout="constrained"
    )
    grid = figure.subplots(2, panels, squeeze=False, sharey=True)
    image = None
    for row, (when, shares) in enumerate((("before", attention["before"]), ("after", attention["after"]))):
        kept = [[1.0 if h in layer.kept_heads else 0.0 for h in range(layer.heads)] for layer in layers]
        if row == 0:
            _map(grid[0, 0], kept, across, "kept", cmap=_two_colours())
            grid[0, 0].set_ylabel("layer, before pruning")
        else:
            grid[1, 0].set_axis_off()
            grid[1, 0].text(0.5, 0.5, _counts(layers), transform=grid[1, 0].transAxes, ha="center", va="center")
            grid[1, 1].set_ylabel("layer, after pruning")
            grid[1, 1].tick_params(labelleft=True)
        for axes, (title, kinds) in zip(grid[row, 1:], PANELS):
            indices = [attention["kinds"].index(kind) for kind in kinds]
            values = [
                [float("nan") if head is None else sum(head[i] for i in indices) for head in heads_of]
                for heads_of in shares[stack]
            ]
            image = _map(axes, values, across, title if row == 0 else "", cmap="viridis", top=1.0)
            if when == "before":
                _cross_out(axes, layers, ink)
    bar = figure.colorbar(image, ax=grid[:, 1:], shrink=0.7, pad=0.01, label="share of the attention")
    bar.outline.set_visible(False)
    grid[1, 1 + len(PANELS) // 2].set_xlabel("head")
    figure.suptitle(
        f"{stack}: heads that are left, and what each attends to (removed ones crossed out)",
        x=0.01,
        ha="left",
        fontsize=11,
        color=ink,
    )
    return figure


def _counts(layers: list[LayerPruning]) -> str:
    left, of = sum(len(layer.kept_heads) for layer in layers), sum(layer.heads for layer in layers)
    return f"{left} of {of}\nheads left"


def _two_colours() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([GONE, KEPT])


def _map(axes: Any, values: list[list[float]], across: int, title: str, cmap: Any, top: float = 1.0) -> Any:
    """A heat map of layers by heads; where a layer has fewer heads the rest stays empty."""
    import numpy as np

    table = np.full((len(values), across), np.nan)
    for index, row in enumerate(values):
        table[index, : len(row)] = row
    # Cells of their own, not one bitmap: the map stays sharp in SVG.
    image = axes.pcolormesh(np.ma.masked_invalid(table), cmap=cmap, vmin=0.0, vmax=top, edgecolors="white", lw=0.6)
    axes.invert_yaxis() if not axes.yaxis_inverted() else None
    axes.set_aspect("equal")
    step = max(across // 6, 1)
    axes.set_xticks([h + 0.5 for h in range(0, across, step)], [str(h + 1) for h in range(0, across, step)])
    axes.set_yticks([i + 0.5 for i in range(len(values))], [str(i + 1) for i in range(len(values))])
    axes.tick_params(length=0, labelsize=7.5)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(title)
    return image


def _cross_out(axes: Any, layers: list[LayerPruning], ink: str) -> None:
    gone = [
        (head + 0.5, index + 0.5)
        for index, layer in enumerate(layers)
        for head in range(layer.heads)
        if head not in layer.kept_heads
    ]
    if gone:
        axes.scatter(*zip(*gone), marker="x", s=14, color="white", linewidths=1.0)


def kept_and_removed(report: PruningReport, ink: str) -> Figure:
    """Mean attention of the heads that are left, before and after, and of those that are gone."""
    attention = report.attention
    groups: dict[str, list[list[float]]] = {"removed heads, before": [], "kept heads, before": [], "after": []}
    for stack, layers in report.stacks.items():
        for index, layer in enumerate(layers):
            for head in range(layer.heads):
                kept = head in layer.kept_heads
                name = "kept heads, before" if kept else "removed heads, before"
                groups[name].append(attention["before"][stack][index][head])
                if kept:
                    groups["after"].append(attention["after"][stack][index][head])
    groups["the same heads, after"] = groups.pop("after")
    rows = {f"{name} ({len(found)})": found for name, found in groups.items() if found}
    figure = Figure(figsize=(7.4, 1.6 + 0.46 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, found in enumerate(rows.values()):
        start = 0.0
        for index, kind in enumerate(attention["kinds"]):
            share = sum(head[index] for head in found) / len(found)
            label = kind if place == 0 else None
            axes.barh(place, share, left=start, height=0.62, color=COLOURS[index], label=label)
            if share > 0.045:
                axes.text(
                    start + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=8.5, color="white"
                )
            start += share
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.legend(
        frameon=False, ncols=len(attention["kinds"]), loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=8.5
    )
    axes.set_title(f"what attention goes to, mean over heads ({attention['tokens']:,} tokens)")
    return figure


# -- The run ------------------------------------------------------------------------------------------------------


def curves(report: PruningReport, ink: str) -> Figure:
    """Sparsity and its target, and the terms of the loss, over the steps of the run."""
    names = list(dict.fromkeys(name for entry in report.curves for name in entry))
    # The KL term has a weight of a millionth, and would lie far above all others.
    terms = [name for name in names if name.startswith("loss_") and name != "loss_vib_kl"]
    losses = ["loss", *sorted(terms, key=lambda name: name != "loss_task")]
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    sparsities = (("vib_target", "target", GONE), ("vib_sparsity", "reached", KEPT))
    for name, label, colour in sparsities:
        steps, values = _series(report, name)
        if steps:
            left.plot(steps, values, color=colour, label=label, linewidth=2.4 if name == "vib_target" else 1.5)
    left.set_title("sparsity of the masks")
    left.set_ylim(0, 1)
    shown = 0
    for name in losses:
        steps, values = _series(report, name)
        if steps and max(values) > 0 and min(values) >= 0:
            kept = [(step, value) for step, value in zip(steps, values) if value > 0]
            label = "whole loss" if name == "loss" else name.removeprefix("loss_").replace("_", " ")
            again, colour = divmod(shown, len(COLOURS))
            style = ("-", "--", ":")[min(again, 2)]
            right.plot(*zip(*kept), style, color=COLOURS[colour], label=label, linewidth=1.4)
            shown += 1
    right.set_yscale("log")
    right.set_title("loss and its terms, without their weights")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(True)
        if axes.get_legend_handles_labels()[0]:
            # Curves of losses go everywhere.
            outside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if axes is right else {}
            axes.legend(frameon=False, fontsize=8, **outside)
    return figure


def _series(report: PruningReport, name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in report.curves if name in entry]
    return [step for step, _ in points], [value for _, value in points]
