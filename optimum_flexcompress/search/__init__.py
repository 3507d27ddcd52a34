"""Searches for the configurations of one trained model that are worth choosing, and keeps them as a front.

Everything is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .assembly_search import search_assemblies
    from .front import Front, Point, read_share, relative_loss
    from .held_out import hold_out
    from .length_search import search_lengths

_WHERE = {
    "Front": "front",
    "Point": "front",
    "hold_out": "held_out",
    "read_share": "front",
    "relative_loss": "front",
    "search_assemblies": "assembly_search",
    "search_lengths": "length_search",
}

__all__ = ["Front", "Point", "hold_out", "read_share", "relative_loss", "search_assemblies", "search_lengths"]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
