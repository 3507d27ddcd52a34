"""What the stages that train share, and the first of them: fine-tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import FlexCompressError, nearest
from ...tasks import has_head
from ..allocator import keeping_freed_memory, keeps_freed_memory
from .base import INPUT, Stage, StageContext, model_of, register_stage


if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerCallback

    from ...tasks import Prepared

# Kept twice, so that one that was cut off while it was written leaves its predecessor.
_CHECKPOINTS_KEPT = 2
# Trainer names that the stage itself decides.
_RESERVED = ("output_dir", "seed", "data_seed", "resume_from_checkpoint", "overwrite_output_dir")
# What configurations call the dropout on attention maps.
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
SMALL_WIDTH = 512
# What `Trainer.evaluate` measures beside the task's metrics.
_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch", "loss")


def usual_learning_rate(width: int) -> float:
    """Highest learning rate where nobody has said which: small models learn little from that of large ones.

    Args:
        width: The model's hidden size.
    """
    return 2e-4 if width <= SMALL_WIDTH else 5e-5


def attention_options() -> dict[str, str]:
    """For a loader, where bfloat16 or dropout on attention maps trains on a CPU.

    The backward pass of PyTorch's fused kernel is slow there in bfloat16, and with dropout there is none: plain attention
    is faster, as long as the memory of the maps is kept from step to step (examples/benchmarks/cpu_training.py).
    """
    return {"attn_implementation": "eager"} if keeps_freed_memory() else {}


def _after_each_step(function: Callable[[], None]) -> TrainerCallback:
    from transformers import TrainerCallback

    class AfterEachStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            function()

    return AfterEachStep()


@dataclass
class TrainingSettings:
    """What every training stage takes.

    Attributes:
        epochs: Passes over the training data.
        max_steps: Stop after this many optimiser steps instead.
        learning_rate: Highest learning rate; where left out, [`usual_learning_rate`] for the width of the model that
            is trained.
        batch_size: Examples per step and device.
        eval_batch_size: Examples per evaluation step and device.
        gradient_accumulation_steps: Backward passes per optimiser step.
        warmup_ratio: Share of the steps in which the learning rate rises.
        weight_decay: Not applied to biases and norms.
        scheduler: Name of a Transformers learning rate schedule.
        group_by_length: Batches of similarly long examples, which saves the computation on padding.
        checkpoints: How many times, evenly spread, the state is saved so that an interrupted run can go on.
        attention_dropout: Dropout on attention maps, in models that have a setting for it; the model's own where left
            out. With 0 PyTorch can use its faster kernel on CPUs, which tells where inputs are long.
        arguments: Any other field of `TrainingArguments`.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 32
    eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    scheduler: str = "linear"
    group_by_length: bool = True
    checkpoints: int = 10
    attention_dropout: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise FlexCompressError(f"{name} must be greater than 0 and finite, not {value}.")
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "checkpoints"):
            if getattr(self, name) < 1:
                raise FlexCompressError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise FlexCompressError(f"max_steps must be at least 1, not {self.max_steps}.")
        if self.attention_dropout is not None and not 0 <= self.attention_dropout < 1:
            raise FlexCompressError(f"attention_dropout must be at least 0 and below 1, not {self.attention_dropout}.")
        if not 0 <= self.warmup_ratio <= 1:
            raise FlexCompressError(f"warmup_ratio must be between 0 and 1, not {self.warmup_ratio}.")


@dataclass
class FineTuneSettings(TrainingSettings):
    """Settings of the stage `finetune`.

    Attributes:
        model: The stage (or `input`) whose model is trained.
        skip_if_trained: Take the model as it is when it already has a head for the task and the data's labels.
    """

    model: str = INPUT
    skip_if_trained: bool = True


