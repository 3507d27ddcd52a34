"""The machine, the clock, the memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import environment_info, latency, measure_peak_memory, measure_side_by_side
from optimum_flexcompress.evaluation.environment import busy_cores, describe_environment
from optimum_flexcompress.evaluation.latency import Timing
from optimum_flexcompress.evaluation.workloads import StreamRun, median_by_row


def test_the_environment_names_machine_threads_and_versions():
    info = environment_info(threads=3)
    assert json.loads(json.dumps(info)) == info
    assert info["threads"] == 3 and environment_info()["threads"] == torch.get_num_threads()
    assert info["versions"]["torch"] == torch.__version__
    assert 1 <= info["usable_cores"] <= info["cores"]
    assert "3 threads;" in describe_environment(info) and torch.__version__ in describe_environment(info)
    alone = describe_environment({**info, "threads": 1, "usable_cores": 1})
    assert "1 thread;" in alone and "(1 core;" in alone


def test_flags_come_from_the_processor(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : Some CPU\nflags : fpu avx2 avx512_vnni amx_int8\n")
    monkeypatch.setattr("optimum_flexcompress.evaluation.environment.Path", lambda name: cpuinfo)
    info = environment_info()
    assert info["cpu"] == "Some CPU" and info["flags"] == ["avx2", "avx512_vnni", "amx_int8"]
    cpuinfo.write_text("Features : fp asimd asimddp i8mm\n")
    assert environment_info()["flags"] == ["asimd", "asimddp", "i8mm"]


def test_a_busy_machine_is_said():
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        assert busy_cores(0.5) > 0.4
    finally:
        spinning.kill()
        spinning.wait()
    assert "not to be relied on" in describe_environment({**environment_info(), "busy_cores": 1.4})
    assert "not to be relied on" not in describe_environment({**environment_info(), "busy_cores": 0.1})


def test_candidates_take_turns():
    order = []
    timings = measure_side_by_side(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=4,
        warmup=1,
        min_sample_seconds=0.0,
        progress=False,
    )
    assert {name: timing.samples for name, timing in timings.items()} == {"a": 4, "b": 4}
    # The warm-up of each; then in every round two untimed calls and a timed one, starting with another one each time.
    measured = "".join(order).removeprefix("aaabbb")
    assert measured == ("aaabbb" + "bbbaaa") * 2


class Clock:
    """The clock of a process with a thread that spins until some time, as workers of ONNX Runtime do after a run."""

    def __init__(self):
        self.now, self.spins_until, self.used = 0.0, 0.0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.used

    def sleep(self, seconds: float) -> None:
        self.used += max(0.0, min(self.spins_until - self.now, seconds))
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_waiting_for_threads_that_still_spin(clock):
    assert latency.wait_for_idle_threads() and clock.now < 0.05
    clock.spins_until = clock.now + 0.3
    assert latency.wait_for_idle_threads() and 0 <= clock.now - clock.spins_until < 0.05
    clock.spins_until, began = clock.now + 60, clock.now
    assert not latency.wait_for_idle_threads(at_most=1.0) and clock.now - began < 1.1


def test_nothing_is_timed_beside_threads_of_the_one_before(clock):
    beside = []

    def spin() -> None:
        clock.spins_until = clock.now + 0.1

    measure_side_by_side(
        {"spins": spin, "other": lambda: beside.append(clock.now < clock.spins_until)},
        rounds=3,
        warmup=1,
        min_sample_seconds=0.0,
        progress=False,
    )
    # What tells how long a call takes, before the rounds, is no sample: one call and two of the timer's own.
    assert len(beside) == 3 * 4 and not any(beside[3:])


def test_ratios_of_known_times():
    timings = measure_side_by_side(
        {"slow": lambda: time.sleep(0.09), "fast": lambda: time.sleep(0.03)},
        rounds=3,
        min_sample_seconds=0.03,
        progress=False,
    )
    # Sleeping takes as long as was asked, and longer on a busy machine.
    assert timings["fast"].median >= 0.03
    assert 1.5 < timings["fast"].speedup_over(timings["slow"]) <= 3.2
    assert timings["slow"].speedup_over(timings["slow"]) == 1.0


def test_ratios_are_taken_within_rounds():
    # A machine that gets three times slower halfway: medians of each would mix the two halves.
    slow, fast = Timing.of([2, 2, 6, 6, 6], 1, 1), Timing.of([1, 1, 3, 3, 3], 1, 1)
    assert fast.speedup_over(slow) == 2.0
    assert (slow.median, slow.iqr) == (6.0, 4.0)
    with pytest.raises(ValueError, match="side by side"):
        fast.speedup_over(Timing.of([1.0], 1, 1))


def test_short_calls_are_repeated_and_long_measurements_cut():
    timing = measure_side_by_side({"a": lambda: None}, rounds=3, min_sample_seconds=1e-4, progress=False)["a"]
    assert timing.calls > 10
    slow = measure_side_by_side(
        {"a": lambda: time.sleep(0.02)}, rounds=50, max_seconds=0.2, min_sample_seconds=0.0, progress=False
    )
    assert 3 <= slow["a"].samples <= 5


def test_threads_are_those_asked_for():
    seen = []
    measure_side_by_side({"a": lambda: seen.append(torch.get_num_threads())}, rounds=3, threads=2, progress=False)
    assert set(seen) == {2} and torch.get_num_threads() == 1


def test_nothing_to_time():
    with pytest.raises(FlexCompressError, match="nothing to time"):
        measure_side_by_side({})
    with pytest.raises(FlexCompressError, match="at least 3"):
        measure_side_by_side({"a": lambda: None}, rounds=2)


def test_a_stream_times_each_request():
    run = StreamRun([lambda: time.sleep(0.001), lambda: time.sleep(0.006)])
    for _ in range(3):
        run()
    first, second = median_by_row(run.passes, 2)
    assert np.asarray(run.passes).shape == (3, 2) and first < second


def test_memory_grows_with_the_model(tmp_path):
    from transformers import BertConfig, BertModel

    def save(name, vocabulary):
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        BertModel(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    # 64 MB apart in weights.
    small, large = (
        measure_peak_memory(save(name, vocabulary), "feature-extraction", length=16, threads=1)
        for name, vocabulary in (("small", 1000), ("large", 251000))
    )
    assert large["model"] - small["model"] == pytest.approx(64e6, rel=0.25)
    assert small["peak"] == small["imports"] + small["model"]


def test_a_failed_measurement_says_why(tmp_path, monkeypatch):
    with pytest.raises(FlexCompressError, match="neither PyTorch nor ONNX"):
        measure_peak_memory(tmp_path, "fill-mask")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nMemoryError: out of it\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(FlexCompressError, match=r"could not be measured \(MemoryError: out of it\)"):
        measure_peak_memory(tmp_path, "fill-mask")

    def never_ends(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", never_ends)
    with pytest.raises(FlexCompressError, match="longer than 5 s"):
        measure_peak_memory(tmp_path, "fill-mask", timeout=5)
