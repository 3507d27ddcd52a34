"""Pictures of token dropping: how many tokens each layer keeps, and which words they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FlexCompressError
from ..token_dropping import LengthConfig
from .plots import COLOURS, INK, STYLE, colours, svg
from .tokens import TokenTrace, step_name


# Imported after `plots`, which says what to install where matplotlib is missing.
from matplotlib import rc_context  # isort: skip
from matplotlib.figure import Figure  # isort: skip
from matplotlib.font_manager import FontProperties  # isort: skip
from matplotlib.patches import FancyBboxPatch  # isort: skip
from matplotlib.textpath import TextToPath  # isort: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import Report
    from .tokens import Word

PICTURE_ENDINGS = (".png", ".svg", ".pdf")
# Bars with numbers above them; more would run into each other.
NUMBERED = 18

_WIDTH = 9.6
_LABEL = 1.5
_LINE = 0.235
_SIZE = 10.5


def plot_lengths(
    lengths: Mapping[str, Any],
    length: int,
    path: str | os.PathLike | None = None,
    *,
    layers: int | None = None,
) -> Figure:
    """Tokens kept per layer, as bars.

    Args:
        lengths: Name to length configuration, as for [`set_lengths`]; one that keeps everything needs `layers`.
        length: Tokens of the input.
        path: Where to write the picture: `.png`, `.svg` or `.pdf`.
        layers: How many layers the encoder has, for `"full"`.

    Returns:
        The figure.

    Raises:
        FlexCompressError: There is no configuration, or it is not known for how many layers.
    """
    kept = {}
    for name, value in lengths.items():
        config = LengthConfig.parse(value)
        if config is None and layers is None:
            raise FlexCompressError(f"{name} keeps all tokens: give layers=, the number of layers to draw it for.")
        kept[name] = [length] * layers if config is None else config.at(length)
    figure = plot_kept([(f"tokens kept of {length}", float(length), kept)])
    if path is not None:
        save_figure(figure, path)
    return figure


def kept_of_report(report: Report) -> list[str]:
    """Tokens kept per layer by the models of a benchmark that drop some, as SVG for a page."""
    with rc_context(STYLE):
        return [svg(plot_kept([panel], colours(report))) for panel in panels_of(report)]


def save_pictures(report: Report, folder: Path) -> None:
    """Writes the pictures of a benchmark's page that are about dropped tokens, as PNG."""
    panels = panels_of(report)
    if panels:
        save_figure(plot_kept(panels, colours(report)), folder / "tokens-kept.png")
    for model in report.models:
        if model.words and "note" not in model.words:
            name = re.sub(r"[^\w.-]+", "-", model.name)
            TokenTrace.from_dict(model.words).save(folder / f"words-{name}.png", f"{model.name}: words by layer")


def panels_of(report: Report) -> list[tuple[str, float, dict[str, list[float]]]]:
    """What [`plot_kept`] draws of a benchmark: the longest input that was timed, and the data set on average."""
    dropping = {model.name: model.lengths for model in report.models if model.lengths}
    panels = []
    for key, title in (("kept", "tokens kept of {:.0f}"), ("real", "real lengths: tokens kept of {:.1f} on average")):
        found = {name: lengths[key] for name, lengths in dropping.items() if key in lengths}
        if found:
            tokens = max(lengths["input"] for lengths in found.values())
            kept = {name: lengths["layers"] for name, lengths in found.items()}
            panels.append((title.format(tokens), tokens, kept))
    return panels


def plot_kept(
    panels: Sequence[tuple[str, float, Mapping[str, Sequence[float]]]], palette: Mapping[str, str] | None = None
) -> Figure:
    """Tokens kept per layer, side by side for several inputs.

    Args:
        panels: For each input what to call it, its tokens, and by name the tokens kept by each layer.
        palette: A colour for each name.

    Raises:
        FlexCompressError: There is nothing to draw.
    """
    names = list(panels[0][2]) if panels else []
    if not names:
        raise FlexCompressError("There is no length configuration to draw: name at least one.")
    palette = palette or {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6 * len(panels), 3.3), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, tokens, kept) in zip(all_axes, panels, strict=True):
            _kept_bars(axes, tokens, kept, palette)
            axes.set_title(title)
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=min(len(names), 4), frameon=False)
    return figure


