"""Distillation: logits, hidden states, attention maps, MiniLM versions 1 and 2, and students made from a teacher."""

from __future__ import annotations

from ...configuration import DistillationConfig, MiniLMConfig
from ..base import register_method
from .method import DistillationMethod
from .minilm import MiniLMMethod
from .student import make_student


register_method(DistillationConfig, DistillationMethod)
register_method(MiniLMConfig, MiniLMMethod)

__all__ = ["DistillationMethod", "MiniLMMethod", "make_student"]
