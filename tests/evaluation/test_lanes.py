"""Models that another interpreter opens. The other lane is this very environment, in real processes of its own."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import Report, open_artifact, run_benchmark
from optimum_flexcompress.evaluation.lanes import Lanes, Worker, lane_of, read_interpreters
from optimum_flexcompress.evaluation.latency import measure_side_by_side
from optimum_flexcompress.evaluation.wire import HELLO, send
from optimum_flexcompress.quantization.saved import write_saved
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.version import __version__
from tests.evaluation.test_benchmark import QUICK


@pytest.fixture(scope="module")
def marked(classifiers, tmp_path_factory):
    """The student as a model of another lane."""
    folder = tmp_path_factory.mktemp("lanes") / "marked"
    shutil.copytree(classifiers / "student", folder)
    write_saved(folder, "pytorch", "ipex", {}, ["model.safetensors"])
    return folder


@pytest.fixture(scope="module")
def lanes():
    with Lanes({"ipex": sys.executable}, 1) as lanes:
        yield lanes


def program(path, script: str):
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_one_report_over_two_lanes(classifiers, marked, rows, tmp_path):
    report = run_benchmark(
        [classifiers / "student", marked],
        classifiers / "teacher",
        data=rows,
        output=tmp_path / "report",
        interpreters={"ipex": sys.executable},
        **{**QUICK, "memory": True, "batch_sizes": (2,)},
    )
    here, there = report["student"], report["marked"]
    assert (here.lane, there.lane) == (None, "ipex")
    assert there.metrics == here.metrics and there.change == here.change
    assert (there.parameters, there.macs, there.size, there.precision) == (
        here.parameters, here.macs, here.size, "fp32",
    )  # fmt: skip
    # As many rounds as the others, or the ratio would have raised.
    assert there.latency["2x8"]["samples"] == here.latency["2x8"]["samples"] and there.latency["2x8"]["speedup"] > 0
    for result in (here, there):
        assert result.stream["rows"] == 4 and result.stream["first_pass"] > 0 and result.memory["peak"] > 0
    assert report.environment["lanes"]["ipex"]["versions"]["torch"] == torch.__version__
    assert report.environment["lanes"]["ipex"]["threads"] == 1
    assert "<dt>lane ipex</dt>" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "lane ipex: torch" in str(report) and Report.load(tmp_path / "report") == report


def test_a_model_over_there_says_what_it_says_here(lanes, classifiers, marked):
    task = get_task("text-classification")
    far, near = lanes.open(marked, task), open_artifact(classifiers / "student", task)
    batch = {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]]), "labels": torch.tensor([0, 1])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    assert np.array_equal(far.predict(batch), near.predict(batch)) and far.torch_model is None
    assert lanes.open(classifiers / "student", task).torch_model is not None
    with pytest.raises(FlexCompressError, match="no config.json|no model folder"):
        lanes.workers["ipex"].call("open", path=str(marked.parent), task=task.name)
    # A refusal is an answer: the worker is still there.
    assert far.outputs(batch).shape == (2, 3)


def test_rounds_are_interleaved_with_those_of_a_worker(lanes, marked):
    far = lanes.open(marked, get_task("text-classification"))
    batch = {name: torch.ones(1, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    run = far.prepare_run([batch, batch], 0, stream=True)
    order = []

    class Far:
        def timeit(self, calls):
            order.append("far")
            return run.timeit(calls)

    timings = measure_side_by_side(
        {"far": Far(), "near": lambda: order.append("near")}, rounds=4, min_sample_seconds=0.0, progress=False
    )
    assert timings["far"].samples == timings["near"].samples == 4 and timings["far"].median > 0
    # Warm-up and four rounds, each starting with another one.
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert turns == ["far", "near", "far", "near", "far", "near", "far"]
    assert {len(seconds) for seconds in run.passes} == {2}
    run.close()


def test_a_worker_ends_with_its_pipe_in_the_midst_of_work(marked):
    worker = Worker("ipex", sys.executable, 1)
    model = worker.call("open", path=str(marked), task="text-classification")[0]["model"]
    ids = np.ones((8, 32), np.int64)
    worker.call("prepare", {"0/input_ids": ids}, run=0, model=model, new_tokens=0, stream=False)
    send(worker._process.stdin, {"call": "timeit", "run": 0, "calls": 10**8})
    with pytest.raises(subprocess.TimeoutExpired):
        worker._process.wait(0.5)
    # What the system does to the pipes of a process that was killed.
    worker._process.stdin.close()
    assert worker._process.wait(30) == 0
    worker.close()


def test_a_lane_without_an_interpreter(classifiers, marked, rows):
    assert (lane_of(marked), lane_of(classifiers / "student")) == ("ipex", "main")
    with pytest.raises(FlexCompressError, match=r"made for the lane ipex.*add --python ipex=PATH"):
        run_benchmark([marked], data=rows, **QUICK)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "does not exist; give the interpreter"),
        (lambda folder: folder, r"is a folder; give .*[^n]/bin/python"),
        (lambda folder: (folder / "bin").mkdir() or folder / "bin", r"is a folder; give .*[^n]/bin/python"),
        (lambda folder: program(folder / "ends", "echo oh no >&2; exit 3"), "is no Python interpreter .*: oh no"),
        (lambda folder: program(folder / "silent", "exit 3"), "exit code 3"),
        (lambda folder: program(folder / "bare", f'exec {sys.executable} -I -S "$@"'), "has no optimum-flexcompress"),
        (
            lambda folder: program(folder / "old", f"""echo '{{"{HELLO}": "0.0"}}'"""),
            "has optimum-flexcompress 0.0 and",
        ),
    ],
)
def test_interpreters_that_cannot_be(tmp_path, make, message):
    with pytest.raises(FlexCompressError, match=message):
        Worker("ipex", make(tmp_path), 1)


def test_a_worker_that_dies(tmp_path):
    hello = f"""echo '{{"{HELLO}": "{__version__}", "environment": {{}}}}'; echo out of memory >&2"""
    worker = Worker("ipex", program(tmp_path / "dying", hello), 1)
    with pytest.raises(FlexCompressError, match="ended while it was busy: out of memory"):
        worker.call("open", path="x", task="text-classification")
    worker.close()


def test_options():
    assert read_interpreters(["ipex=/a/b=c/python"]) == {"ipex": "/a/b=c/python"}
    for argument, message in (("ipex", "write it as LANE=PATH"), ("ipx=/python", 'is no lane. Did you mean "ipex"')):
        with pytest.raises(FlexCompressError, match=message):
            read_interpreters([argument])
