"""Benchmarks made of cells: each a JSON file of its own, so that a run resumes where it stopped.

A cell that was not run stays empty in the tables, with the command that fills it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimum_flexcompress.evaluation.environment import environment_info
from optimum_flexcompress.output import write_text_atomically


class Cells:
    """The cells of a benchmark.

    Args:
        work: Folder of the cells, and of the models that they leave.
        options: What the cells depend on beside their names; a work folder serves one set of them.
        threads: Threads, for the environment that goes with the figures.
        results: What [`Cells.write`] wrote, perhaps on another machine. Where it is of the same options, cells that
            the work folder lacks are taken from it, without the models that they left.
    """

    def __init__(self, work: Path, options: dict[str, Any], threads: int, results: Path | None = None):
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        record = work / "options.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != options:
            raise SystemExit(f"{work} holds cells of other options ({record}): give another --work, or remove it.")
        write_text_atomically(record, json.dumps(options, indent=1) + "\n")
        self._options = options
        self._threads = threads
        if results is not None and results.is_file():
            self._adopt(json.loads(results.read_text(encoding="utf-8")), results)

    def _adopt(self, report: dict[str, Any], results: Path) -> None:
        if report["options"] != json.loads(json.dumps(self._options)):
            return
        missing = {name: cell for name, cell in report["cells"].items() if self.get(name) is None}
        for name, cell in missing.items():
            self._keep(name, {"environment": report["environment"], **cell})
        if missing:
            print(f"{len(missing)} cells from {results}")

    def folder(self, name: str) -> Path:
        """Where a cell may leave models."""
        return self.work / "models" / name

    def get(self, name: str) -> dict[str, Any] | None:
        """A cell's figures, or `None` where it has not been run."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def has_model(self, name: str) -> bool:
        """Whether a cell was run and the models are there that its `folder` or `folders` name."""
        found = self.get(name) or {}
        folders = [found["folder"]] if "folder" in found else list(found.get("folders", {}).values())
        return bool(folders) and all(Path(folder).is_dir() for folder in folders)

    def run(self, name: str, function: Callable[[], dict[str, Any]], model: bool = False) -> dict[str, Any]:
        """The figures of a cell, which is run where it has not been.

        Args:
            name: The cell, with slashes between what tells it from others.
            function: Runs it.
            model: Whether its models are needed as well: where only the figures are there, it is run again.
        """
        found = self.get(name)
        if found is not None and (not model or self.has_model(name)):
            return found
        print(f"-- {name}", flush=True)
        started = time.perf_counter()
        found = function()
        found["cell_seconds"] = time.perf_counter() - started
        self._keep(name, found)
        shown = {key: round(value, 4) for key, value in found.items() if isinstance(value, float)}
        print(f"-- {name}: {shown}", flush=True)
        return found

    def forget(self, name: str) -> None:
        """Has a cell run again the next time that it is wanted."""
        self._path(name).unlink(missing_ok=True)

    def _keep(self, name: str, cell: dict[str, Any]) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(cell, indent=1) + "\n")

    def write(self, path: Path) -> None:
        """Writes all cells into one file of results, without the folders of this machine."""
        found = {}
        for file in sorted((self.work / "cells").rglob("*.json")):
            name = file.relative_to(self.work / "cells").as_posix().removesuffix(".json")
            cell = json.loads(file.read_text(encoding="utf-8"))
            found[name] = {key: value for key, value in cell.items() if key not in ("folder", "folders")}
        report = {"environment": environment_info(self._threads), "options": self._options, "cells": found}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(report, indent=1) + "\n")

    def _path(self, name: str) -> Path:
        # Not with_suffix: names hold numbers with dots.
        return self.work / "cells" / f"{name}.json"


def mean_and_spread(values: list[float], digits: int, factor: float = 1.0) -> str:
    """The mean, and from two values on the standard deviation."""
    mean = factor * sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    spread = (sum((factor * value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"
