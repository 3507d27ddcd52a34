"""The cards of the models that a recipe has made, with what its benchmark measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .budget import Budget


if TYPE_CHECKING:
    from .schema import Recipe
    from .stages import StageSpec


def write_cards(
    recipe: Recipe, folders: Mapping[str, Path], model: str, dataset: str, names: Mapping[str, str]
) -> None:
    """Writes the card of every compressed model; those that somebody else wrote stay.

    Args:
        recipe: A recipe whose stages have all finished.
        folders: Their folders.
        model: What the recipe started from: a folder or an id on the Hub.
        dataset: What it was trained and measured on.
        names: By stage, what its model is called; the stage's name where there is none.
    """
    from ..data import is_hub_dataset
    from ..evaluation.report import Report
    from ..model_card import Measured, own_sections, write_model_card
    from .stages.choice import CHOOSING

    reports = [folders[spec.name] for spec in recipe.stages if spec.stage.produces == "report"]
    report = Report.load(reports[-1]) if reports else None
    measured = {} if report is None else {result.name for result in report.models}
    dataset_id = dataset.partition(":")[0] if is_hub_dataset(dataset) else None
    for spec in recipe.stages:
        if not spec.stage.makes_model:
            continue
        ancestors = _ancestors(recipe, spec, folders)
        methods = [method for stage in ancestors for method in _methods_of(folders[stage.name])]
        if not methods and spec.stage.produces == "model":
            # Fine-tuned, and no more than that.
            continue
        # A copy has the figures of what it is a copy of.
        name = next((stage.name for stage in reversed(ancestors) if not isinstance(stage.stage, CHOOSING)), spec.name)
        write_model_card(
            folders[spec.name],
            methods=methods,
            base_model=model,
            lines=[*own_sections(folders[spec.name]), *_steps(recipe, ancestors)],
            name=names.get(spec.name, spec.name),
            measured=Measured(report, name, dataset_id) if name in measured else None,
        )


def _ancestors(recipe: Recipe, last: StageSpec, folders: Mapping[str, Path]) -> list[StageSpec]:
    """The stages that a stage builds on, and itself, in the order of the recipe."""
    wanted = {last.name}
    for spec in reversed(recipe.stages):
        if spec.name in wanted:
            wanted.update(spec.stage.made_of(folders[spec.name]))
    return [spec for spec in recipe.stages if spec.name in wanted]


def _methods_of(folder: Path) -> list[str]:
    from ..configuration import FlexCompressConfig

    file = folder / FlexCompressConfig.CONFIG_NAME
    if not file.is_file():
        return []
    return [method["method_type"] for method in json.loads(file.read_text(encoding="utf-8"))["methods"]]


def _steps(recipe: Recipe, stages: list[StageSpec]) -> list[str]:
    described = [f"{number}. `{spec.name}`: {spec.stage.describe()}" for number, spec in enumerate(stages, start=1)]
    plan = recipe.plan
    made = f"By the recipe {recipe.name}:" if plan is None else str(Budget(**plan["budget"]))
    return ["## How it was made", "", made, "", *described]
