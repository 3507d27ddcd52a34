"""Two processes train to the same result as one with twice the batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.methods import distributed_script
from tests.methods.toys import assert_same


# Dropout is off; what remains is the order of float32 sums, over three SGD steps at learning rate 0.1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_two(folder: Path, batch_size: int) -> None:
    """`accelerate launch --num_processes 2 --cpu`, which leaves starting processes on CPUs to MPI's launcher."""
    root = Path(__file__).parents[2]
    scripts = Path(sys.executable).parent
    hosts = folder.parent / "hosts"
    hosts.write_text("localhost:2\n", encoding="utf-8")
    command = [str(scripts / "accelerate"), "launch", "--num_processes", "2", "--cpu", "--mpirun_hostfile", str(hosts)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port())]
    command += [distributed_script.__file__, str(folder), str(batch_size)]
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    launch_two(tmp_path / "two", 4)
    distributed_script.main(str(tmp_path / "one"), 8)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [
        "adaptive bart",
        "adaptive bert",
        "checkpointing",
        "every term",
        "headless",
        "modular bart",
        "modular t5",
        "tokens",
    ]
    for name in names:
        one, two = (torch.load(tmp_path / run / name / "result.pt", weights_only=False) for run in ("one", "two"))
        assert (one["processes"], two["processes"]) == (1, 2)
        assert_same(one["weights"], two["weights"], **TOLERANCE)
        for ours, theirs in zip(one["methods"], two["methods"]):
            assert_same(dict(ours), dict(theirs), **TOLERANCE)
        for ours, theirs in zip(one["logs"], two["logs"]):
            for term in [term for term in ours if term.startswith("loss")]:
                assert theirs[term] == pytest.approx(ours[term], rel=1e-4, abs=1.1e-4), (name, term)
