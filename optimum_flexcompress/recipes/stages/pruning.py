"""The stage that prunes by information-bottleneck masks."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from ...errors import FlexCompressError
from ...vib_config import VIBPruningConfig
from .base import StageContext, model_of, register_stage
from .training import TrainingSettings, TrainingStage, compression_config, load_config


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...tasks import Prepared

METHOD = VIBPruningConfig.method_type
# Names of the folders that a run leaves on its way down, below the trainer's output folder.
LEVELS = "sparsity-*"


def _method_fields() -> list[tuple[str, Any, dataclasses.Field]]:
    hints = get_type_hints(VIBPruningConfig)
    return [
        (
            part.name,
            hints[part.name],
            field(default_factory=part.default_factory)
            if part.default_factory is not dataclasses.MISSING
            else field(default=part.default),
        )
        for part in dataclasses.fields(VIBPruningConfig)
    ]


@dataclass
class _StageSettings(TrainingSettings):
    model: str = "finetune"
    sparsity_of: str | None = None
    teacher: str | None = None
    methods: dict[str, Any] = field(
        default_factory=lambda: {"distillation": {"hidden_states_weight": 1.0, "layer_map": "ordered"}}
    )
    probe_samples: int = 128

    def __post_init__(self):
        super().__post_init__()
        if METHOD in self.methods:
            raise FlexCompressError(f"methods has {METHOD}: its settings stand beside methods, in the stage itself.")
        for name, values in self.methods.items():
            if values is not None and not isinstance(values, dict):
                raise FlexCompressError(f"methods.{name} must be a group of settings, not {values!r}.")
        if self.probe_samples < 0:
            raise FlexCompressError(f"probe_samples must be at least 0, not {self.probe_samples}.")
        if self.sparsity_of is not None:
            for name in ("target_macs", "target_latency", "include_embeddings", "save_at_sparsities"):
                if getattr(self, name):
                    raise FlexCompressError(f"sparsity_of goes with target_sparsity alone: leave it out, or {name}.")
        try:
            self.method()
        except FlexCompressError as error:
            # Said of the stage's own setting, whose line the recipe's reader then names.
            raise FlexCompressError(str(error).removeprefix(f"{METHOD}.")) from error

    def method(self) -> dict[str, Any]:
        """The settings of VIB pruning among those of the stage."""
        names = [part.name for part in dataclasses.fields(VIBPruningConfig)]
        return VIBPruningConfig(**{name: copy.deepcopy(getattr(self, name)) for name in names}).to_dict()


PruneSettings = dataclasses.make_dataclass(
    "PruneSettings", _method_fields(), bases=(_StageSettings,), namespace={"__module__": __name__}
)
PruneSettings.__doc__ = """Settings of the stage `prune`: those of a training, every field of [`VIBPruningConfig`], and

Attributes:
    model: The stage (or `input`) whose model is pruned.
    sparsity_of: The stage (or `input`) of whose model's layers `target_sparsity` is a share, such as the one that the
        model is half of; by default the model's own.
    teacher: The stage (or `input`) whose model teaches meanwhile, if `methods` has something to be taught; by default
        the model before it is pruned.
    methods: Other methods of the same training: what the teacher teaches, `length_adaptive`.
    probe_samples: On how many examples the heads' attention is looked at, before and after; 0: none.
