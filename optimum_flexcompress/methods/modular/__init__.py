"""Modular Transformers: modules that stand for several layers, and models assembled from them."""

from __future__ import annotations

from ...modular_config import ModularConfig
from ..base import register_method
from .assembly import Assembly, Piece
from .method import ModularMethod
from .model import MODULES_NAME, ModularModel, is_modular
from .strategies import STRATEGIES, tilings


register_method(ModularConfig, ModularMethod)

__all__ = ["MODULES_NAME", "STRATEGIES", "Assembly", "ModularMethod", "ModularModel", "Piece", "is_modular", "tilings"]
