"""Searches for the assemblies of a modular checkpoint that are worth choosing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ..errors import FlexCompressError
from ..evaluation.artifact import Artifact, model_artifact
from ..evaluation.benchmark import using_threads
from ..evaluation.cost import count_macs
from ..evaluation.inputs import example_batch
from ..evaluation.latency import measure_side_by_side
from ..evaluation.workloads import forward_inputs, runner
from ..hub import fetch_model
from ..methods.modular import Assembly, ModularModel
from ..tasks import get_task, infer_task
from ..tasks.base import Task, effective_length
from .assembly_space import AssemblySpace
from .evolution import Candidate, check_counts
from .front import Front
from .held_out import HeldOut, open_held_out
from .length_scoring import OBJECTIVES, Timed, check_choice
from .search_run import SearchRun
from .store import Score


logger = logging.getLogger(__name__)


class AssemblyScorer:
    """Scores assemblies: the full model is routed through them, and nothing is copied unless time is measured.

    Args:
        modular: The model with its modules.
        space: The space.
        held_out: What the metric is measured on.
        objective: `"macs"` or `"latency"`.
        timed: What to time, or to count.
        task: What the model is for.
    """

    def __init__(
        self,
        modular: ModularModel,
        space: AssemblySpace,
        held_out: HeldOut,
        objective: str,
        timed: Timed,
        task: Task,
    ):
        self._modular, self._space, self._held_out = modular, space, held_out
        self._objective, self._timed, self._task = objective, timed, task
        self._full = model_artifact(modular.model, task)
        self.full_macs, self._layer_macs = self._count()

    def _count(self) -> tuple[float, dict[str, float]]:
        """What the full model and one layer of each stack cost: layers of a stack are alike."""
        batch = example_batch(self._modular.model.config, self._task, 1, self._timed.length)
        batch = forward_inputs(self._full, batch, self._timed.new_tokens)
        full = count_macs(self._modular.model, batch)
        smallest, found = self._modular.smallest().stacks, {}
        for name, pieces in smallest.items():
            with self._modular.routed(Assembly({name: pieces})) as routed:
                less = full - count_macs(routed, batch)
            gone = self._modular.depths[name] - len(pieces)
            found[name] = less / gone if gone else 0.0
        return full, found

    def macs(self, assembly: Assembly) -> float:
        """Multiply-accumulates of one input."""
        depths = self._modular.depths
        return self.full_macs - sum(
            (depths[name] - len(pieces)) * self._layer_macs[name] for name, pieces in assembly.stacks.items()
        )

    def __call__(self, candidate: Candidate) -> Score:
        """Scores one candidate."""
        assembly = self._space.assembly(candidate)
        with self._modular.routed(assembly):
            metric = self._held_out.score(self._full)
        macs = self.macs(assembly)
        relative = macs / self.full_macs
        details: dict[str, Any] = {"macs": macs, "layers": assembly.layers, "name": _name(assembly)}
        if self._objective == "latency":
            with self._artifact(assembly) as artifact:
                relative, times = self._time(artifact)
            details.update(times)
        return Score(metric, relative, details)

    @contextmanager
    def _artifact(self, assembly: Assembly) -> Iterator[Artifact]:
        if assembly.ratio == 1:
            yield self._full
        else:
            yield model_artifact(self._modular.assemble(assembly).eval(), self._task)

    def _time(self, artifact: Artifact) -> tuple[float, dict[str, float]]:
        timed = self._timed
        batch = example_batch(artifact.config, self._task, timed.batch_size, timed.length)
        runs = {"full": runner(self._full, batch, timed.new_tokens)}
        if artifact is not self._full:
            runs["candidate"] = runner(artifact, batch, timed.new_tokens)
        timings = measure_side_by_side(
            runs, rounds=timed.rounds, max_seconds=timed.max_seconds, threads=timed.threads, progress=False
        )
        full, own = timings["full"], timings.get("candidate", timings["full"])
        relative = 1.0 if own is full else 1 / own.speedup_over(full)
        return relative, {"milliseconds": own.median * 1e3, "full_milliseconds": full.median * 1e3}


def search_assemblies(
    model: ModularModel | str | os.PathLike,
    data: Any,
    task: str | Task | None = None,
    output: str | os.PathLike | None = None,
    *,
    objective: str = "macs",
    max_drop: float | str | None = None,
    max_cost: float | str | None = None,
    max_latency: float | None = None,
    save_pick: str | os.PathLike | None = None,
    processor: Any = None,
    split: str | None = None,
    samples: int | None = 1000,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    metric: str | None = None,
    population: int = 20,
    trials: int = 150,
    patience: int | None = None,
    storage: str | None = None,
    seed: int = 42,
    batch_size: int = 32,
    latency_batch_size: int = 1,
    new_tokens: int = 32,
    threads: int | None = None,
    picture: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = logger.info,
) -> Front:
    """Searches for assemblies that lose little and cost little, and writes their front.

    It is the search of [`search_lengths`] over other candidates, and goes on from its database in the same way.

    Args:
        model: A modular checkpoint, in memory or as a folder.
        data: See [`optimum_flexcompress.data.load_data`].
        task: What the model is for; by default what its class says.
        output: Folder for `front.json`, the pictures and, unless `storage` names another one, the database. It may
            hold an earlier search.
        objective: What to trade the metric against: `"macs"` of one input, or `"latency"`, measured here in PyTorch in
            turn with the full model.
        max_drop: Pick the cheapest assembly that loses at most this share of the metric: `0.01` or `"1%"`.
        max_cost: Pick within this share of the full model's cost: `0.5` or `"50%"`. Without `max_drop`, the search
            looks most closely at what costs about as much.
        max_latency: Pick within so many milliseconds a batch, where latency is searched.
        save_pick: Folder for the model assembled from the pick.
        processor: Tokenizer or image processor of a model in memory.
        split: Split to score on; by default `validation`, else a part of `train`, see
            [`optimum_flexcompress.search.hold_out`].
        samples: How many examples to score on; all when `None`.
        columns: See [`Task.find_columns`].
        max_length: Length of the inputs; by default the task's.
        metric: A metric of the task, or `"loss"`; by default the task's main one.
        population: Assemblies in a generation.
        trials: Assemblies to score in all.
        patience: End when so many in a row have not moved the front; 0: never; by default twice the population.
        storage: Database URL, such as `sqlite:////tmp/search.db` or `postgresql://...`.
        seed: Of everything random.
        batch_size: Rows at a time while scoring.
        latency_batch_size: Rows of the batch that is timed.
        new_tokens: Tokens to generate at most while scoring, and while timing models that generate.
        threads: Threads; PyTorch's present number when `None`.
        picture: Whether to draw the front, which needs the extra `report`.
        progress: Whether to show progress bars.
        say: Receives lines for the user.

    Returns:
        The front; with a limit given, `front.picked` is the choice. `Assembly.from_dict(point.candidate)` reads a point.

    Raises:
        FlexCompressError: It is no modular checkpoint, data or storage cannot be opened, an argument is wrong, or no
            assembly keeps the limits; in the last case the front has been written.
        MissingExtraError: Optuna, or matplotlib for the picture, is missing.
    """
    check_choice("objective", objective, OBJECTIVES)
    check_counts(batch_size=batch_size, latency_batch_size=latency_batch_size, new_tokens=new_tokens, trials=trials)
    run = SearchRun(
        output,
        storage,
        objective=objective,
        limits={"max_drop": max_drop, "max_cost": max_cost, "max_latency": max_latency},
        save_pick=save_pick,
        picture=picture,
    )
    modular, source = (
        (model, None) if isinstance(model, ModularModel) else (ModularModel.from_pretrained(model), model)
    )
    if source is None and (task is None or processor is None):
        raise FlexCompressError("A search on a model in memory needs task=... and processor=....")
    task = get_task(task if task is not None else infer_task(fetch_model(source)))
    processor = task.load_processor(source) if processor is None else processor
    length = effective_length(max_length or task.default_max_length, processor)
    held_out = open_held_out(
        data,
        task,
        processor,
        modular.model.config,
        split=split,
        samples=samples,
        columns=columns,
        max_length=length,
        metric=metric,
        batch_size=batch_size,
        max_new_tokens=new_tokens,
        seed=seed,
    )
    with using_threads(threads) as threads:
        timed = Timed(latency_batch_size, length, new_tokens, threads=threads)
        space = AssemblySpace(modular)
        settings = {
            "kind": space.kind,
            "task": task.name,
            "objective": objective,
            "runtime": "pytorch",
            "max_length": length,
            "metric": held_out.metric,
            "examples": held_out.where,
            **({"timed": asdict(timed)} if objective == "latency" else {}),
        }
        scorer = AssemblyScorer(modular, space, held_out, objective, timed, task)
        held_out.compare_with(model_artifact(modular.model, task))

        def save(front: Front, folder: str | os.PathLike) -> None:
            modular.save_assembled(Assembly.from_dict(front.picked.candidate), folder, source=source)

        return run(
            space,
            scorer,
            held_out,
            settings=settings,
            options={},
            weights=[modular.model, modular.modules],
            full_macs=scorer.full_macs,
            describe=lambda candidate: space.assembly(candidate).to_dict(),
            save=save,
            title=f"Searching {space.size:,} assemblies on {held_out.where}: {held_out.metric} against {objective}",
            plural="assemblies",
            population=population,
            trials=trials,
            patience=patience,
            seed=seed,
            progress=progress,
            say=say,
        )


def _name(assembly: Assembly) -> str:
    return "; ".join(assembly.summary().splitlines())
