"""What a stage of a recipe is, and the registry that later methods add theirs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import FlexCompressError, nearest


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel

    from ...tasks import Prepared, Task

# The name under which a stage refers to the model that the user gave.
INPUT = "input"


@dataclass
class DataSettings:
    """How much of the data is used, and how.

    Attributes:
        max_length: Longest input, in tokens; longer ones are cut. The task's default where left out.
        max_train_samples: Train on this many examples only, chosen at random with the recipe's seed.
        max_eval_samples: Evaluate on this many examples only, likewise.
        columns: Column names, where they are not the usual ones: role to name.
        test_fraction: Share of the training examples that is held out for evaluation when the data set has no split
            for it.
    """

    max_length: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    columns: dict[str, Any] | None = None
    test_fraction: float = 0.1

    def __post_init__(self):
        for name in ("max_length", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FlexCompressError(f"{name} must be at least 1, not {value}.")
        if not 0 < self.test_fraction < 1:
            raise FlexCompressError(f"test_fraction must be between 0 and 1, not {self.test_fraction}.")


@dataclass
class StageContext:
    """What the runner hands to a stage.

    Attributes:
        name: The stage's name in the recipe.
        task: The task.
        data: The data set, sliced as the recipe asks.
        label_names: The class names of the whole data set, in the order of their ids; None where there are no classes.
        data_settings: The recipe's `data` group.
        dataset: What the user gave as `--dataset`.
        seed: The recipe's seed.
        artifacts: Folder of every finished stage, and of the user's model under `input`.
        output: Folder to write the result into; becomes visible only when the stage has ended.
        scratch: Folder that outlives an interruption, for checkpoints; removed when the stage has ended.
        say: Prints a line for the user.
        held_out: Examples that no stage trains on, where a stage asked for some.
    """

    name: str
    task: Task
    data: DatasetDict
    label_names: list[str] | None
    data_settings: DataSettings
    dataset: str
    seed: int
    artifacts: dict[str, str | Path]
    output: Path
    scratch: Path
    say: Callable[[str], None] = print
    held_out: Dataset | None = None

    @property
    def max_length(self) -> int:
        """Longest input, in tokens."""
        return self.data_settings.max_length or self.task.default_max_length

    def prepare(self, processor: Any, model: Any = None) -> Prepared:
        """The data made ready as the recipe's `data` group says, with the classes of `model` where one is given.

        Args:
            processor: The model's tokenizer or image processor.
            model: A model, or its configuration.
        """
        return self.task.prepare(
            self.data,
            processor,
            max_length=self.max_length,
            columns=self.data_settings.columns,
            label_names=self.label_names if model is None else None,
            model=model,
        )

    def artifact(self, name: str) -> str | Path:
        """The folder that stage `name` wrote (or the user's model)."""
        return self.artifacts[name]


class Stage:
    """One step of a recipe. Sub-classes are registered with [`register_stage`].

    Attributes:
        Settings: Dataclass of the settings that the recipe may give.
        produces: What the folder holds, in a word or two, for the summary.
        makes_model: Whether the folder is that of a model.
        entry_point: The file in the folder that the user opens; empty for the folder itself.
    """

    Settings: ClassVar[type]
    produces: ClassVar[str] = "model"
    makes_model: ClassVar[bool] = True
    entry_point: ClassVar[str] = ""

    def __init__(self, settings: Any):
        self.settings = settings

    def inputs(self) -> list[str]:
        """Names of the stages (or `input`) whose folders this stage reads."""
        raise NotImplementedError

    def files(self) -> list[str]:
        """Files that the settings name; what is in them counts as a setting."""
        return []

    def source(self) -> str | None:
        """The stage whose model this one changes, which stands in for it where it is skipped; None: it makes none."""
        return self.inputs()[0] if self.makes_model else None

    def made_of(self, folder: Path) -> list[str]:
        """Names of the stages that what it has left in `folder` comes from; not all of `inputs` where it chooses."""
        return self.inputs()

    def describe(self) -> str:
        """What the stage does, for the line that announces it."""
        raise NotImplementedError

    def held_out(self) -> int:
        """How many examples the stage wants that no stage trains on, see `StageContext.held_out`."""
        return 0

    def check_sources(self, stages: Mapping[str, Stage]) -> None:
        """Looks whether the stages that this one reads are of the right type.

        Args:
            stages: The stages above, by name.

        Raises:
            FlexCompressError: One of them is not.
        """

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> PreTrainedModel | None:
        """Finds out before any stage has run what can be known to fail.

        Args:
            models: The user's model under `input`, and what the `check` of every stage above has returned. They are on
                the meta device: modules and sizes, without weights.

        Returns:
            The model that this stage is going to leave, likewise, or None where it leaves no PyTorch model.

        Raises:
            FlexCompressError: The stage cannot run.
        """
        raise NotImplementedError

    def run(self, context: StageContext) -> dict[str, Any]:
        """Does the work and writes `context.output`.

        Returns:
            Figures worth keeping in the stage's manifest; JSON types only.
        """
        raise NotImplementedError


def model_of(models: Mapping[str, PreTrainedModel | None], name: str) -> PreTrainedModel:
    """For `Stage.check`: the model that stage `name` is going to leave, or an error that says that it leaves none."""
    model = models[name]
    if model is None:
        raise FlexCompressError(f'"{name}" leaves no PyTorch model: name a stage that trains, or "{INPUT}".')
    return model


@dataclass
class StageSpec:
    """A stage as the recipe names it."""

    name: str
    type: str
    stage: Stage
    resolved: dict[str, Any] = field(default_factory=dict)


_STAGES: dict[str, type[Stage]] = {}


def register_stage(name: str) -> Callable[[type[Stage]], type[Stage]]:
    """Makes a [`Stage`] known to recipes as `type: name`."""

    def register(cls: type[Stage]) -> type[Stage]:
        if name in _STAGES:
            raise ValueError(f"There is a stage called {name} already: {_STAGES[name].__qualname__}.")
        _STAGES[name] = cls
        return cls

    return register


def stage_class(name: str) -> type[Stage]:
    """The registered stage, or an error with the nearest name."""
    if name not in _STAGES:
        raise FlexCompressError(f'there is no stage type "{name}".{nearest(name, _STAGES)}')
    return _STAGES[name]
