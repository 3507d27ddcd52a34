"""Recipes: YAML files that name the stages of a compression, and their settings.

```yaml
description: What it does, in a line.
seed: 42
data: {max_length: 128}
stages:
  finetune: {model: input, epochs: 3}
  distill: {model: finetune, teacher: finetune, layers: 3}
```

A stage is called after its type; two of one type are told apart with `type:`. It reads the folders of the stages that
its settings name, and those must stand above it; `input` is the model that the user gave. With `skip: true` a stage is
left out: stages below that read its model read the one that it would have changed, and lists leave it out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FlexCompressError, nearest
from .document import Document, dotted, parse_document, parse_value
from .settings import build_settings
from .stacking import check_stacking
from .stages import INPUT, DataSettings, Stage, StageSpec, stage_class


_FOLDER = Path(__file__).parent
_TOP_LEVEL = ("description", "seed", "data", "stages")
_STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass
class Recipe:
    """A recipe that has been checked.

    Attributes:
        name: The name, or the file's name without its ending.
        description: One line.
        seed: Seeds every stage.
        data: How much of the data is used.
        stages: In the order in which they run.
        plan: Where a planner has made it: what it went by, see [`Plan`].
    """

    name: str
    description: str
    seed: int
    data: DataSettings
    stages: list[StageSpec]
    plan: dict[str, Any] | None = None

    @property
    def held_out(self) -> int:
        """How many examples its stages want that none of them trains on."""
        return max(spec.stage.held_out() for spec in self.stages)

    def model_stage(self, name: str | None = None) -> str:
        """The stage whose model is the result: the one of that name, or the last that makes one.

        Raises:
            FlexCompressError: There is no such stage, or it makes no model.
        """
        makers = [spec.name for spec in self.stages if spec.stage.makes_model]
        if name is None and makers:
            return makers[-1]
        if name not in makers:
            raise FlexCompressError(
                f"The recipe {self.name} has no stage {name!r} that makes a model.{nearest(str(name), makers)}"
            )
        return name

    def to_dict(self) -> dict[str, Any]:
        """Every setting, those left at their defaults too."""
        return {
            "description": self.description,
            "seed": self.seed,
            "data": dataclasses.asdict(self.data),
            "stages": {spec.name: {"type": spec.type, **spec.resolved} for spec in self.stages},
            **({} if self.plan is None else {"plan": self.plan}),
        }


def list_recipes() -> dict[str, str]:
    """The recipes that come with the package: name to description."""
    return {
        path.stem: " ".join(str(_read(path).values.get("description", "")).split())
        for path in sorted(_FOLDER.glob("*.yaml"))
    }


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        name_or_file: Name of a recipe of this package, or a YAML file.
        overrides: `key=value` strings such as `stages.distill.epochs=2`, applied in order.

    Raises:
        FlexCompressError: No such recipe, or something in it is unknown or of the wrong type.
    """
    document = _read(find_recipe(name_or_file))
    for override in overrides:
        _apply(override, document)
    return _build(document, Path(name_or_file).stem)


def find_recipe(name_or_file: str) -> Path:
    """The YAML file of a recipe given by name or by path."""
    if name_or_file.endswith((".yaml", ".yml")):
        path = Path(name_or_file).expanduser()
        if not path.is_file():
            raise FlexCompressError(f"there is no recipe file {path}: check the path.")
        return path
    known = {path.stem: path for path in _FOLDER.glob("*.yaml")}
    if name_or_file not in known:
        raise FlexCompressError(
            f'there is no recipe "{name_or_file}".{nearest(name_or_file, known)} A recipe of your own is a .yaml file.'
        )
    return known[name_or_file]


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FlexCompressError(f"{path} is not UTF-8 text: a recipe is a YAML file.") from error
    return parse_document(text, path.name)


def _apply(override: str, document: Document) -> None:
    place = f"--set {override}"
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise FlexCompressError(f"{place}: write it as key=value, such as --set stages.distill.epochs=2.")
    # A new stage cannot be made on the command line, so a name that is not there is a slip of the pen.
    stages = document.values.get("stages")
    if path[0] == "stages" and isinstance(stages, dict) and len(path) > 1 and path[1] not in stages:
        raise FlexCompressError(f'{place}: the recipe has no stage "{path[1]}".{nearest(path[1], stages)}')
    if path[0] == "stages" and len(path) < 3:
        raise FlexCompressError(f"{place}: name the setting too, such as --set stages.distill.epochs=2.")
    document.set(path, parse_value(text, place), place)


