"""What a benchmark times: one batch of a shape, or requests of real lengths one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..tasks.base import Task
from .artifact import Artifact
from .inputs import example_batch
from .lanes import LaneArtifact, LaneRun
from .latency import TimesItself, Timing, measure_side_by_side


# Their rows are blocks of equal length: there are no real lengths to time.
BLOCKS = ("text-generation", "fill-mask")


def generates(task: Task) -> bool:
    """Whether the time that counts is that of generating."""
    return task.generation or task.name == "text-generation"


def forward_inputs(artifact: Artifact, batch: dict[str, torch.Tensor], new_tokens: int) -> dict[str, torch.Tensor]:
    """A batch for one forward pass; an encoder-decoder also gets `new_tokens` target tokens."""
    if artifact.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"].new_full((len(batch["input_ids"]), new_tokens), 1)
    return batch


def timed_shapes(
    task: Task, batch_sizes: Sequence[int], lengths: Sequence[int], new_tokens: int
) -> list[tuple[str, int, int]]:
    """`(name, batch size, length)` of everything that is timed: `1x128`, `1x128+32` with generated tokens, `8` images."""
    if task.name == "image-classification":
        return [(f"{size} images" if size > 1 else "1 image", size, 1) for size in batch_sizes]
    suffix = f"+{new_tokens}" if generates(task) else ""
    return [(f"{size}x{length}{suffix}", size, length) for length in lengths for size in batch_sizes]


def runner(artifact: Artifact, batch: dict[str, torch.Tensor], new_tokens: int) -> Callable[[], Any] | TimesItself:
    """What is timed of a model: generating `new_tokens` tokens where that is what it is for, else one forward pass."""
    if isinstance(artifact, LaneArtifact):
        return artifact.prepare_run([batch], new_tokens, stream=False)
    if generates(artifact.task):
        # Exactly as many tokens for every model: one that stops early would look fast.
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
        return lambda: artifact.generate(batch, **options)
    return lambda: artifact.forward(batch)


def time_shape(
    artifacts: Mapping[str, Artifact],
    batch_size: int,
    length: int,
    new_tokens: int,
    shape: str,
    timing: dict[str, Any],
) -> dict[str, Timing]:
    """Times batches of one shape, all models side by side; `timing` is for [`measure_side_by_side`]."""
    runs = {
        name: runner(artifact, example_batch(artifact.config, artifact.task, batch_size, length), new_tokens)
        for name, artifact in artifacts.items()
    }
    with _forgetting(runs):
        return measure_side_by_side(runs, description=f"Timing {shape}", **timing)


def timing_dict(timing: Timing, baseline: Timing, produced: float) -> dict[str, Any]:
    """A timing as the report holds it; `produced` is how many rows (or tokens) a run makes."""
    return {
        **timing.to_dict(),
        "throughput": produced / timing.median,
        "speedup": timing.speedup_over(baseline),
    }


def time_stream(
    artifacts: Mapping[str, Artifact],
    baseline: str,
    batches: list[dict[str, torch.Tensor]],
    new_tokens: int,
    timing: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Times rows one by one at their real lengths, all models side by side."""
    runs = {name: stream_runner(artifact, batches, new_tokens) for name, artifact in artifacts.items()}
    options = {"warmup": 1, "min_sample_seconds": 0.0, "description": "Timing real lengths"}
    with _forgetting(runs):
        timings = measure_side_by_side(runs, **options, **timing)
        passes = {name: run.passes for name, run in runs.items()}
    results = {}
    for name, measured in timings.items():
        rows = len(batches)
        per_row = Timing.of([value / rows for value in measured.seconds], measured.calls, measured.threads)
        results[name] = {
            **per_row.to_dict(),
            "throughput": 1 / per_row.median,
            "speedup": measured.speedup_over(timings[baseline]),
            "p95": float(np.percentile(median_by_row(passes[name], measured.samples), 95)),
            "first_pass": float(np.mean(passes[name][0])),
            "rows": rows,
            "mean_length": float(np.mean([int(batch["attention_mask"].sum()) for batch in batches])),
        }
    return results


def stream_runner(
    artifact: Artifact, batches: list[dict[str, torch.Tensor]], new_tokens: int
) -> StreamRun | TimesItself:
    """Requests one after the other; `passes` of the result holds the seconds of each."""
    if isinstance(artifact, LaneArtifact):
        return artifact.prepare_run(batches, new_tokens, stream=True)
    return StreamRun([runner(artifact, batch, new_tokens) for batch in batches])


@contextmanager
def _forgetting(runs: Mapping[str, Any]) -> Iterator[None]:
    """Lets workers drop their batches afterwards."""
    yield
    for run in runs.values():
        if isinstance(run, LaneRun):
            run.close()


def median_by_row(passes: Sequence[Sequence[float]], last: int) -> np.ndarray:
    """The median seconds of each request over the last passes, `(requests,)`."""
    return np.median(np.asarray(passes[-last:]), axis=0)


class StreamRun:
    """Calls functions one after the other and notes how long each took.

    Args:
        functions: One for each request.
    """

    def __init__(self, functions: Sequence[Callable[[], Any]]):
        self.functions = list(functions)
        self.passes: list[list[float]] = []

    def __call__(self) -> None:
        seconds = []
        for function in self.functions:
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        self.passes.append(seconds)
