"""The stages of Modular Transformers: one trains modules, the other assembles a model from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import FlexCompressError
from .base import Stage, StageContext, model_of, register_stage
from .training import TrainingSettings, TrainingStage, load_config


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...modular_config import ModularConfig

# Where the check of one stage leaves the modules for that of the other.
_CONFIG = "flexcompress_modular_config"
PICTURE = "assemblies.png"
_SHOWN = (1.1, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class ModularSettings(TrainingSettings):
    """Settings of the stage `modular`.

    Attributes:
        model: The stage (or `input`) whose model gets modules.
        modules: Fields of [`ModularConfig`], such as `{granularities: [2, 3], initialization: first}`.
    """

    model: str = "finetune"
    modules: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        self.config()

    def config(self) -> ModularConfig:
        """The method's config."""
        from ...configuration import MethodConfig

        return MethodConfig.from_dict({"method_type": "modular", **self.modules})


@register_stage("modular")
class Modular(TrainingStage):
    """Trains modules for all assemblies at once.

    The stage's folder holds the full model, the modules, and a picture of what assemblies by rule are made of.
    """

    Settings = ModularSettings
    settings: ModularSettings
    produces = "modular checkpoint"
    # The modules are new, and what they stand beside is not trained.
    rate_factor = 2.0

    def inputs(self) -> list[str]:
        """See the base class."""
        return [self.settings.model]

    def describe(self) -> str:
        """See the base class."""
        return f"training modules for {self.settings.model}, for every ratio at once"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> PreTrainedModel:
        """Asks the method whether it can work with the model."""
        from transformers import TrainingArguments

        from ...evaluation.benchmark import require_report_extra
        from ...methods.base import PrepareContext, create_method

        require_report_extra()
        self.check_arguments()
        model = copy.deepcopy(model_of(models, self.settings.model))
        config = self.settings.config()
        arguments = TrainingArguments(output_dir="unused", report_to="none")
        create_method(config).validate(PrepareContext(model, None, arguments, [config]))
        setattr(model, _CONFIG, config)
        return model

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        from ...configuration import FlexCompressConfig
        from ...evaluation.assemblies import draw_assemblies
        from ...methods.modular import STRATEGIES, ModularModel

        source = context.artifact(self.settings.model)
        processor = context.task.load_processor(source)
        prepared = context.prepare(processor, model=load_config(source))
        model = self.load_for_training(context, source)
        config = self.settings.config()
        metrics = self.train(
            context, model, processor, prepared, compression_config=FlexCompressConfig(methods=[config])
        )
        modular = ModularModel(model, config)
        plans = {}
        for strategy in STRATEGIES if len(modular.depths) > 1 else STRATEGIES[:1]:
            for ratio in _SHOWN:
                if ratio <= modular.smallest().ratio + 1e-6:
                    assembly = modular.choose(strategy, ratio)
                    plans.setdefault(f"{strategy} {assembly.ratio:.3g}x", assembly.to_dict())
        draw_assemblies(plans, context.output / PICTURE)
        return {f"full model {name}": value for name, value in metrics.items()}


@dataclass
class AssembleSettings:
    """Settings of the stage `assemble`.

    Attributes:
        model: The stage of type `modular` whose modules are used.
        strategy: `size-first`, `speed-first`, or a JSON file with a plan.
        ratio: Layers of the full model over those of the assembly; not with a plan.
    """

    model: str = "modular"
    strategy: str = "size-first"
    ratio: float | None = None

    def __post_init__(self):
        if (self.ratio is None) != self.strategy.endswith(".json"):
            raise FlexCompressError(
                f"ratio must be given with the strategy {self.strategy}, such as 2."
                if self.ratio is None
                else "ratio has no place beside a plan, which says itself how many layers there are."
            )


@register_stage("assemble")
class Assemble(Stage):
    """Assembles a stock model of fewer layers."""

    Settings = AssembleSettings
    settings: AssembleSettings

    def inputs(self) -> list[str]:
        """See the base class."""
        return [self.settings.model]

    def files(self) -> list[str]:
        """See the base class."""
        return [self.settings.strategy] if self.settings.ratio is None else []

    def describe(self) -> str:
        """See the base class."""
        settings = self.settings
        size = "" if settings.ratio is None else f", {settings.ratio:g} times fewer layers"
        return f"assembling a model from {settings.model}: {settings.strategy}{size}"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> PreTrainedModel:
        """Assembles the model without its weights."""
        from ...methods.modular import ModularModel

        model = model_of(models, self.settings.model)
        config = getattr(model, _CONFIG, None)
        if config is None:
            raise FlexCompressError(
                f'"{self.settings.model}" trains no modules to assemble: name a stage of type modular.'
            )
        modular = ModularModel(copy.deepcopy(model), config)
        small = modular.assemble(self._assembly(modular))
        delattr(small, _CONFIG)
        return small

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        from ...methods.modular import ModularModel

        source = context.artifact(self.settings.model)
        modular = ModularModel.from_pretrained(source, dtype="auto")
        assembly = modular.save_assembled(
            self._assembly(modular), context.output, source=source, name=context.name, overwrite=True
        )
        for line in assembly.summary().splitlines():
            context.say(f"{context.name}: {line}")
        return {"layers": assembly.layers, "ratio": assembly.ratio}

    def _assembly(self, modular: Any) -> Any:
        from ...methods.modular import Assembly

        settings = self.settings
        if settings.ratio is None:
            return modular.checked(Assembly.from_json_file(settings.strategy))
        return modular.choose(settings.strategy, settings.ratio)
