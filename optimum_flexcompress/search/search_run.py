"""What every search does around its candidates: limits, places, database, evolution, front and pick."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FlexCompressError
from ..evaluation.environment import busy_cores, environment_info
from ..output import check_output_folder
from .evolution import Candidate, Evolution
from .front import FRONT_FILE, Front, Point, pareto
from .held_out import HeldOut
from .store import Score, close_storage, open_storage


DATABASE = "search.db"
FOCUS = 0.05
"""Loss up to which configurations are bred from, unless the pick may lose half of that or more."""


class SearchRun:
    """One call of a search. Making it checks all that can be checked before anything is loaded.

    Args:
        output: Folder for front, pictures and, without `storage`, the database; nothing is written when `None`.
        storage: Database URL.
        objective: `"macs"` or `"latency"`.
        limits: `max_drop`, `max_cost` and `max_latency` of [`Front.pick`].
        save_pick: Folder for what is picked.
        picture: Whether to draw the front.

    Raises:
        FlexCompressError: A limit is wrong, a folder holds something else, or the storage cannot be opened.
        MissingExtraError: Something to draw or to search with is missing.
    """

    def __init__(
        self,
        output: str | os.PathLike | None,
        storage: str | None,
        *,
        objective: str,
        limits: Mapping[str, Any],
        save_pick: str | os.PathLike | None,
        picture: bool,
    ):
        self._objective, self._limits, self._save_pick = objective, dict(limits), save_pick
        self._asked = Front.check_limits(objective, **self._limits)
        if save_pick is not None:
            if not self._asked:
                raise FlexCompressError(
                    "save_pick needs something to pick by: give max_drop (--max-drop), max_cost (--max-cost) or "
                    "max_latency (--max-latency)."
                )
            check_output_folder(
                save_pick, option="--save-pick", advice="choose another folder for --save-pick, or remove it"
            )
        self._draw = None
        if picture and output is not None:
            from .picture import draw_front

            self._draw = draw_front
        self._folder = None if output is None else _check_folder(output)
        self._database = None if storage is None else open_storage(storage)

    def __call__(
        self,
        space: Any,
        scorer: Callable[[Candidate], Score],
        held_out: HeldOut,
        *,
        settings: dict[str, Any],
        options: Mapping[str, Any],
        weights: list[nn.Module],
        full_macs: float,
        describe: Callable[[Candidate], dict[str, Any]],
        save: Callable[[Front, str | os.PathLike], None],
        title: str,
        plural: str,
        population: int,
        trials: int,
        patience: int | None,
        seed: int,
        progress: bool,
        say: Callable[[str], None],
    ) -> Front:
        """Searches, writes the front, and picks.

        Args:
            space: The space.
            scorer: Scores a candidate of it.
            held_out: What the metric is measured on.
            settings: All that scores depend on; the search goes on from scores with the same.
            options: What else the front is to tell.
            weights: The modules that are searched: scores of other weights do not count.
            full_macs: Multiply-accumulates of the full model.
            describe: The JSON of a candidate.
            save: Writes the pick.
            title: What to say first.
            plural: What candidates are called.
            population: Candidates in a generation.
            trials: Candidates to score in all.
            patience: See [`Evolution`]; twice the population when `None`.
            seed: Of everything random.
            progress: Whether to show a progress bar.
            say: Receives lines for the user.
        """
        with ExitStack() as context:
            environment = environment_info(torch.get_num_threads())
            if self._objective == "latency":
                environment["busy_cores"] = busy_cores()
            evolution = Evolution(
                space,
                self._open(context),
                _study_name(space.kind, settings, held_out, weights, environment),
                greater_is_better=held_out.greater_is_better,
                population=population,
                trials=trials,
                patience=2 * population if patience is None else patience,
                focus=max(FOCUS, 2 * self._asked.get("max_drop", 0.0)),
                max_cost=None if "max_drop" in self._asked else self._asked.get("max_cost"),
                seed=seed,
            )
            say(title)
            if before := len(evolution.scores()):
                say(f"{before} {plural} were scored before: going on from there")
            evolution.run(scorer, progress=progress)
            front = self._front(evolution.scores(), space, held_out, settings, full_macs, describe)
            front.environment = environment
            front.options = {
                **settings,
                **options,
                "population": population,
                "trials": trials,
                "patience": evolution.patience,
                "seed": seed,
            }
            self._write(front)
            if self._folder is not None:
                say(f"front: {self._folder / FRONT_FILE}")
            if self._asked:
                front.pick(**self._limits)
                self._write(front)
                if self._save_pick is not None:
                    save(front, self._save_pick)
        return front

    def _open(self, context: ExitStack) -> Any:
        """The database, closed in the end."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        database = self._database
        if database is None:
            place = self._folder
            if place is None:
                place = Path(context.enter_context(tempfile.TemporaryDirectory(prefix="flexcompress-search-")))
            database = open_storage(f"sqlite:///{place / DATABASE}")
        context.callback(close_storage, database)
        return database

    def _write(self, front: Front) -> None:
        if self._folder is not None:
            front.save(self._folder)
            if self._draw is not None:
                self._draw(front, self._folder)

    def _front(
        self,
        scores: Mapping[Candidate, Score],
        space: Any,
        held_out: HeldOut,
        settings: Mapping[str, Any],
        full_macs: float,
        describe: Callable[[Candidate], dict[str, Any]],
    ) -> Front:
        latency = self._objective == "latency"
        full_cost = scores[space.full].details["milliseconds"] if latency else full_macs
        points = {
            candidate: Point(
                describe(candidate),
                score.metric,
                score.relative_cost * full_cost if latency else score.details["macs"],
                score.relative_cost,
                score.details,
            )
            for candidate, score in scores.items()
        }
        return Front(
            kind=space.kind,
            objective=self._objective,
            metric=held_out.metric,
            greater_is_better=held_out.greater_is_better,
            unit=held_out.unit,
            runtime=settings["runtime"],
            max_length=settings["max_length"],
            full=points[space.full],
            points=pareto(points.values(), held_out.greater_is_better),
            scored=sorted(points.values(), key=lambda point: point.cost),
        )


def _check_folder(output: str | os.PathLike) -> Path:
    """The folder of a search, which may hold an earlier one.

    Raises:
        FlexCompressError: It holds something else, or cannot be written.
    """
    folder = check_output_folder(output, overwrite=True)
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and not any((folder / file).exists() for file in (DATABASE, FRONT_FILE))
    ):
        raise FlexCompressError(f"{folder} is not empty and holds no earlier search: choose another folder.")
    return folder


def _study_name(
    kind: str, settings: dict, held_out: HeldOut, weights: list[nn.Module], environment: Mapping[str, Any]
) -> str:
    """The same for the same search, so that it goes on, and for no other, so that scores do not mix."""
    sha = hashlib.sha256(json.dumps([settings, held_out.digest()], sort_keys=True).encode())
    if settings["objective"] == "latency":
        sha.update(str(environment["cpu"]).encode())
    for module in weights:
        for name, tensor in sorted(module.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{kind}-{sha.hexdigest()[:24]}"
