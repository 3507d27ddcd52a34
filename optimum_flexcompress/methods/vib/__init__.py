"""Pruning by variational information-bottleneck masks: VTrans, Fast-VTrans and Faster-VTrans (arXiv 2406.05276)."""

from __future__ import annotations

from ...vib_config import VIBPruningConfig
from ..base import register_method
from .method import VIBPruningMethod


register_method(VIBPruningConfig, VIBPruningMethod)

__all__ = ["VIBPruningMethod"]
