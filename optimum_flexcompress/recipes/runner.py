"""Runs a recipe stage by stage, and skips what an earlier run has finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import FlexCompressError, disk_is_full
from ..hub import fetch_model
from .cards import write_cards
from .fingerprint import digest, fingerprint
from .inputs import check_model_and_data, open_data
from .schema import Recipe
from .stages import INPUT, StageContext, StageSpec
from .workspace import Manifest, Workspace, resolved


@dataclass
class RecipeResult:
    """What a run left behind.

    Attributes:
        output: The output folder.
        folders: Stage name to its folder, in order.
        metrics: Stage name to the figures it reported.
        skipped: Stages that an earlier run had finished.
        seconds: How long this run took.
    """

    output: Path
    folders: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


def say_at_once(line: str) -> None:
    """Prints a line so that it keeps its place among the progress bars, also in a log file."""
    print(line, flush=True)


def run_recipe(
    recipe: Recipe,
    model: str,
    dataset: str,
    task: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = say_at_once,
    names: Mapping[str, str] | None = None,
    expected: Mapping[str, float | None] | None = None,
) -> RecipeResult:
    """Compresses `model` by `recipe`.

    A stage is skipped when an earlier run in `output` finished it with the same settings and the same inputs. A
    training stage that was interrupted goes on from its last checkpoint. Nothing is written before the model, the
    data set and every stage have been checked.

    Args:
        recipe: From [`load_recipe`].
        model: Folder or Hub id.
        dataset: Anything that [`load_data`] takes.
        task: Name of a task, such as "text-classification".
        output: New folder, or the folder of an earlier run.
        overwrite: Run every stage again; each result is replaced when its successor is complete.
        say: Receives the lines meant for the user.
        names: By stage, what its model is called in its card, such as its id on the Hub; by default, the stage.
        expected: Seconds that stages are going to take, by what [`forecast`] said; what is left is then shown.

    Raises:
        FlexCompressError: See above; also from any stage.
    """
    from ..tasks import get_task

    workspace = Workspace(output)
    previous = workspace.read_run() if overwrite else workspace.read_run_of(recipe.name)
    if not overwrite:
        workspace.check_sources(previous, model, dataset)
    the_task = get_task(task)
    # Before the data, which may take a while. By its id it is then found in the cache.
    fetch_model(model)
    inputs = open_data(the_task, dataset, recipe.data, recipe.seed, say, held_out=recipe.held_out)
    models = {INPUT: check_model_and_data(the_task, model, inputs, recipe.data)}
    for spec in recipe.stages:
        try:
            models[spec.name] = spec.stage.check(models)
        except FlexCompressError as error:
            raise FlexCompressError(f"stages.{spec.name}: {error}") from error
    run = _Run(
        recipe=recipe,
        workspace=workspace,
        context=StageContext(
            name="",
            task=the_task,
            data=inputs.data,
            label_names=inputs.label_names,
            data_settings=recipe.data,
            dataset=str(dataset),
            seed=recipe.seed,
            artifacts={INPUT: model},
            output=Path(),
            scratch=Path(),
            say=say,
            held_out=inputs.held_out,
        ),
        dataset_digest=fingerprint(dataset),
        ids={INPUT: fingerprint(model)},
        overwrite=overwrite,
        expected={name: value for name, value in (expected or {}).items() if value is not None},
    )
    stages = [spec.name for spec in recipe.stages]
    # The folders of stages that the recipe no longer has stay until the new results are complete.
    obsolete = [name for name in previous.get("stages", []) if name not in stages]
    with workspace.lock():
        workspace.write_run(
            {
                "recipe": {"name": recipe.name, **recipe.to_dict()},
                "model": str(model),
                "dataset": str(dataset),
                # What another command compares with, from wherever it is run.
                "resolved": {"model": resolved(model), "dataset": resolved(dataset)},
                "sources": {"model": run.ids[INPUT], "dataset": run.dataset_digest},
                "task": the_task.name,
                "stages": stages + obsolete,
            }
        )
        for position, spec in enumerate(recipe.stages, start=1):
            run.stage(spec, f"[{position}/{len(stages)}] {spec.name}")
        workspace.remove_stages(obsolete)
        write_cards(recipe, run.result.folders, model, dataset, names or {})
        workspace.clear_scratch()
    run.result.seconds = time.monotonic() - run.started
    say(f"\nfinished in {clock(run.result.seconds)}; everything is in {workspace.path}")
    for spec in recipe.stages:
        say(f"  {spec.name:<12} {spec.stage.produces:<14} {run.result.folders[spec.name] / spec.stage.entry_point}")
    return run.result


@dataclass
class _Run:
    """One run under way.

    Attributes:
        context: Made ready for the stages but for what differs between them.
        dataset_digest: Identifies the data set's content.
        ids: Identifies what each stage has written; a stage that reads it runs again when it changes.
        expected: Seconds that stages from here on are going to take, as far as that is known.
    """

    recipe: Recipe
    workspace: Workspace
    context: StageContext
    dataset_digest: str
    ids: dict[str, str]
    overwrite: bool
    expected: dict[str, float]
    started: float = field(default_factory=time.monotonic)
    result: RecipeResult = field(init=False)

    def __post_init__(self):
        self.result = RecipeResult(output=self.workspace.path)

    def stage(self, spec: StageSpec, title: str) -> None:
        """Runs one stage, or takes over what it has left."""
        say = self.context.say
        manifest = Manifest(digest=self._digest(spec))
        finished = None if self.overwrite else self.workspace.finished(spec.name)
        if finished is not None and finished.digest == manifest.digest:
            say(f"{title}: finished in an earlier run, skipped")
            self.result.skipped.append(spec.name)
            manifest = finished
        else:
            why = "" if finished is None else "; its settings or inputs have changed"
            left = f", about {clock(sum(self.expected.values()))} left" if self.expected else ""
            say(f"{title}: {spec.stage.describe()} (at {clock(time.monotonic() - self.started)}{left}{why})")
            self._execute(spec, manifest)
            say(f"{title}: done in {clock(manifest.seconds)}{_figures(manifest.metrics)}")
        self.expected.pop(spec.name, None)
        folder = self.workspace.stage_folder(spec.name)
        self.ids[spec.name] = manifest.id
        self.context.artifacts[spec.name] = folder
        self.result.folders[spec.name] = folder
        self.result.metrics[spec.name] = manifest.metrics

    def _execute(self, spec: StageSpec, manifest: Manifest) -> None:
        from transformers import set_seed

        if self.overwrite:
            self.workspace.clear_scratch(spec.name)
        # Every stage starts from the same random state, whether or not the ones before it were skipped.
        set_seed(self.recipe.seed)
        started = time.monotonic()
        with self.workspace.write_stage(spec.name, manifest) as folder:
            self.context.name = spec.name
            self.context.output = folder
            self.context.scratch = self.workspace.scratch(spec.name, manifest.digest)
            try:
                manifest.metrics = spec.stage.run(self.context)
            except (OSError, RuntimeError, SafetensorError) as error:
                # Looked at before the half-written folder is removed, which makes room.
                if disk_is_full(error, self.workspace.path):
                    raise FlexCompressError(
                        f"the disk of {self.workspace.path} is full: make room and run the same command again; the "
                        "stages that finished are kept."
                    ) from error
                raise
            manifest.seconds = round(time.monotonic() - started, 1)
        self.workspace.clear_scratch(spec.name)

    def _digest(self, spec: StageSpec) -> str:
        return digest(
            {
                "type": spec.type,
                "settings": spec.resolved,
                "seed": self.recipe.seed,
                "data": self.recipe.to_dict()["data"],
                "task": self.context.task.name,
                "dataset": self.dataset_digest,
                "inputs": {name: self.ids[name] for name in spec.stage.inputs()},
                **({"files": files} if (files := [fingerprint(file) for file in spec.stage.files()]) else {}),
                # They are missing from the examples to train on.
                **({"held_out": self.recipe.held_out} if self.recipe.held_out else {}),
            }
        )


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _figures(metrics: dict[str, Any]) -> str:
    shown = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)]
    return f": {', '.join(shown)}" if shown else ""
