"""Models that need another environment than this one: each lane's are opened in a worker process of its interpreter.

Backends that cannot share an environment live in lanes: `main`, and `ipex`, which needs an older torch. What a saved
model needs stands in the record beside it. A worker opens, runs and times models; only batches, predictions and
seconds go through the pipe, so that nothing of the transport is in the figures.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from ..errors import FlexCompressError, nearest
from ..quantization.saved import has_saved, peek_saved
from ..tasks.base import Task, load_pretrained
from ..version import __version__
from .artifact import Artifact, open_artifact
from .wire import HELLO, receive, send


# Lane -> the module that only its environment has; the main lane needs none.
LANES = {"main": None, "ipex": "intel_extension_for_pytorch"}
_ENDS_WITHIN = 10.0


def lane_of(path: str | os.PathLike) -> str:
    """The lane that a model needs.

    Args:
        path: A model folder, or a file in one.

    Raises:
        FlexCompressError: Its record is damaged.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    return peek_saved(folder).lane if has_saved(folder) else "main"


def read_interpreters(arguments: Iterable[str]) -> dict[str, str]:
    """`--python ipex=PATH` as a dictionary.

    Raises:
        FlexCompressError: One of them is not LANE=PATH, or the lane is not known.
    """
    found = {}
    for argument in arguments:
        lane, equals, python = argument.partition("=")
        if not (lane and equals and python):
            raise FlexCompressError(f"--python {argument}: write it as LANE=PATH, such as ipex=.venv-ipex/bin/python.")
        if lane not in LANES:
            raise FlexCompressError(f"--python {argument}: {lane!r} is no lane.{nearest(lane, LANES)}")
        found[lane] = python
    return found


def find_interpreter(lane: str, python: str | os.PathLike) -> str:
    """The program to start for a lane.

    Raises:
        FlexCompressError: It cannot be run.
    """
    path = Path(python).expanduser()
    program = shutil.which(str(path))
    if program is None:
        wrong = "is a folder" if path.is_dir() else "cannot be run" if path.exists() else "does not exist"
        inside = path / "python" if path.name == "bin" else path / "bin" / "python"
        raise FlexCompressError(
            f"--python {lane}={python}: {path} {wrong}; give the interpreter of that environment, such as "
            f"{inside if path.is_dir() else '.venv-ipex/bin/python'}."
        )
    return program


