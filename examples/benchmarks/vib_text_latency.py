"""The timings of `vib_text.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from ort_int8 import made_up, open_session, sentences, session_runner, torch_runner
from train_overhead import Lockstep, build_data, build_models, quiet_arguments
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer, VIBPruningConfig
from optimum_flexcompress.evaluation.latency import Timing, measure_side_by_side
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.quantization import quantize_folder


STREAM, ROUNDS, MAX_SECONDS = 32, 15, 40.0
SHAPES = ("1x64", "32x64")
TARGET_STEP = 1.5


def _questions(folder: Path) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = sentences("test")
    return [dict(tokenizer([text], return_tensors="np")) for text in texts[:: len(texts) // STREAM][:STREAM]]


def _workloads(folder: Path) -> dict[str, list[dict]]:
    """Name to batches."""
    shapes = {shape: [made_up(*map(int, shape.split("x")))] for shape in SHAPES}
    return {**shapes, "stream": _questions(folder)}


def _summary(timings: dict[str, Timing], calls: int) -> dict[str, Any]:
    """Milliseconds for one batch, with the speed-up over the first model."""
    base = next(iter(timings.values()))
    return {
        name: {
            "milliseconds": 1e3 * timing.median / calls,
            "spread": 1e3 * timing.iqr / calls,
            "speedup": timing.speedup_over(base),
        }
        for name, timing in timings.items()
    }


def _measure(runners: dict[str, Callable[[], None]], calls: int, threads: int, name: str) -> dict[str, Any]:
    timings = measure_side_by_side(runners, rounds=ROUNDS, max_seconds=MAX_SECONDS, threads=threads, description=name)
    return _summary(timings, calls)


def _sessions(models: dict[str, Path], folder: Path, threads: int) -> dict[str, Any]:
    found = {}
    for index, (name, path) in enumerate(models.items()):
        export_onnx(path, folder / f"{index}-fp32", task="text-classification")
        quantize_folder(folder / f"{index}-fp32", folder / f"{index}-int8")
        found[name] = open_session(folder / f"{index}-int8", threads)
    return found


def int8_latency(models: dict[str, Path], threads: int) -> dict[str, Any]:
    """Dynamic int8 in ONNX Runtime, all models side by side; `stream` is real questions one by one."""
    with tempfile.TemporaryDirectory() as temporary:
        sessions = _sessions(models, Path(temporary), threads)
        return {
            name: _measure(
                {model: session_runner(session, batches) for model, session in sessions.items()},
                len(batches),
                threads,
                name,
            )
            for name, batches in _workloads(next(iter(models.values()))).items()
        }


def align_latency(models: dict[str, Path], threads: int) -> dict[str, Any]:
    """PyTorch in single precision and ONNX Runtime in int8, all models side by side in one run."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        sessions = _sessions(models, Path(temporary), threads)
        loaded = {
            name: AutoModelForSequenceClassification.from_pretrained(path).eval() for name, path in models.items()
        }
        for name, batches in _workloads(next(iter(models.values()))).items():
            for runtime, make, candidates in (
                ("PyTorch fp32", torch_runner, loaded),
                ("ONNX Runtime int8", session_runner, sessions),
            ):
                runners = {model: make(candidate, batches) for model, candidate in candidates.items()}
                title = f"{runtime}, {name}"
                found[title] = _measure(runners, len(batches), threads, title)
    return found


def step_cost(threads: int, batch_size: int = 32, length: int = 64) -> dict[str, Any]:
    """A training step with masks over a plain one, in single precision, interleaved; noise once per sequence."""
    model, _ = build_models(length)
    data = build_data(length, batch_size)
    masks = VIBPruningConfig(target_sparsity=0.7, warmup_fraction=0.0, ramp_fraction=0.8, hold_fraction=0.1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        args = quiet_arguments(folder, batch_size, torch.cuda.is_available())

        def trained() -> Any:
            copy = type(model)(model.config)
            copy.load_state_dict(model.state_dict())
            return copy

        trainers = {
            "plain": Trainer(model=trained(), args=args, train_dataset=data),
            "masked": FlexCompressTrainer(
                model=trained(),
                args=args,
                train_dataset=data,
                compression_config=FlexCompressConfig(methods=[masks]),
            ),
        }
        for trainer in trainers.values():
            handler = trainer.callback_handler
            handler.callbacks = [item for item in handler.callbacks if type(item).__name__ != "PrinterCallback"]
        steps = {name: stack.enter_context(Lockstep(trainer, threads)) for name, trainer in trainers.items()}
        timings = measure_side_by_side(steps, rounds=ROUNDS, max_seconds=MAX_SECONDS, threads=threads)
    return {
        "ratio": 1 / timings["masked"].speedup_over(timings["plain"]),
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
    }
