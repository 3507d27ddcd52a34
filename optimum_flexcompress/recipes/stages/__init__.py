"""The stages that a recipe can be made of. A new one is a file here with a class under `@register_stage`."""

from __future__ import annotations

from .base import INPUT, DataSettings, Stage, StageContext, StageSpec, register_stage, stage_class
from .choice import Choose, Keep
from .deployment import Benchmark, Export, Quantize
from .distillation import Distill
from .lengths import LengthAdaptive, Pick, Search
from .modular import Assemble, Modular
from .pruning import Prune
from .training import FineTune


__all__ = [
    "INPUT",
    "Assemble",
    "Benchmark",
    "Choose",
    "DataSettings",
    "Distill",
    "Export",
    "FineTune",
    "Keep",
    "LengthAdaptive",
    "Modular",
    "Pick",
    "Prune",
    "Quantize",
    "Search",
    "Stage",
    "StageContext",
    "StageSpec",
    "register_stage",
    "stage_class",
]
