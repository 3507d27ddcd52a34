"""The stage that makes a student and trains it with a teacher."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import FlexCompressError
from .base import StageContext, model_of, register_stage
from .training import TrainingSettings, TrainingStage, check_methods, compression_config, load_config


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...tasks import Prepared


@dataclass
class DistillSettings(TrainingSettings):
    """Settings of the stage `distill`.

    Attributes:
        teacher: The stage (or `input`) whose model teaches.
        model: The stage (or `input`) whose weights the student starts from; by default the teacher's.
        layers: Which layers of that model the student keeps: how many of each stack, or what share of them (0.5 is
            half), spread evenly; their indices from 0; or indices by stack. Leave it out to keep all.
        structure: A JSON file with the student's sizes, instead of `layers`.
        head: Whether the models have the task's head. Without one only the bodies are trained, on the text alone;
            for task-agnostic distillation.
        methods: What is distilled: method type to its settings, such as `{distillation: {temperature: 2.0}}`.
    """

    teacher: str = "finetune"
    model: str | None = None
    layers: int | float | list[int] | dict[str, Any] | None = None
    structure: str | None = None
    head: bool = True
    methods: dict[str, Any] = field(default_factory=lambda: {"distillation": {}})

    def __post_init__(self):
        super().__post_init__()
        if self.layers is not None and self.structure is not None:
            raise FlexCompressError("structure and layers exclude each other: leave one of them out.")
        if isinstance(self.layers, float) and not 0 < self.layers < 1:
            raise FlexCompressError(f"layers must be a share between 0 and 1 or a whole number, not {self.layers}.")
        if isinstance(self.layers, int) and self.layers < 1:
            raise FlexCompressError(f"layers must be at least 1, not {self.layers}.")
        check_methods(self.methods)


@register_stage("distill")
class Distill(TrainingStage):
    """Trains a smaller student to do what the teacher does."""

    Settings = DistillSettings
    settings: DistillSettings

    def inputs(self) -> list[str]:
        """See the base class."""
        start = self.settings.model or self.settings.teacher
        return list(dict.fromkeys([start, self.settings.teacher]))

    def files(self) -> list[str]:
        """See the base class."""
        return [self.settings.structure] if self.settings.structure is not None else []

    def describe(self) -> str:
        """See the base class."""
        return f"distilling {self.settings.teacher} into a smaller model"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> PreTrainedModel:
        """Makes the student without its weights, and asks the methods whether they can work with it."""
        self.check_arguments()
        settings = self.settings
        teacher = model_of(models, settings.teacher)
        start = model_of(models, settings.model or settings.teacher)
        student = self._student(start, own_copy=False)
        parts = (student, teacher) if settings.head else (student.base_model, teacher.base_model)
        self.check_training(*parts, settings.methods)
        return student

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        settings = self.settings
        teacher_source = context.artifact(settings.teacher)
        start_source = context.artifact(settings.model or settings.teacher)
        processor = context.task.load_processor(teacher_source)
        if settings.head:
            # The teacher's label ids are the ones that count.
            prepared = context.prepare(processor, model=load_config(teacher_source))
            teacher = self.load_for_training(context, teacher_source)
            start = teacher
            if start_source != teacher_source:
                start = self.load_for_training(
                    context, start_source, ignore_mismatched_sizes=True, **prepared.model_kwargs
                )
        else:
            prepared = self._without_labels(context, processor)
            teacher, start = load_body(teacher_source), load_body(start_source)
        student = self._student(start, own_copy=start is not teacher)
        sizes = {"parameters": student.num_parameters(), "teacher_parameters": teacher.num_parameters()}
        context.say(
            f"{context.name}: {sizes['parameters']:,} parameters, the teacher has {sizes['teacher_parameters']:,}"
        )
        metrics = self.train(
            context,
            student,
            processor,
            prepared,
            teacher_model=teacher,
            compression_config=compression_config(settings.methods),
        )
        return {**sizes, **metrics}

    def _student(self, start: PreTrainedModel, own_copy: bool) -> PreTrainedModel:
        from ...architectures import describe
        from ...methods.distillation.student import make_student

        if self.settings.structure is not None:
            return make_student(start, structure=read_structure(self.settings.structure))
        layers = self.settings.layers
        if layers is None:
            # Self-distillation at full size still needs a student that is not the teacher itself.
            return start if own_copy else copy.deepcopy(start)
        if isinstance(layers, float):
            layers = {
                name: max(1, round(layers * len(stack.layers))) for name, stack in describe(start).stacks.items()
            }
        return make_student(start, layers=layers)

    def _without_labels(self, context: StageContext, processor: Any) -> Prepared:
        from transformers import DataCollatorWithPadding

        prepared = context.prepare(processor)
        if prepared.generation:
            raise FlexCompressError(
                f"{context.name}: head: false is for encoders, and {context.task.name} has a decoder: leave it out."
            )
        prepared.dataset = prepared.dataset.remove_columns("labels")
        prepared.collator = DataCollatorWithPadding(processor)
        prepared.compute_metrics = None
        prepared.preprocess_logits = None
        return prepared


def load_body(source: str | Path) -> PreTrainedModel:
    """The model without a head."""
    from transformers import AutoModel

    from ...tasks.base import load_pretrained

    return load_pretrained(AutoModel, source)


def read_structure(file: str) -> Any:
    """A `ModelStructure` from a JSON file."""
    from ...structure import ModelStructure

    path = Path(file).expanduser()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FlexCompressError(f"{path} cannot be read as a structure: give a JSON file of sizes.") from error
    return ModelStructure.from_dict(values)
