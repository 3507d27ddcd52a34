"""Length-adaptive training: LengthDrop, LayerDrop, the sandwich rule, in-place distillation."""

from __future__ import annotations

from ...length_config import LengthAdaptiveConfig
from ..base import register_method
from .draws import SubModel, draw_sub_model, smallest_sub_model
from .method import LengthAdaptiveMethod


register_method(LengthAdaptiveConfig, LengthAdaptiveMethod)

__all__ = ["LengthAdaptiveMethod", "SubModel", "draw_sub_model", "smallest_sub_model"]