def _kept_bars(axes: Axes, tokens: float, kept: Mapping[str, Sequence[float]], palette: Mapping[str, str]) -> None:
    width = 0.82 / len(kept)
    layers = max(map(len, kept.values()))
    for index, (name, values) in enumerate(kept.items()):
        places = [layer + (index - (len(kept) - 1) / 2) * width for layer in range(len(values))]
        axes.bar(places, values, width=width * 0.92, color=palette[name], label=name)
        if layers * len(kept) <= NUMBERED:
            for place, value in zip(places, values, strict=True):
                shown = f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"
                axes.annotate(
                    shown, (place, value), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7.5
                )
    axes.axhline(tokens, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
    axes.annotate("all", (1, tokens), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
                  va="center", fontsize=8)  # fmt: skip
    axes.set_xticks(range(layers), [str(layer + 1) for layer in range(layers)])
    axes.set_xlabel("after layer")
    axes.set_ylim(0, tokens * 1.12)
    axes.tick_params(bottom=False)
    axes.grid(True, axis="y")


@dataclass
class _Placed:
    """A piece of a word and where it stands: inches from the left, number of the line."""

    text: str
    survives: int
    special: bool
    x: float
    line: int
    width: float


def plot_words(trace: TokenTrace, title: str = "Which words survive to which layer") -> Figure:
    """The text once for the input and once for each layer; words fade where they are dropped.

    Args:
        trace: What [`trace_tokens`] returned.
        title: Stands above.
    """
    placed, lines = _lay_out(trace.words, _WIDTH - _LABEL - 0.3)
    steps = trace.steps()
    block = lines * _LINE + 0.16
    head = 0.75
    height = head + block * len(steps)
    counts = [trace.tokens, *trace.counts]
    with rc_context({**STYLE, "font.size": _SIZE}):
        figure = Figure(figsize=(_WIDTH, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, _WIDTH)
        axes.set_ylim(height, 0)
        axes.set_axis_off()
        axes.text(0.2, 0.27, title, fontsize=12.5, weight="bold", va="center", parse_math=False)
        axes.text(0.2, 0.53, trace.describe(), fontsize=9, alpha=0.7, va="center", parse_math=False)
        for row, (first, last) in enumerate(steps):
            top = head + row * block
            if row % 2 == 0:
                axes.axhspan(top - 0.02, top + block - 0.02, color=INK, alpha=0.035, linewidth=0)
            middle = top + _LINE / 2 + 0.06
            axes.text(0.2, middle, step_name(first, last), fontsize=9, va="center", weight="bold")
            axes.text(_LABEL - 0.1, middle, str(counts[last]), fontsize=9, va="center", ha="right", alpha=0.75)
            for piece in placed:
                _draw_piece(axes, piece, middle + piece.line * _LINE, first, last)
    return figure


def _draw_piece(axes: Axes, piece: _Placed, y: float, first: int, last: int) -> None:
    kept = piece.survives >= last
    # Dropped by the first layer of this run, so there in the row above.
    falling = not kept and piece.survives >= first - 1
    style = {"va": "center", "parse_math": False, "fontsize": _SIZE - (2.5 if piece.special else 0)}
    if kept:
        box = FancyBboxPatch(
            (_LABEL + piece.x + 0.004, y - 0.095),
            piece.width - 0.008,
            0.19,
            boxstyle="round,pad=0,rounding_size=0.03",
            facecolor=COLOURS[0],
            alpha=0.16,
            linewidth=0,
        )
        axes.add_patch(box)
        axes.text(_LABEL + piece.x, y, piece.text, alpha=0.6 if piece.special else 1.0, **style)
        return
    axes.text(_LABEL + piece.x, y, piece.text, alpha=0.42 if falling else 0.13, **style)
    if falling:
        axes.plot([_LABEL + piece.x, _LABEL + piece.x + piece.width], [y, y], color=INK, alpha=0.45, linewidth=0.8)


def _lay_out(words: Sequence[Word], width: float) -> tuple[list[_Placed], int]:
    """Breaks words into lines of `width` inches; returns the pieces and the number of lines."""
    space = _measure(" ", _SIZE) + 0.02
    placed: list[_Placed] = []
    x, line = 0.0, 0
    for group in _unbroken(words):
        pieces = [
            (text, count, word.special, _measure(text, _SIZE - (2.5 if word.special else 0)))
            for word in group
            for text, count in zip(word.pieces, word.survives, strict=True)
        ]
        whole = sum(piece[3] for piece in pieces)
        if x > 0 and x + space + whole > width:
            x, line = 0.0, line + 1
        elif x > 0:
            x += space
        for text, count, special, wide in pieces:
            placed.append(_Placed(text, count, special, x, line, wide))
            x += wide
    return placed, line + 1


def _unbroken(words: Sequence[Word]) -> list[list[Word]]:
    """Words with no white space between them stay on one line."""
    groups: list[list[Word]] = []
    for word in words:
        if word.space or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def _measure(text: str, size: float) -> float:
    """Width in inches."""
    width, _, _ = TextToPath().get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
    return width / 72


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure, dark on white.

    Args:
        figure: The figure.
        path: The file; its ending says the format.

    Raises:
        FlexCompressError: The ending is not one of `PICTURE_ENDINGS`.
    """
    path = Path(path)
    if path.suffix not in PICTURE_ENDINGS:
        raise FlexCompressError(f"{path.name} is no picture: give it one of the endings {', '.join(PICTURE_ENDINGS)}.")
    figure.savefig(path, dpi=160, facecolor="white")