def _build(document: Document, name: str) -> Recipe:
    values = document.values
    for key in values:
        if key not in _TOP_LEVEL:
            raise FlexCompressError(f'{document.place((key,))}: unknown key "{key}".{nearest(key, _TOP_LEVEL)}')
    for group in ("data", "stages"):
        if values.get(group) is not None and not isinstance(values[group], dict):
            raise FlexCompressError(f"{document.place((group,))}: {group} must be a group of settings.")
    if not values.get("stages"):
        raise FlexCompressError(f"{document.source} has no stages: there is nothing to run.")
    seed = values.get("seed", 42)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise FlexCompressError(f"{document.place(('seed',))}: seed must be a whole number from 0 to 2**32 - 1.")
    specs: list[StageSpec] = []
    skipped: dict[str, str | None] = {}
    for stage_name, settings in values["stages"].items():
        spec, skip = _build_stage(stage_name, settings, document, {spec.name: spec.stage for spec in specs}, skipped)
        if skip:
            skipped[stage_name] = spec.stage.source()
        else:
            specs.append(spec)
    if not specs:
        raise FlexCompressError(f"{document.source} skips all of its stages: there is nothing to run.")
    for spec in specs:
        try:
            check_stacking(spec, {other.name: other for other in specs})
        except FlexCompressError as error:
            raise FlexCompressError(f"{document.place(('stages', spec.name))}: {error}") from error
    return Recipe(
        name=name,
        description=" ".join(str(values.get("description", "")).split()),
        seed=seed,
        data=build_settings(DataSettings, values.get("data") or {}, ("data",), document),
        stages=specs,
    )


def _build_stage(
    name: str, settings: Any, document: Document, above: dict[str, Stage], skipped: dict[str, str | None]
) -> tuple[StageSpec, bool]:
    """The stage, and whether it is skipped."""
    path = ("stages", name)
    place = document.place(path)
    if not _STAGE_NAME.fullmatch(name) or name == INPUT:
        raise FlexCompressError(
            f'{place}: "{name}" cannot name a stage: use small letters, digits, - and _, and not the word {INPUT}.'
        )
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise FlexCompressError(f"{place}: {dotted(path)} must be a group of settings.")
    settings = dict(settings)
    skip = settings.pop("skip", False)
    if not isinstance(skip, bool):
        raise FlexCompressError(
            f"{document.place((*path, 'skip'))}: {dotted((*path, 'skip'))} must be true or false, not {skip!r}."
        )
    type_name = settings.pop("type", name)
    try:
        cls = stage_class(str(type_name))
    except FlexCompressError as error:
        raise FlexCompressError(f"{document.place((*path, 'type'))}: {error}") from error
    stage = _without_skipped(cls(build_settings(cls.Settings, settings, path, document)), skipped)
    for needed in stage.inputs():
        if needed in skipped and not skip:
            raise FlexCompressError(
                f"{document.place(path)}: {dotted(path)} reads {needed}, which is skipped and stands for no model: add "
                f"skip: true to {name} too."
            )
        if needed != INPUT and needed not in above and needed not in skipped:
            setting = next((key for key, value in settings.items() if needed == value or needed in _listed(value)), "")
            raise FlexCompressError(
                f'{document.place((*path, setting))}: {dotted(path)} reads "{needed}", which is no stage above it.{nearest(needed, [INPUT, *above])}'
            )
    try:
        if not skip:
            stage.check_sources(above)
    except FlexCompressError as error:
        # Such a message starts with the name of the setting it is about.
        setting = str(error).partition(" ")[0]
        raise FlexCompressError(f"{document.place((*path, setting))}: {dotted(path)}: {error}") from error
    spec = StageSpec(name=name, type=str(type_name), stage=stage, resolved=dataclasses.asdict(stage.settings))
    return spec, skip


def _without_skipped(stage: Stage, skipped: dict[str, str | None]) -> Stage:
    """The stage with other stages in the place of those that are skipped."""
    wanted = {name for name in stage.inputs() if name in skipped}
    if not wanted:
        return stage
    changes: dict[str, Any] = {}
    for setting in dataclasses.fields(stage.settings):
        value = getattr(stage.settings, setting.name)
        if isinstance(value, str) and value in wanted:
            # Where no model stands in, such as for the lengths of a pick, it is as if nothing had been set.
            changes[setting.name] = setting.default if skipped[value] is None else skipped[value]
        elif isinstance(value, list) and wanted.intersection(item for item in value if isinstance(item, str)):
            changes[setting.name] = [item for item in value if item not in wanted]
    return type(stage)(dataclasses.replace(stage.settings, **changes))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
