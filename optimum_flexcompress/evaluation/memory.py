"""Peak memory of a model, measured in a fresh process of its own."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from ..errors import FlexCompressError
from .artifact import find_backend, open_artifact
from .inputs import example_batch


def measure_peak_memory(
    path: str | os.PathLike,
    task: str,
    *,
    batch_size: int = 1,
    length: int = 128,
    threads: int | None = None,
    max_new_tokens: int = 0,
    timeout: float = 900.0,
    python: str | None = None,
) -> dict[str, int]:
    """Opens a model in a new process, runs it, and reads the most memory that the process ever held.

    Args:
        path: What [`optimum_flexcompress.evaluation.open_artifact`] takes.
        task: The name of the task.
        batch_size: Rows of the batch that is run.
        length: Tokens in each.
        threads: Threads.
        max_new_tokens: For generating models, how many tokens to generate.
        timeout: Seconds to wait.
        python: The interpreter of another environment, for a model that needs it; None is this one.

    Returns:
        Bytes of resident memory: `peak`; `imports`, what the process held before the model was opened (the
        libraries); and `model`, the difference, which is what the model itself needs.

    Raises:
        FlexCompressError: There is no model, or the process failed; the message carries its last line.
    """
    find_backend(path)  # what is no model is said here, before a process is started for it
    command = [python or sys.executable, "-m", __name__, str(path), "--task", task, "--batch-size", str(batch_size)]
    command += ["--length", str(length), "--max-new-tokens", str(max_new_tokens)]
    if threads is not None:
        command += ["--threads", str(threads)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if python is None:
        # The new process must find this very package, also where it is not installed.
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise FlexCompressError(
            f"Measuring the memory of {path} took longer than {timeout:.0f} s: leave memory out (--no-memory)."
        ) from error
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise FlexCompressError(
            f"The memory of {path} could not be measured ({last}): leave memory out (--no-memory)."
        )
    return json.loads(result.stdout.strip().splitlines()[-1])


def _resident() -> tuple[int, int]:
    """Present and greatest resident memory of this process, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its maximum is inherited from the process that started this one.
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--task", required=True)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=0)
    arguments = parser.parse_args()

    import torch

    from ..tasks import get_task

    task = get_task(arguments.task)
    # Everything that is imported on demand must be in before the starting point is read.
    backend = find_backend(arguments.path)
    if backend == "openvino":
        importlib.import_module(backend)
    _ = task.ort_class if backend == "onnxruntime" else task.auto_class
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    imports = _resident()[0]
    artifact = open_artifact(arguments.path, task, threads=arguments.threads)
    if artifact.backend == "pytorch":
        # Weights are mapped from the file and become resident when first read: which rows of an embedding that are
        # would depend on the batch and on the system's read-ahead.
        for parameter in artifact.model.parameters():
            parameter.detach().sum()
    batch = example_batch(artifact.config, task, arguments.batch_size, arguments.length)
    for _ in range(2):
        if arguments.max_new_tokens:
            count = arguments.max_new_tokens
            artifact.generate(batch, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        else:
            artifact.forward(batch)
    peak = _resident()[1]
    print(json.dumps({"peak": peak, "imports": imports, "model": peak - imports}))


if __name__ == "__main__":
    _main()