class Worker:
    """A process of another interpreter that opens and times models.

    Args:
        lane: Its lane.
        python: Its interpreter.
        threads: Threads for every model.

    Raises:
        FlexCompressError: It is no interpreter, or one without this version of this package.
    """

    def __init__(self, lane: str, python: str | os.PathLike, threads: int):
        self.lane, self.python = lane, find_interpreter(lane, python)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._numbers = itertools.count()
        try:
            self._process = subprocess.Popen(
                [self.python, "-m", f"{__package__}.worker", "--threads", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
        except OSError as error:
            raise FlexCompressError(f"--python {lane}={python} cannot be started: {error.strerror}.") from error
        try:
            self.environment = self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> dict[str, Any]:
        opening = f'{{"{HELLO}":'.encode()
        line = b""
        while not line.startswith(opening):
            line = self._process.stdout.readline()
            if not line:
                self._process.wait()
                raise FlexCompressError(self._why_it_did_not_start())
        hello = json.loads(line)
        if hello[HELLO] != __version__:
            raise FlexCompressError(
                f"{self.python} has optimum-flexcompress {hello[HELLO]} and this environment {__version__}: install the "
                "same version in both."
            )
        return hello["environment"]

    def _why_it_did_not_start(self) -> str:
        said = self._last_error()
        option = f"--python {self.lane}={self.python}"
        if "No module named" in said and "optimum_flexcompress" in said:
            return (
                f"{option}: that environment has no optimum-flexcompress; install this version ({__version__}) in it."
            )
        return f"{option} is no Python interpreter that can start a worker: {said}"

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with exit code {self._process.returncode}"

    def call(
        self, request: str, arrays: Mapping[str, np.ndarray] | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Asks for something, and waits for the answer.

        Args:
            request: A method of [`optimum_flexcompress.evaluation.worker.Session`].
            arrays: For it.
            **arguments: For it; plain JSON types.

        Raises:
            FlexCompressError: The worker refused, or ended.
        """
        try:
            send(self._process.stdin, {"call": request, **arguments}, arrays)
            reply, results = receive(self._process.stdout)
        except (EOFError, BrokenPipeError):
            self._process.wait()
            raise FlexCompressError(
                f"The process for the lane {self.lane} ({self.python}) ended while it was busy: {self._last_error()}"
            ) from None
        if "error" in reply:
            raise FlexCompressError(reply["error"])
        return reply, results

    def next_run(self) -> int:
        """A number for something to be timed."""
        return next(self._numbers)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            # What could not be written to a process that is gone is flushed once more.
            self._process.stdin.close()
        try:
            self._process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


@dataclass
class LaneArtifact(Artifact):
    """A model that a worker has opened.

    Attributes:
        worker: The worker.
        number: The model's number there.
    """

    worker: Worker = field(kw_only=True)
    number: int = field(kw_only=True)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """Not here: the model's own output stays in the worker; see `outputs`."""
        raise NotImplementedError("The model runs in another process, which returns what `outputs` reads.")

    def outputs(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """See the base class."""
        reply, found = self.worker.call("outputs", _arrays(batch), model=self.number)
        parts = tuple(torch.from_numpy(found[str(number)]) for number in range(len(found)))
        return parts if reply["tuple"] else parts[0]

    def generate(self, batch: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """See the base class."""
        _, found = self.worker.call("generate", _arrays(batch), model=self.number, options=options)
        return torch.from_numpy(found["ids"])

    def prepare_run(self, batches: list[Mapping[str, torch.Tensor]], new_tokens: int, stream: bool) -> LaneRun:
        """Hands batches over that are going to be timed."""
        run = self.worker.next_run()
        arrays = {
            f"{number}/{name}": value for number, batch in enumerate(batches) for name, value in _arrays(batch).items()
        }
        self.worker.call("prepare", arrays, run=run, model=self.number, new_tokens=new_tokens, stream=stream)
        return LaneRun(self.worker, run)


class LaneRun:
    """Something to be timed that times itself, in a worker.

    Args:
        worker: The worker.
        number: Of the run there.
    """

    def __init__(self, worker: Worker, number: int):
        self._worker, self._number = worker, number

    def timeit(self, calls: int) -> float:
        """Mean seconds of so many calls; see [`optimum_flexcompress.evaluation.latency.local_timer`]."""
        return self._worker.call("timeit", run=self._number, calls=calls)[0]["seconds"]

    @property
    def passes(self) -> list[list[float]]:
        """Of a stream: the seconds of every request in every pass."""
        return self._worker.call("passes", run=self._number)[0]["passes"]

    def close(self) -> None:
        """Lets the worker forget the batches."""
        self._worker.call("forget", run=self._number)


class Lanes:
    """Opens models, those of other lanes in workers; ends the workers when it is left.

    Args:
        interpreters: Lane -> interpreter.
        threads: Threads for every model.
    """

    def __init__(self, interpreters: Mapping[str, str | os.PathLike] | None, threads: int):
        self.interpreters = dict(interpreters or {})
        self.workers: dict[str, Worker] = {}
        self._threads = threads

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def interpreter_for(self, path: str | os.PathLike) -> str | None:
        """The interpreter that opens a model; None for this one.

        Raises:
            FlexCompressError: It needs a lane that this environment is not, and no interpreter was given for it.
        """
        lane = lane_of(path)
        if lane in self.interpreters:
            return find_interpreter(lane, self.interpreters[lane])
        module = LANES.get(lane, lane)
        if module is not None and importlib.util.find_spec(module) is None:
            raise FlexCompressError(
                f"{path} was made for the lane {lane}, which needs an environment of its own: add "
                f"--python {lane}=PATH with the interpreter of that environment, such as .venv-{lane}/bin/python."
            )
        return None

    def open(self, path: str | os.PathLike, task: Task) -> Artifact:
        """Opens a model where it has to be opened; see [`open_artifact`]."""
        path = Path(path).expanduser()
        if not path.exists() or self.interpreter_for(path) is None:
            return open_artifact(path, task, threads=self._threads)
        lane = lane_of(path)
        if lane not in self.workers:
            self.workers[lane] = Worker(lane, self.interpreters[lane], self._threads)
        worker = self.workers[lane]
        reply, _ = worker.call("open", path=str(path.absolute()), task=task.name)
        folder = path.parent if path.is_file() else path
        return LaneArtifact(
            path,
            task,
            reply["backend"],
            reply["precision"],
            None,
            load_pretrained(AutoConfig, folder),
            worker=worker,
            number=reply["model"],
        )

    def environments(self) -> dict[str, Any]:
        """What a report says about the other environments: `lanes`, by name; nothing where all ran in this one."""
        found = {
            lane: {name: worker.environment[name] for name in ("python", "threads", "versions")}
            for lane, worker in self.workers.items()
        }
        return {"lanes": found} if found else {}


def _arrays(batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in batch.items()}
