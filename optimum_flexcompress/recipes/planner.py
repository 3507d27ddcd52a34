"""Plans which methods to stack for a budget: the recipe `full`, with the steps left out that do not pay.

A plan is nothing but settings of the recipe `full`, by the rules of `rules.py`: `--dry-run` prints the command with
`--recipe full` that does the same, for the budget and with the user's own settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FlexCompressError, nearest
from ..hub import fetch_model
from .budget import Budget
from .forecast import Facts, look, taken_as_it_is
from .inputs import check_model_and_data, open_data
from .rules import STAGES, Plan, decide
from .schema import Recipe, load_recipe
from .stages import INPUT, Choose
from .workspace import Workspace, resolved


if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "plan"
RECIPE = "full"


def planned_recipe(plan: Plan, budget: Budget, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a plan.

    Args:
        plan: The plan.
        budget: What was asked for, now: another budget chooses anew among what an earlier one has planned.
        overrides: The user's own settings, which win.
    """
    if budget.name is not None:
        _check_name(load_recipe(RECIPE, [*plan.overrides, *overrides]), budget.name)
    recipe = load_recipe(RECIPE, [*plan.overrides, *budget.overrides, *overrides])
    described = f"Planned: {', '.join(decision.rule for decision in plan.decisions if decision.applies)}."
    content = {"budget": dataclasses.asdict(budget), **plan.to_dict()}
    return dataclasses.replace(recipe, name=NAME, description=described, plan=content)


def _check_name(recipe: Recipe, name: str) -> None:
    stages = {spec.name: spec.stage for spec in recipe.stages}
    for stage in stages.values():
        if isinstance(stage, Choose) and name not in (known := stage.candidates(stages)):
            raise FlexCompressError(
                f"--choose {name} is not among the models that are measured.{nearest(name, known)}"
            )


def make_plan(
    model: str, dataset: str, task: str, budget: Budget, overrides: Sequence[str], say: Callable[[str], None]
) -> Plan:
    """Looks at model, data and machine, and applies the rules. Nothing is written.

    Args:
        model: Folder or Hub id.
        dataset: Anything that [`load_data`] takes.
        task: Name of a task.
        budget: What was asked for.
        overrides: The user's own settings.
        say: Receives lines for the user.

    Raises:
        FlexCompressError: The model or the data cannot be opened, or do not fit.
    """
    recipe = load_recipe(RECIPE, overrides)
    facts, skeleton = measure(recipe, model, dataset, task, say)
    refused: dict[str, str] = {}
    while True:
        plan = decide(facts, budget, refused)
        objection = _objection(planned_recipe(plan, budget, overrides), skeleton)
        if objection is None:
            return plan
        stage, reason = objection
        rule = next((rule for rule, stages in STAGES.items() if stage in stages and rule not in refused), None)
        if rule is None:
            raise FlexCompressError(f"stages.{stage}: {reason}")
        refused[rule] = reason


def _objection(recipe: Recipe, skeleton: PreTrainedModel) -> tuple[str, str] | None:
    """The first stage that says that it cannot run, and why."""
    models = {INPUT: skeleton}
    for spec in recipe.stages:
        try:
            models[spec.name] = spec.stage.check(models)
        except FlexCompressError as error:
            return spec.name, str(error)
    return None


def measure(
    recipe: Recipe, model: str, dataset: str, task: str, say: Callable[[str], None]
) -> tuple[Facts, PreTrainedModel]:
    """The facts about a model, data and this machine, for a recipe, and the model without its weights."""
    from ..tasks import get_task

    the_task = get_task(task)
    # Before the data, which may take a while.
    fetch_model(model)
    inputs = open_data(the_task, dataset, recipe.data, recipe.seed, say, held_out=recipe.held_out)
    skeleton = check_model_and_data(the_task, model, inputs, recipe.data)
    say("measuring int8 and a few training steps of the model on this machine; nothing is kept of it")
    return look(recipe, model, the_task, inputs, skeleton), skeleton


def earlier_plan(
    output: str | Path,
    model: str,
    dataset: str,
    task: str,
    budget: Budget,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Plan | None:
    """The plan of an earlier run in a folder, if it was one for the same model, data and task, however spelt.

    A run goes on by the plan that it was begun with: latencies measured anew might come out differently, and what is
    trained is not trained again for another budget. A target that is faster than what was planned for is the exception:
    more has to be compressed for it.

    Args:
        output: The folder.
        model: Folder or Hub id.
        dataset: Anything that [`load_data`] takes.
        task: Name of a task.
        budget: What is asked for now.
        overrides: The user's own settings.
        say: Receives a line where the plan was made for something else.

    Raises:
        FlexCompressError: The folder holds something else, or what was made of another model or data set.
    """
    from ..tasks import get_task

    workspace = Workspace(output)
    run = workspace.read_run_of(NAME)
    workspace.check_sources(run, model, dataset)
    plan = run.get("recipe", {}).get("plan")
    if not plan:
        return None
    changes = _changes(run, model, dataset, get_task(task).name)
    if run["recipe"]["data"] != load_recipe(RECIPE, overrides).to_dict()["data"]:
        changes.append("choice of rows or columns (data)")
    before, now = plan["budget"]["target_latency"], budget.target_latency
    # Nothing was compressed where int8 alone was fast enough.
    enough = any(decision["rule"] == "enough" and decision["applies"] for decision in plan["decisions"])
    faster = enough if now is None else before is not None and now < before
    if faster and budget.name is None:
        changes.append(f"target latency ({before:g} ms)")
    if changes:
        say(
            f"{output} holds a run of another {' and another '.join(changes)}: planning anew; stages that do not fit "
            "are made again."
        )
        return None
    return Plan.from_dict(plan)


def _changes(run: Mapping[str, Any], model: str, dataset: str, task: str) -> list[str]:
    """What an earlier run was given that is not what is given now, such as `model (bert)`."""
    before = {"model": run.get("model", ""), "data set": run.get("dataset", "")}
    # An earlier version has kept what the user wrote alone.
    sources = run.get("resolved", {}).values() or map(resolved, before.values())
    now = [resolved(model), resolved(dataset)]
    found = [f"{name} ({before[name]})" for name, source, same in zip(before, sources, now) if source != same]
    return found + ([f"task ({run.get('task')})"] if run.get("task") != task else [])


def time_table(recipe: Recipe, seconds: Mapping[str, float | None], facts: Facts) -> str:
    """The stages of a recipe and what they are going to take, by what [`forecast`] said of the same facts."""
    from ..evaluation.formatting import MISSING, text_table
    from .runner import clock

    rows = [
        [
            spec.name,
            "taking the model as it is: it is fine-tuned" if taken_as_it_is(spec, facts) else spec.stage.describe(),
            MISSING if seconds[spec.name] is None else clock(seconds[spec.name]),
        ]
        for spec in recipe.stages
    ]
    # Only the last column is one of figures.
    width = max(len(row[1]) for row in rows)
    rows = [[name, does.ljust(width), time] for name, does, time in rows]
    total = sum(value for value in seconds.values() if value is not None)
    return text_table(["stage", "does".ljust(width), "time (m:ss)"], [*rows, ["", "about".rjust(width), clock(total)]])
