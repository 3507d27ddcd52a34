"""Generation latency of assembled models, all in one run."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from onnxruntime import SessionOptions
from transformers import AutoModelForSeq2SeqLM

from optimum_flexcompress import FlexORTModelForSeq2SeqLM
from optimum_flexcompress.evaluation.latency import measure_side_by_side
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.quantization import quantize_folder


BEAMS, BATCHES = (1, 4), (1, 32)
TITLE = "PyTorch fp32, greedy, batch 32"
TARGET = 4.3
"""What 6x should reach there. At batch 1 what `generate` itself takes for each token weighs more."""


def generation_latency(
    folders: dict[str, Path],
    rows: dict[str, torch.Tensor],
    new_tokens: int,
    threads: int,
    rounds: int = 15,
    max_seconds: float = 150.0,
) -> dict[str, Any]:
    """Times generation of a fixed number of tokens, side by side, greedy and with four beams.

    Args:
        folders: Models by name; the first is what speed-ups refer to.
        rows: `input_ids` and `attention_mask` of inputs to take a batch from.
        new_tokens: Tokens that every run generates.
        threads: Threads.
        rounds: Interleaved rounds.
        max_seconds: Rough bound of each of the eight runs.

    Returns:
        By runtime, beams and batch, and by model: milliseconds, their spread, and the speed-up over the first.
    """
    found: dict[str, Any] = {"input": rows["input_ids"].shape[1], "new_tokens": new_tokens, "runs": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for runtime, models in (("PyTorch fp32", _torch_models(folders)), ("ORT int8", None)):
            if models is None:
                models = _int8_models(folders, Path(temporary), threads)
            for beams, size in product(BEAMS, BATCHES):
                title = f"{runtime}, {'greedy' if beams == 1 else f'{beams} beams'}, batch {size}"
                batch = {name: value[:size] for name, value in rows.items()}
                runners = {name: _runner(model, batch, new_tokens, beams) for name, model in models.items()}
                timings = measure_side_by_side(
                    runners, rounds=rounds, max_seconds=max_seconds, threads=threads, description=title
                )
                full = next(iter(timings.values())).seconds
                found["runs"][title] = {
                    name: {
                        "milliseconds": 1e3 * timing.median,
                        "spread": 1e3 * timing.iqr,
                        "speedup": statistics.median(a / b for a, b in zip(full, timing.seconds, strict=True)),
                    }
                    for name, timing in timings.items()
                }
    return found


def _torch_models(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for name, folder in folders.items()}


def _int8_models(folders: dict[str, Path], temporary: Path, threads: int) -> dict[str, Any]:
    models = {}
    options = SessionOptions()
    options.intra_op_num_threads = threads
    for index, (name, folder) in enumerate(folders.items()):
        export_onnx(folder, temporary / f"{index}-fp32", task="text2text-generation", validate=False)
        quantize_folder(temporary / f"{index}-fp32", temporary / f"{index}-int8")
        models[name] = FlexORTModelForSeq2SeqLM.from_pretrained(temporary / f"{index}-int8", session_options=options)
    return models


def _runner(model: Any, batch: dict[str, torch.Tensor], new_tokens: int, beams: int) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        ids = model.generate(
            **batch, num_beams=beams, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens
        )
        assert ids.shape[1] == new_tokens + 1

    return run


def latency_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for each model milliseconds and speed-up in each run."""
    header = ["model", *found["runs"]]
    names = next(iter(found["runs"].values()))
    rows = [
        [name, *(f"{run[name]['milliseconds']:.1f} ms, {run[name]['speedup']:.2f}x" for run in found["runs"].values())]
        for name in names
    ]
    return header, rows
