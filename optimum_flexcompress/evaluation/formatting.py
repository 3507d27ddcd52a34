"""Numbers as people read them, and a plain table."""

from __future__ import annotations

import math
from collections.abc import Sequence


MISSING = "–"


def format_metric(value: float | None, unit: str) -> str:
    """A metric in its unit: `share` (0 to 1) and `percent` (0 to 100) as percentages, others with four digits."""
    if value is None:
        return MISSING
    if unit in ("share", "percent"):
        return f"{value * (100 if unit == 'share' else 1):.2f} %"
    return f"{value:.4g}"


def format_change(value: float | None, unit: str) -> str:
    """A signed difference; of percentages in points."""
    if value is None:
        return MISSING
    if unit in ("share", "percent"):
        return f"{value * (100 if unit == 'share' else 1):+.2f} pt"
    return f"{value:+.3g}"


def format_share(value: float | None) -> str:
    """0 to 1 as a percentage."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def format_count(value: float | None) -> str:
    """`22713216` as `22.7 M`."""
    return MISSING if value is None else _scaled(value, 1000, ("", " k", " M", " G", " T"))


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """`1 thread`, `2 threads`; without a plural, that is the word with an s."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def format_bytes(value: float | None) -> str:
    """`90868592` as `90.9 MB`."""
    return MISSING if value is None else _scaled(value, 1000, (" B", " kB", " MB", " GB", " TB"))


def format_seconds(value: float | None) -> str:
    """`0.0123` as `12.3 ms`."""
    if value is None:
        return MISSING
    if value >= 1:
        return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
    return f"{_three_digits(value * 1e3)} ms" if value >= 1e-3 else f"{_three_digits(value * 1e6)} µs"


def format_speedup(value: float | None) -> str:
    """`2.314` as `2.31x`."""
    return MISSING if value is None else f"{value:.2f}x"


def _scaled(value: float, step: int, names: Sequence[str]) -> str:
    power = min(int(math.log(value, step) + 1e-9), len(names) - 1) if value >= 1 else 0
    scaled = value / step**power
    return f"{value:.0f}{names[0]}" if power == 0 else f"{_three_digits(scaled)}{names[power]}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first one aligned left, the others right.

    Args:
        header: Column titles.
        rows: Cells.

    Returns:
        Lines without a trailing line break.
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
