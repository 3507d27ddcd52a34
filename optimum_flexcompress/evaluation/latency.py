"""Times several things side by side, so that their ratios can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from ..errors import FlexCompressError
from .limits import check_rounds


# What torch's timer runs before each sample.
UNTIMED_CALLS = 2
# Threads are idle once they have used less than a fifth of a core this often in a row, for so many seconds each: on a
# busy machine, a thread that spins may wait for its turn for a while.
_IDLE_SHARE, _IDLE_LOOKS, _LOOK_SECONDS = 0.2, 3, 0.005


@dataclass
class Timing:
    """How long one call takes.

    Attributes:
        median: Seconds.
        iqr: Distance between the quartiles, seconds.
        samples: Number of timed samples.
        calls: Calls in each sample, which a sample averages over.
        threads: Threads that PyTorch was given.
        seconds: The samples, in the order of the rounds.
    """

    median: float
    iqr: float
    samples: int
    calls: int
    threads: int
    seconds: list[float]

    @classmethod
    def of(cls, seconds: list[float], calls: int, threads: int) -> Timing:
        """Summarises samples."""
        low, median, high = np.percentile(seconds, [25, 50, 75])
        return cls(float(median), float(high - low), len(seconds), calls, threads, [float(value) for value in seconds])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def speedup_over(self, baseline: Timing) -> float:
        """How many times faster than `baseline`, measured in the same rounds.

        The median of the ratios within a round: a machine that slows down for a while slows both down, and their
        ratio keeps.
        """
        if len(self.seconds) != len(baseline.seconds):
            raise ValueError(f"{len(self.seconds)} and {len(baseline.seconds)} rounds were not measured side by side.")
        return float(np.median(np.divide(baseline.seconds, self.seconds)))


class TimesItself(Protocol):
    """Something to be timed that runs in another process."""

    def timeit(self, calls: int) -> float:
        """Mean seconds of so many calls, after untimed ones."""
        ...


def local_timer(function: Callable[[], Any], threads: int) -> Callable[[int], float]:
    """What takes one sample: called with a number of calls, it returns the mean seconds of one.

    torch's timer runs the function untimed, twice, before.
    """
    timer = Timer("run()", globals={"run": function}, num_threads=threads)
    return lambda calls: timer.timeit(calls).mean


def measure_side_by_side(
    candidates: Mapping[str, Callable[[], Any] | TimesItself],
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_sample_seconds: float = 0.05,
    max_seconds: float | None = None,
    threads: int | None = None,
    description: str = "Timing",
    progress: bool = True,
) -> dict[str, Timing]:
    """Times callables in interleaved rounds with torch's benchmark timer.

    Each round times every candidate once, starting with another one each time. Before each sample we wait until the
    threads of the previous candidate's runtime have stopped spinning, which takes longer than several calls of a small
    model, and torch's timer runs the candidate untimed (twice), because the caches hold the previous one's weights.

    Args:
        candidates: Name -> what to time, called without arguments; or an object with `timeit(calls) -> seconds`, which
            does for itself, in a process of its own, what [`local_timer`] does, and is idle again afterwards.
        rounds: Samples for each candidate, at least 3.
        warmup: Calls before the first round, beside the timer's own; they tell how long a call takes.
        min_sample_seconds: Short calls are repeated within a sample until it takes about this long.
        max_seconds: Rough bound for the whole measurement; rounds are cut, but not below 3.
        threads: Threads for PyTorch; None keeps the present number. Sessions of ONNX Runtime have a number of their
            own, which is set when they are opened.
        description: Of the progress bar.
        progress: Whether to show it.

    Returns:
        Name -> timing. The samples at one position of `seconds` belong to the same round.

    Raises:
        FlexCompressError: There is nothing to time, or too few rounds.
    """
    if not candidates:
        raise FlexCompressError("There is nothing to time.")
    check_rounds(rounds)
    threads = threads if threads is not None else torch.get_num_threads()
    timers = {
        name: getattr(candidate, "timeit", None) or local_timer(candidate, threads)
        for name, candidate in candidates.items()
    }
    calls, once = {}, {}
    for name, timer in timers.items():
        wait_for_idle_threads()
        once[name] = timer(max(warmup, 1))
        calls[name] = max(1, int(np.ceil(min_sample_seconds / once[name])))
    if max_seconds is not None:
        one_round = sum(once[name] * (calls[name] + UNTIMED_CALLS) for name in timers)
        rounds = max(3, min(rounds, int(max_seconds / one_round)))

    seconds: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    for number in tqdm(range(rounds), desc=description, unit="round", leave=False, disable=not progress):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            wait_for_idle_threads()
            seconds[name].append(timers[name](calls[name]))
    return {name: Timing.of(values, calls[name], threads) for name, values in seconds.items()}


def wait_for_idle_threads(at_most: float = 2.0) -> bool:
    """Waits until no other thread of this process is at work.

    The workers of ONNX Runtime and of OpenMP go on spinning after a run, for tens of milliseconds and more, in case
    another one follows; whatever is timed meanwhile shares the cores with them.

    Args:
        at_most: Seconds after which to give up.

    Returns:
        Whether they have become idle.
    """
    end, idle = time.perf_counter() + at_most, 0
    while idle < _IDLE_LOOKS:
        began, used = time.perf_counter(), time.process_time()
        if began >= end:
            return False
        time.sleep(_LOOK_SECONDS)
        busy = (time.process_time() - used) / (time.perf_counter() - began)
        idle = idle + 1 if busy < _IDLE_SHARE else 0
    return True
