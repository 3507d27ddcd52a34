"""Compression methods: the interface, and the methods that come with the package."""

from __future__ import annotations

from . import distillation, length_adaptive, modular, vib  # noqa: F401  register their methods
from .base import (
    FULL_PASS,
    CompressionMethod,
    LossTerm,
    Needs,
    ParameterGroup,
    PrepareContext,
    Step,
    constant,
    create_method,
    register_method,
)


__all__ = [
    "FULL_PASS",
    "CompressionMethod",
    "LossTerm",
    "Needs",
    "ParameterGroup",
    "PrepareContext",
    "Step",
    "constant",
    "create_method",
    "register_method",
]
