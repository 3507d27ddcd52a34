"""What a compressed model costs and what it still knows, measured. Everything is imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .artifact import Artifact, open_artifact
    from .benchmark import run_benchmark
    from .compare import compare_predictions
    from .cost import count_macs, count_parameters, file_size
    from .environment import environment_info
    from .evaluate import evaluate_artifact
    from .latency import Timing, measure_side_by_side
    from .memory import measure_peak_memory
    from .report import Report
    from .token_plots import plot_lengths, plot_words
    from .tokens import TokenTrace, trace_tokens

_WHERE = {
    "Artifact": "artifact",
    "Report": "report",
    "Timing": "latency",
    "TokenTrace": "tokens",
    "compare_predictions": "compare",
    "count_macs": "cost",
    "count_parameters": "cost",
    "environment_info": "environment",
    "evaluate_artifact": "evaluate",
    "file_size": "cost",
    "measure_peak_memory": "memory",
    "measure_side_by_side": "latency",
    "open_artifact": "artifact",
    "plot_lengths": "token_plots",
    "plot_words": "token_plots",
    "run_benchmark": "benchmark",
    "trace_tokens": "tokens",
}

__all__ = [
    "Artifact",
    "Report",
    "Timing",
    "TokenTrace",
    "compare_predictions",
    "count_macs",
    "count_parameters",
    "environment_info",
    "evaluate_artifact",
    "file_size",
    "measure_peak_memory",
    "measure_side_by_side",
    "open_artifact",
    "plot_lengths",
    "plot_words",
    "run_benchmark",
    "trace_tokens",
]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
