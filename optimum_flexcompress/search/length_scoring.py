"""Scores one length configuration: its metric, and its cost in multiply-accumulates or measured time."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import FlexCompressError, nearest
from ..evaluation.artifact import Artifact, model_artifact, open_artifact
from ..evaluation.inputs import example_batch
from ..evaluation.latency import measure_side_by_side
from ..evaluation.workloads import runner
from ..token_dropping import LengthConfig, using_lengths
from .evolution import Candidate
from .held_out import HeldOut
from .length_macs import LengthMacs
from .length_model import twin_of
from .length_space import LengthSpace
from .store import Score


RUNTIMES = ("pytorch", "ort", "ort-int8")
OBJECTIVES = ("macs", "latency")


@dataclass(frozen=True)
class Timed:
    """What is timed.

    Attributes:
        batch_size: Rows of a batch without padding.
        length: Its tokens.
        new_tokens: Tokens to generate, for models that do.
        rounds: Interleaved rounds with the full model.
        max_seconds: Rough bound for one configuration.
        threads: Threads of ONNX Runtime and PyTorch.
    """

    batch_size: int = 32
    length: int = 128
    new_tokens: int = 32
    rounds: int = 9
    max_seconds: float = 10.0
    threads: int = 1


class LengthScorer:
    """Scores candidates of a [`LengthSpace`].

    In PyTorch a twin of the model, which shares its weights, drops tokens, so that the two can be timed in turn. In
    ONNX Runtime every configuration becomes a graph of its own, and metric and time are those of the graph.

    Args:
        model: The model at full lengths.
        space: The space.
        held_out: What the metric is measured on.
        macs: What a candidate costs in multiply-accumulates.
        objective: `"macs"` or `"latency"`.
        runtime: `"pytorch"`, `"ort"` or `"ort-int8"`.
        timed: What to time.
        task: What the model is for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        space: LengthSpace,
        held_out: HeldOut,
        macs: LengthMacs,
        *,
        objective: str,
        runtime: str,
        timed: Timed,
        task: Any,
    ):
        self._space, self._held_out, self._macs = space, held_out, macs
        self._objective, self._runtime, self._timed, self._task = objective, runtime, timed, task
        self._twin = model_artifact(twin_of(model), task)
        self._full = model_artifact(model, task)
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> LengthScorer:
        if self._runtime != "pytorch":
            self._folder = tempfile.TemporaryDirectory(prefix="flexcompress-search-")
            self._full = self._exported(None, "full")
        self._held_out.compare_with(self._full)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def __call__(self, candidate: Candidate) -> Score:
        """Scores one candidate."""
        started = time.perf_counter()
        is_full = candidate == self._space.full
        with self._artifact(None if is_full else self._space.config(candidate)) as artifact:
            metric = self._held_out.score(artifact)
            if not math.isfinite(metric):
                raise FlexCompressError(
                    f"The {self._held_out.metric} of {list(candidate)} is {metric}: look at the model, whose outputs "
                    "seem to be no numbers, or choose another metric."
                )
            relative = self._macs(candidate) / self._macs.full
            details: dict[str, Any] = {"macs": self._macs(candidate)}
            if self._objective == "latency":
                relative, times = self._time(artifact, is_full)
                details.update(times)
        details["seconds"] = time.perf_counter() - started
        return Score(metric, relative, details)

    @contextlib.contextmanager
    def _artifact(self, lengths: LengthConfig | None) -> Iterator[Artifact]:
        if lengths is None:
            yield self._full
        elif self._folder is None:
            with using_lengths(self._twin.model, lengths):
                yield self._twin
        else:
            with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
                yield self._exported(lengths, folder)

    def _exported(self, lengths: LengthConfig | None, name: str) -> Artifact:
        from ..export import export_onnx
        from ..quantization import FlexORTQuantizer

        folder = Path(self._folder.name) / name
        int8 = self._runtime == "ort-int8"
        export_onnx(
            self._twin.model,
            folder / "fp32",
            task=self._task.name,
            length_config=lengths,
            fuse=not int8,
            validate=False,
        )
        if int8:
            FlexORTQuantizer.from_pretrained(folder / "fp32").quantize(save_dir=folder / "int8")
        return open_artifact(folder / ("int8" if int8 else "fp32"), self._task, threads=self._timed.threads)

    def _time(self, artifact: Artifact, is_full: bool) -> tuple[float, dict[str, float]]:
        timed = self._timed
        batch = example_batch(artifact.config, self._task, timed.batch_size, timed.length)
        runs = {"full": runner(self._full, batch, timed.new_tokens)}
        if not is_full:
            runs["candidate"] = runner(artifact, batch, timed.new_tokens)
        timings = measure_side_by_side(
            runs, rounds=timed.rounds, max_seconds=timed.max_seconds, threads=timed.threads, progress=False
        )
        full, own = timings["full"], timings.get("candidate", timings["full"])
        relative = 1.0 if is_full else 1 / own.speedup_over(full)
        return relative, {
            "milliseconds": own.median * 1e3,
            "milliseconds_iqr": own.iqr * 1e3,
            "full_milliseconds": full.median * 1e3,
        }


def check_choice(name: str, value: str, known: tuple[str, ...]) -> str:
    """Raises [`FlexCompressError`] unless `value` is one of `known`."""
    if value not in known:
        raise FlexCompressError(f"{name} (--{name}) is {value!r}.{nearest(str(value), known)}")
    return value