"""


@register_stage("prune")
class Prune(TrainingStage):
    """Prunes the model to the size that was asked for.

    The stage's folder holds the model, what was removed of it (`pruning.json` and pictures), and below
    `sparsity-<value>` the models of `save_at_sparsities`, which are not fine-tuned.
    """

    Settings = PruneSettings
    settings: PruneSettings
    # Enough points for the curves of the run.
    logging_steps: ClassVar[float] = 0.02

    @property
    def taught_by(self) -> str | None:
        """The stage whose model teaches."""
        teaching = any(name != "length_adaptive" for name in self.settings.methods)
        return (self.settings.teacher or self.settings.model) if teaching else self.settings.teacher

    def inputs(self) -> list[str]:
        """See the base class."""
        names = (self.settings.model, self.taught_by, self.settings.sparsity_of)
        return list(dict.fromkeys(name for name in names if name))

    def made_of(self, folder: Path) -> list[str]:
        """See the base class."""
        return [name for name in self.inputs() if name in (self.settings.model, self.taught_by)]

    def describe(self) -> str:
        """See the base class."""
        settings = self.settings
        targets = {
            name.removeprefix("target_"): value
            for name, value in settings.method().items()
            if name.startswith("target_") and value is not None
        }
        target = ", ".join(f"{name} {value:g}" for name, value in targets.items())
        target += f" of {settings.sparsity_of}" if settings.sparsity_of else ""
        return f"pruning {settings.model} to {target} ({settings.mode})"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> PreTrainedModel:
        """Asks the methods whether they can work with the model, and whether its target can be reached."""
        from ...evaluation.benchmark import require_report_extra

        self.check_arguments()
        if self.settings.probe_samples:
            require_report_extra()
        model, whole = copy.deepcopy(model_of(models, self.settings.model)), self.settings.sparsity_of
        teacher = model_of(models, self.taught_by) if self.taught_by else None
        self.check_training(model, teacher, self._methods(model, model_of(models, whole) if whole else None))
        # The sizes are not known before, but the family and the head are.
        return model

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        source = context.artifact(self.settings.model)
        processor = context.task.load_processor(source)
        prepared = context.prepare(processor, model=load_config(source))
        model, whole = self.load_for_training(context, source), self.settings.sparsity_of
        methods = self._methods(model, context.task.load_model(context.artifact(whole)) if whole else None)
        metrics = self.train(
            context,
            model,
            processor,
            prepared,
            teacher_model=context.task.load_model(context.artifact(self.taught_by)) if self.taught_by else None,
            compression_config=compression_config(methods),
        )
        for folder in sorted(context.scratch.glob(LEVELS)):
            (folder / "training_args.bin").unlink(missing_ok=True)
            shutil.move(folder, context.output / folder.name)
        return {**self._report(context, source, processor, prepared), **metrics}

    def _methods(self, model: PreTrainedModel, whole: PreTrainedModel | None) -> dict[str, Any]:
        """The methods of the training, with a target that is a share of `model`; `whole` is what it is given of."""
        from ...structure import count_parameters

        values, target = self.settings.method(), self.settings.target_sparsity
        if whole is not None:
            left = count_parameters(model)["prunable"] / count_parameters(whole)["prunable"]
            if 1.0 - left >= target:
                raise FlexCompressError(
                    f"target_sparsity is {target:g} of {self.settings.sparsity_of}, of which {self.settings.model} has "
                    f"lost {1.0 - left:.3g} already: ask for more, or leave out sparsity_of (null)."
                )
            values["target_sparsity"] = 1.0 - (1.0 - target) / left
        return {values.pop("method_type"): values, **self.settings.methods}

    def _report(self, context: StageContext, source: Any, processor: Any, prepared: Prepared) -> dict[str, Any]:
        """Writes what was removed, and says it in a line."""
        from ...methods.vib import report_pruning

        before, after = context.task.load_model(source), context.task.load_model(context.output)
        batches = None
        if self.settings.probe_samples and before.main_input_name == "input_ids":
            batches = _batches(prepared, self.settings.probe_samples, self.settings.eval_batch_size)
        report = report_pruning(before, after, processor, batches, self.log_history)
        report.save(context.output, pictures=bool(self.settings.probe_samples))
        layers = [layer for layers in report.stacks.values() for layer in layers]
        kept, heads = sum(len(layer.kept_heads) for layer in layers), sum(layer.heads for layer in layers)
        ffn, dims = sum(layer.kept_ffn for layer in layers), sum(layer.ffn for layer in layers)
        context.say(
            f"{context.name}: {report.sparsity:.1%} of the parameters of the layers are gone; left are "
            f"{report.hidden['kept']} of {report.hidden['of']} hidden dims, {kept} of {heads} heads, {ffn:,} of "
            f"{dims:,} FFN dims"
        )
        return {"parameters": report.parameters["after"]["total"], "sparsity": report.sparsity}


def _batches(prepared: Prepared, samples: int, size: int) -> list[dict[str, Any]]:
    """Batches of the evaluation split."""
    from ...data import select_split, take

    rows = take(prepared.dataset[select_split(prepared.dataset)], samples)
    return [
        prepared.collator([rows[index] for index in range(start, min(start + size, len(rows)))])
        for start in range(0, len(rows), size)
    ]
