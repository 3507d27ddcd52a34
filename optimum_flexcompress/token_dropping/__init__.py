"""Encoders that drop tokens layer by layer: length configurations, and the hooks that carry them out."""

from __future__ import annotations

from .lengths import FULL, LengthConfig
from .model import check_lengths, dropping_stack, lengths_of, set_lengths, using_lengths
from .reading import read_lengths
from .trace import kept_positions


__all__ = [
    "FULL",
    "LengthConfig",
    "check_lengths",
    "dropping_stack",
    "kept_positions",
    "lengths_of",
    "read_lengths",
    "set_lengths",
    "using_lengths",
]
