"""The stages that let an encoder drop tokens: training for it, the search of lengths, and the choice among them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ...errors import FlexCompressError
from .base import Stage, StageContext, model_of, register_stage
from .training import TrainingSettings, TrainingStage, check_methods, compression_config, load_config


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...search import Front
    from ...search.held_out import HeldOut

METHOD = "length_adaptive"
# Below the scratch folder, so that an interrupted search goes on.
SEARCH_FOLDER = "search"


@dataclass
class LengthAdaptiveSettings(TrainingSettings):
    """Settings of the stage `length-adaptive`.

    Attributes:
        model: The stage (or `input`) whose model is trained.
        teacher: A stage (or `input`) whose model teaches the full model meanwhile, by the other entries of `methods`.
        methods: Method type to its settings: `length_adaptive`, and what the teacher teaches, such as
            `distillation: {temperature: 2.0}`.
    """

    model: str = "finetune"
    teacher: str | None = None
    methods: dict[str, Any] = field(default_factory=lambda: {METHOD: {}})

    def __post_init__(self):
        super().__post_init__()
        check_methods(self.methods)
        if METHOD not in self.methods:
            raise FlexCompressError(
                f"methods lacks {METHOD}: add it, or use the stage type distill for distillation alone."
            )
        if self.teacher is not None and len(self.methods) == 1:
            raise FlexCompressError(
                "teacher teaches nothing: add distillation or minilm to methods, or leave the teacher out."
            )


@register_stage("length-adaptive")
class LengthAdaptive(TrainingStage):
    """Trains a model to work with any number of tokens per layer."""

    Settings = LengthAdaptiveSettings
    settings: LengthAdaptiveSettings

    def inputs(self) -> list[str]:
        """See the base class."""
        return [self.settings.model, *([self.settings.teacher] if self.settings.teacher else [])]

    def describe(self) -> str:
        """See the base class."""
        taught = f", taught by {self.settings.teacher}" if self.settings.teacher else ""
        return f"training {self.settings.model} to work with any number of tokens per layer{taught}"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> PreTrainedModel:
        """Asks the methods whether they can work with the model."""
        self.check_arguments()
        settings = self.settings
        model = model_of(models, settings.model)
        # A model may be taught by what it was: then the stage loads it twice.
        teacher = copy.deepcopy(model_of(models, settings.teacher)) if settings.teacher else None
        self.check_training(model, teacher, settings.methods)
        return model

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        settings = self.settings
        source = context.artifact(settings.model)
        processor = context.task.load_processor(source)
        prepared = context.prepare(processor, model=load_config(source))
        return self.train(
            context,
            self.load_for_training(context, source),
            processor,
            prepared,
            teacher_model=context.task.load_model(context.artifact(settings.teacher)) if settings.teacher else None,
            compression_config=compression_config(settings.methods),
        )


@dataclass
class SearchSettings:
    """Settings of the stage `search`.

    Attributes:
        model: The stage (or `input`) whose lengths are searched.
        objective: What the metric is traded against: "macs", multiply-accumulates of one input of the recipe's
            longest length, or "latency", measured here.
        runtime: What runs the candidates: "pytorch", "ort", or "ort-int8".
        samples: How many examples candidates are scored on; held out of the training examples, unless the data set has
            a validation split beside its test split.
        metric: One of the task's metrics, or "loss"; its main one where left out.
        unit: "counts" or "fractions"; what the model was trained with where left out.
        population: Configurations in a generation.
        trials: Configurations to score in all.
        patience: End when so many in a row have not moved the front; 0: never. Twice the population where left out.
        batch_size: Examples at a time while scoring.
        latency_batch_size: Rows of the batch that is timed.
        threads: Threads for PyTorch and ONNX Runtime.
        bf16: Score in bfloat16, which is faster on a processor that computes in it; "pytorch" only.
    """

    model: str = "adapt"
    objective: Literal["macs", "latency"] = "macs"
    runtime: Literal["pytorch", "ort", "ort-int8"] = "pytorch"
    samples: int = 1000
    metric: str | None = None
    unit: Literal["counts", "fractions"] | None = None
    population: int = 20
    trials: int = 150
    patience: int | None = None
    batch_size: int = 32
    latency_batch_size: int = 32
    threads: int | None = None
    bf16: bool = False

    def __post_init__(self):
        if self.bf16 and self.runtime != "pytorch":
            raise FlexCompressError(f"bf16 is for the runtime pytorch, not {self.runtime}: leave one of them out.")
        for name, least in (("samples", 1), ("population", 2), ("trials", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise FlexCompressError(f"{name} must be at least {least}, not {getattr(self, name)}.")


@register_stage("search")
class Search(Stage):
    """Searches for the length configurations that are worth choosing."""

    Settings = SearchSettings
    settings: SearchSettings
    produces = "front"
    makes_model = False
    entry_point = "front.png"

    def inputs(self) -> list[str]:
        """See the base class."""
        return [self.settings.model]

    def held_out(self) -> int:
        """See the base class."""
        return self.settings.samples

    def describe(self) -> str:
        """See the base class."""
        return f"searching lengths of {self.settings.model}"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> None:
        """Looks whether the model can drop tokens, and whether the packages are there."""
        from ...architectures import describe
        from ...evaluation.benchmark import require_report_extra
        from ...search import search_lengths  # noqa: F401  says what to install where Optuna is missing
        from ...token_dropping import dropping_stack

        require_report_extra()
        dropping_stack(describe(model_of(models, self.settings.model)))

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        from datasets import DatasetDict

        from ...search import search_lengths

        settings = self.settings
        folder = context.scratch / SEARCH_FOLDER

        def say(line: str) -> None:
            # Nothing is going to be left in that folder.
            if str(folder) not in line:
                context.say(f"{context.name}: {line}")

        front = search_lengths(
            context.artifact(settings.model),
            DatasetDict({"validation": context.held_out}),
            context.task,
            folder,
            objective=settings.objective,
            runtime=settings.runtime,
            samples=None,
            columns=context.data_settings.columns,
            max_length=context.max_length,
            unit=settings.unit,
            metric=settings.metric,
            population=settings.population,
            trials=settings.trials,
            patience=settings.patience,
            batch_size=settings.batch_size,
            latency_batch_size=settings.latency_batch_size,
            threads=settings.threads,
            bf16=settings.bf16,
            seed=context.seed,
            say=say,
        )
        for file in folder.iterdir():
            # The database stays behind: the search has ended.
            if file.name.startswith("front."):
                shutil.copy(file, context.output)
        context.say(str(front))
        return {"scored": len(front.scored), "front": len(front.points), f"full {front.metric}": front.full.metric}


@dataclass
class PickSettings:
    """Settings of the stage `pick`.

    Attributes:
        front: The stage `search` to choose from.
        max_drop: The cheapest configuration is chosen that loses at most this share of the metric: 0.01, or "1%".
        max_cost: What it may cost at most, relative to the full model: 0.5, or "50%". Without `max_drop`, the best one
            within that is chosen.
        max_latency: What it may cost at most in milliseconds a batch, where latency was searched.
        baseline: A stage whose model `max_drop` is measured against, on the same examples, rather than the searched
            model with all its tokens.
        best_effort: Take the configuration that loses least where none keeps the limits, rather than fail.
    """

    front: str = "search"
    max_drop: float | str | None = None
    max_cost: float | str | None = None
    max_latency: float | None = None
    baseline: str | None = None
    best_effort: bool = False

    def __post_init__(self):
        if self.max_drop is None and self.max_cost is None and self.max_latency is None:
            self.max_drop = 0.01
        if self.baseline is not None and self.max_drop is None:
            raise FlexCompressError("baseline is what max_drop is measured against: give that too.")


@register_stage("pick")
class Pick(Stage):
    """Chooses a length configuration, which stages below name by this stage's name."""

    Settings = PickSettings
    settings: PickSettings
    produces = "lengths"
    makes_model = False
    entry_point = "front.png"

    def inputs(self) -> list[str]:
        """See the base class."""
        return [self.settings.front, *([self.settings.baseline] if self.settings.baseline else [])]

    def describe(self) -> str:
        """See the base class."""
        return f"choosing lengths from the front of {self.settings.front}"

    def check_sources(self, stages: Mapping[str, Stage]) -> None:
        """Looks at the limits too, which go with the objective of the search."""
        from ...search import Front

        settings = self.settings
        source = stages.get(settings.front)
        if not isinstance(source, Search):
            raise FlexCompressError(f'front names "{settings.front}", which is no stage of the type search: name one.')
        Front.check_limits(source.settings.objective, settings.max_drop, settings.max_cost, settings.max_latency)

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> None:
        """Looks whether the front can be drawn."""
        from ...evaluation.benchmark import require_report_extra

        require_report_extra()

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        from ...search import Front
        from ...search.picture import draw_front

        settings = self.settings
        front = Front.load(context.artifact(settings.front))
        max_drop = settings.max_drop
        if settings.baseline is not None:
            max_drop = self._drop_of_front(context, front)
        try:
            if max_drop is not None and settings.baseline is not None and max_drop < 0:
                raise FlexCompressError(
                    f"With all its tokens the searched model loses {settings.max_drop} of what {settings.baseline} "
                    "scores, and more: ask for a larger drop, or train it longer."
                )
            point = front.pick(max_drop, max_cost=settings.max_cost, max_latency=settings.max_latency)
        except FlexCompressError as error:
            if not settings.best_effort:
                raise
            smaller = [point for point in front.points if point.cost < front.full.cost]
            point = front.picked = min(smaller or [front.full], key=front.drop)
            context.say(f"{context.name}: {error} Going on with that which loses least.")
        front.save(context.output)
        draw_front(front, context.output)
        context.say(
            f"{context.name}: {front.name(point)} of {front.max_length} tokens, {point.relative_cost:.3f} of the cost"
        )
        return {"lengths": point.candidate, "cost": point.relative_cost, front.metric: point.metric}

    def _drop_of_front(self, context: StageContext, front: Front) -> float:
        """`max_drop` as a share of what the searched model scores with all its tokens."""
        from ...search import read_share, relative_loss

        (dense,), held_out = score_held_out(context, [self.settings.baseline], front.metric)
        sign = 1 if held_out.greater_is_better else -1
        worst = dense - sign * read_share("max_drop", self.settings.max_drop, 0.0) * abs(dense)
        context.say(f"{context.name}: {self.settings.baseline} scores {dense:.4g} on the same examples")
        full = front.full.metric
        return min(relative_loss(worst, full, held_out.greater_is_better), 1.0) if full else 1.0


def score_held_out(
    context: StageContext, names: Sequence[str], metric: str | None = None
) -> tuple[list[float], HeldOut]:
    """What the models of some stages score on the examples that no stage trains on.

    Args:
        context: The stage's context.
        names: The stages. Where a task has no labels, the vectors of the first stand in for them.
        metric: One of the task's metrics; its main one by default.

    Returns:
        The metrics, and what they were measured on.
    """
    from datasets import DatasetDict

    from ...evaluation import open_artifact
    from ...search.held_out import open_held_out

    artifacts = [open_artifact(context.artifact(name), context.task) for name in names]
    held_out = open_held_out(
        DatasetDict({"validation": context.held_out}),
        context.task,
        artifacts[0].load_processor(),
        artifacts[0].config,
        samples=None,
        columns=context.data_settings.columns,
        max_length=context.max_length,
        metric=metric,
    )
    held_out.compare_with(artifacts[0])
    return [held_out.score(artifact) for artifact in artifacts], held_out