class TrainingStage(Stage):
    """What the training stages share.

    Attributes:
        logging_steps: How often the trainer logs, as a share of all steps.
        rate_factor: What [`usual_learning_rate`] is multiplied with.
        log_history: What it has logged, once `train` has run.
    """

    settings: TrainingSettings
    logging_steps: ClassVar[float] = 0.1
    rate_factor: ClassVar[float] = 1.0
    log_history: Sequence[Mapping[str, Any]] = ()

    def check_arguments(self) -> None:
        """Looks at the names in `arguments`, and at the schedule."""
        from transformers import SchedulerType, TrainingArguments

        known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} - set(_RESERVED)
        for name in self.settings.arguments:
            if name in _RESERVED:
                raise FlexCompressError(f"arguments.{name} cannot be set: the recipe takes care of it.")
            if name not in known:
                raise FlexCompressError(f"arguments.{name} is no field of TrainingArguments.{nearest(name, known)}")
        schedules = [kind.value for kind in SchedulerType]
        if self.settings.scheduler not in schedules:
            raise FlexCompressError(
                f'"{self.settings.scheduler}" is no learning rate schedule.{nearest(self.settings.scheduler, schedules)}'
            )

    def check_training(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, methods: Mapping[str, Any]
    ) -> None:
        """Asks the methods whether they can train `model`; both models may be without weights."""
        from transformers import TrainingArguments

        from ...methods.base import PrepareContext
        from ...methods.runner import MethodRunner

        config = compression_config(methods)
        arguments = TrainingArguments(output_dir="unused", report_to="none")
        context = PrepareContext(model, teacher, arguments, config.methods)
        MethodRunner(config, teacher).validate(context, None, None)

    def load_for_training(self, context: StageContext, source: str | Path, **options: Any) -> PreTrainedModel:
        """The model of a folder, with the dropout that the settings ask for, and the faster kind of attention."""
        dropout, config = self.settings.attention_dropout, load_config(source)
        own = {name: getattr(config, name) for name in ATTENTION_DROPOUT if hasattr(config, name)}
        if dropout is not None:
            own = dict.fromkeys(own, dropout)
            options |= own
        if self.settings.arguments.get("bf16") or any(own.values()):
            options |= attention_options()
        return context.task.load_model(source, **options)

    def train(
        self,
        context: StageContext,
        model: PreTrainedModel,
        processor: Any,
        prepared: Prepared,
        **trainer_options: Any,
    ) -> dict[str, float]:
        """Trains `model`, from the last checkpoint where there is one, and saves it with its processor.

        Args:
            context: The stage's context.
            model: Trained in place.
            processor: Saved beside the model.
            prepared: The data.
            **trainer_options: For the Trainer: `teacher_model`, `compression_config`.

        Returns:
            The task's metrics on the evaluation split.
        """
        from transformers import set_seed

        from ...data import select_split
        from ...trainer import FlexCompressSeq2SeqTrainer, FlexCompressTrainer
        from ..dropout import fast_dropout

        if "train" not in prepared.dataset:
            raise FlexCompressError(
                f"{context.name} needs a training split, and {context.dataset} has only "
                f"{', '.join(prepared.dataset)}: give a data set with one."
            )
        # The steps before this point may or may not have drawn random numbers (a new head, say).
        set_seed(context.seed)
        trainer_class = FlexCompressSeq2SeqTrainer if prepared.generation else FlexCompressTrainer
        arguments = self.training_arguments(context, prepared, model)
        try:
            trainer = trainer_class(
                model=model,
                args=arguments,
                train_dataset=prepared.dataset["train"],
                data_collator=prepared.collator,
                processing_class=processor,
                compute_metrics=prepared.compute_metrics,
                preprocess_logits_for_metrics=prepared.preprocess_logits,
                **trainer_options,
            )
        except (ValueError, RuntimeError, ImportError) as error:
            # Such as an integration that is not installed.
            if isinstance(error, FlexCompressError) or not self.settings.arguments:
                raise
            raise FlexCompressError(_do_not_work(context, error)) from error
        checkpoint = last_checkpoint(context.scratch)
        if checkpoint is not None:
            context.say(f"{context.name}: going on from {checkpoint.name}")
        # A compiler has a dropout of its own.
        compiled = self.settings.arguments.get("torch_compile", False)
        with keeping_freed_memory() as kept, contextlib.nullcontext() if compiled else fast_dropout():
            if kept is not None:
                trainer.add_callback(_after_each_step(kept.step))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            self.log_history = trainer.state.log_history
            metrics = {}
            if prepared.compute_metrics is not None:
                metrics = evaluate(trainer, prepared.dataset[select_split(prepared.dataset)])
        trainer.save_model(str(context.output))
        # A pickle of the arguments, which nobody needs to load the model.
        (context.output / "training_args.bin").unlink(missing_ok=True)
        processor.save_pretrained(context.output)
        return metrics

    def training_arguments(self, context: StageContext, prepared: Prepared, model: PreTrainedModel) -> Any:
        """The settings as `TrainingArguments`."""
        import torch
        from transformers import Seq2SeqTrainingArguments, TrainingArguments

        from ...architectures import describe

        settings, rate = self.settings, self.settings.learning_rate
        if rate is None:
            width = describe(model).hidden_size
            rate = self.rate_factor * usual_learning_rate(width)
            context.say(f"{context.name}: learning rate {rate:g}, for a model of {width} dims")
        chosen = {
            "num_train_epochs": settings.epochs,
            "max_steps": settings.max_steps or -1,
            "learning_rate": rate,
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.eval_batch_size,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "warmup_ratio": settings.warmup_ratio,
            "weight_decay": settings.weight_decay,
            "lr_scheduler_type": settings.scheduler,
            "group_by_length": settings.group_by_length,
            "save_strategy": "steps",
            # Below 1 the Trainer takes it as a share of all steps.
            "save_steps": 1 / settings.checkpoints if settings.checkpoints > 1 else 1.0 - 1e-9,
            "save_total_limit": _CHECKPOINTS_KEPT,
            "eval_strategy": "no",
            "logging_strategy": "steps",
            "logging_steps": self.logging_steps,
            "report_to": "none",
            # Quiet logging would otherwise take the bars, and with them the time left, away.
            "disable_tqdm": False,
            # Elsewhere PyTorch warns about it in every stage.
            "dataloader_pin_memory": torch.cuda.is_available(),
            **settings.arguments,
        }
        if settings.arguments.get("bf16") and not torch.accelerator.is_available():
            # Else Transformers takes bf16 to be wanted of a GPU that is not there.
            chosen.setdefault("use_cpu", True)
        if prepared.generation:
            chosen.setdefault("predict_with_generate", True)
        cls = Seq2SeqTrainingArguments if prepared.generation else TrainingArguments
        try:
            return cls(output_dir=str(context.scratch), seed=context.seed, data_seed=context.seed, **chosen)
        except (TypeError, ValueError) as error:
            raise FlexCompressError(_do_not_work(context, error)) from error


