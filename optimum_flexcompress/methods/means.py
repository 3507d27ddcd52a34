"""Figures of single steps, averaged from one log to the next."""

from __future__ import annotations

from collections.abc import Mapping


class Means:
    """Means of named figures over the steps since they were last taken."""

    def __init__(self):
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, figures: Mapping[str, float]) -> None:
        """Adds what one step, or one pass of it, came to; always under the same names."""
        self._count += 1
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """The means, and starts anew; empty where nothing was added."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means
