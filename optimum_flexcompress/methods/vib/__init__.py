"""Pruning by variational information-bottleneck masks: VTrans, Fast-VTrans and Faster-VTrans (arXiv 2406.05276)."""

from __future__ import annotations

from ...vib_config import VIBPruningConfig
from ..base import register_method
from .attention import AttentionShares, probe_attention
from .method import VIBPruningMethod
from .report import report_pruning


register_method(VIBPruningConfig, VIBPruningMethod)

__all__ = ["AttentionShares", "VIBPruningMethod", "probe_attention", "report_pruning"]