def _do_not_work(context: StageContext, error: Exception) -> str:
    return f"the training settings of {context.name} do not work: {' '.join(str(error).split())}"


@register_stage("finetune")
class FineTune(TrainingStage):
    """Trains the model on the task, unless it is trained already."""

    Settings = FineTuneSettings
    settings: FineTuneSettings

    def inputs(self) -> list[str]:
        """See the base class."""
        return [self.settings.model]

    def describe(self) -> str:
        """See the base class."""
        return "fine-tuning the model on the task"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> PreTrainedModel:
        """See the base class."""
        self.check_arguments()
        return model_of(models, self.settings.model)

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        source = context.artifact(self.settings.model)
        processor = context.task.load_processor(source)
        if self.settings.skip_if_trained and self._is_trained(context, source, processor):
            context.say(f"{context.name}: {source} is trained for the task already, taken as it is")
            model = context.task.load_model(source)
            model.save_pretrained(context.output)
            processor.save_pretrained(context.output)
            return {"skipped": True}
        prepared = context.prepare(processor)
        # The head that came with the model may be for other labels; it is replaced then.
        model = self.load_for_training(context, source, ignore_mismatched_sizes=True, **prepared.model_kwargs)
        return self.train(context, model, processor, prepared)

    def _is_trained(self, context: StageContext, source: Any, processor: Any) -> bool:
        config = load_config(source)
        if not has_head(context.task.auto_class, config):
            return False
        fits = head_fits(config, lambda: context.prepare(processor, model=config))
        if not fits:
            context.say(f"{context.name}: the labels of {source} are not those of the data, so it gets a new head")
        return fits


def head_fits(config: Any, prepare: Callable[[], Prepared]) -> bool:
    """Whether the head of a model is one for the data's labels.

    Args:
        config: The model's configuration.
        prepare: Makes the data ready for the model.
    """
    try:
        names = prepare().label_names
    except FlexCompressError:
        # The model's labels are not the data's; anything else that is wrong with the data comes up again.
        return False
    # Names like LABEL_0 fit any data, but not in any number.
    return names is None or len(names) == config.num_labels


def check_methods(methods: Mapping[str, Any]) -> None:
    """Looks at the form of a stage's `methods`; what is in them is looked at where the models are known."""
    if not methods:
        raise FlexCompressError("methods is empty: name what is trained, such as distillation or minilm.")
    for name, values in methods.items():
        if values is not None and not isinstance(values, dict):
            raise FlexCompressError(f"methods.{name} must be a group of settings, not {values!r}.")


def compression_config(methods: Mapping[str, Any]) -> Any:
    """A stage's `methods` as a `FlexCompressConfig`."""
    from ...configuration import FlexCompressConfig

    return FlexCompressConfig(methods=[{"method_type": name, **(values or {})} for name, values in methods.items()])


def load_config(source: str | Path) -> Any:
    """The `config.json` of a folder or a Hub id, as a Transformers configuration."""
    from transformers import AutoConfig

    from ...tasks.base import load_pretrained

    return load_pretrained(AutoConfig, source)


def evaluate(trainer: Trainer, dataset: Any) -> dict[str, float]:
    """The task's metrics, without the Trainer's timings and prefixes."""
    measured = trainer.evaluate(dataset, metric_key_prefix="eval")
    plain = {key.removeprefix("eval_"): value for key, value in measured.items()}
    return {key: float(value) for key, value in plain.items() if key not in _TIMINGS}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is complete; newer ones that were cut off are removed.

    The Trainer writes `trainer_state.json` after the weights and the optimiser, so its presence marks the end.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None
