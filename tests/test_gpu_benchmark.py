"""The benchmark for GPUs, dry: its figures need a GPU, its every step can be taken without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def run(*arguments) -> subprocess.CompletedProcess:
    # Hides a GPU, where there is one.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / "benchmarks" / "cuda_int8.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_dry_run(tmp_path):
    result = run("--smoke", "--work", tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "smoke" / "smoke.json").read_text(encoding="utf-8"))
    assert "no figures" in report["cells"]["machine"]["smoke"]
    models = report["cells"]["minilm/2x16"]["models"]
    near = report["cells"]["minilm/fidelity"]["cosine"]
    for title in ("PyTorch fp16", "PyTorch int8 (torchao)", "ONNX Runtime int8, TensorRT"):
        assert models[title]["milliseconds"] > 0 and 0.99 < near[title] < 1.0001
    assert "PyTorch int8 (torchao), compiled" in models
    # Every cell is there: a second run measures nothing.
    assert "-- minilm" not in run("--smoke", "--work", tmp_path).stdout


def test_without_a_gpu_it_says_so(tmp_path):
    result = run("--work", tmp_path)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: PyTorch finds no CUDA GPU here")
    assert list(tmp_path.iterdir()) == []
