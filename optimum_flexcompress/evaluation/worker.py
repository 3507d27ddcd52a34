"""The process that opens and times models in the environment that they need, for a benchmark in another one.

`python -m optimum_flexcompress.evaluation.worker` takes requests on its standard input and answers on its standard
output, in the format of [`optimum_flexcompress.evaluation.wire`]; it ends with its input, whatever it is doing.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import FlexCompressError
from ..version import __version__
from .artifact import Artifact, open_artifact, to_numpy
from .environment import environment_info
from .latency import local_timer, wait_for_idle_threads
from .wire import HELLO, receive, send
from .workloads import StreamRun, runner


Reply = tuple[dict[str, Any], dict[str, np.ndarray]]


class Session:
    """The models and runs of one benchmark; every public method answers one kind of request.

    Args:
        threads: Threads for every model.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._artifacts: list[Artifact] = []
        self._runs: dict[int, Any] = {}

    def open(self, arrays: Mapping[str, np.ndarray], path: str, task: str) -> Reply:
        """Opens a model; answers with its number."""
        artifact = open_artifact(path, task, threads=self._threads)
        self._artifacts.append(artifact)
        facts = {"backend": artifact.backend, "precision": artifact.precision}
        return {"model": len(self._artifacts) - 1, **facts}, {}

    def outputs(self, arrays: Mapping[str, np.ndarray], model: int) -> Reply:
        """What the metrics read of a batch."""
        found = self._artifacts[model].predict(_batch(arrays))
        parts = found if isinstance(found, tuple) else (found,)
        return {"tuple": isinstance(found, tuple)}, {str(number): part for number, part in enumerate(parts)}

    def generate(self, arrays: Mapping[str, np.ndarray], model: int, options: dict[str, Any]) -> Reply:
        """Generated token ids."""
        return {}, {"ids": to_numpy(self._artifacts[model].generate(_batch(arrays), **options))}

    def prepare(self, arrays: Mapping[str, np.ndarray], run: int, model: int, new_tokens: int, stream: bool) -> Reply:
        """Keeps the batches that are going to be timed."""
        batches = [_batch(part) for part in split(arrays)]
        runs = [runner(self._artifacts[model], batch, new_tokens) for batch in batches]
        self._runs[run] = StreamRun(runs) if stream else runs[0]
        return {}, {}

    def timeit(self, arrays: Mapping[str, np.ndarray], run: int, calls: int) -> Reply:
        """Mean seconds of a call; the threads of this process are idle again when it answers."""
        seconds = local_timer(self._runs[run], self._threads)(calls)
        wait_for_idle_threads()
        return {"seconds": seconds}, {}

    def passes(self, arrays: Mapping[str, np.ndarray], run: int) -> Reply:
        """The seconds of every request in every pass of a stream."""
        return {"passes": self._runs[run].passes}, {}

    def forget(self, arrays: Mapping[str, np.ndarray], run: int) -> Reply:
        """Drops the batches of a run."""
        self._runs.pop(run, None)
        return {}, {}


def split(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The batches out of arrays named `number/name`, in their order."""
    batches: dict[int, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        number, name = key.split("/", 1)
        batches.setdefault(int(number), {})[name] = value
    return [batches[number] for number in sorted(batches)]


def _batch(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def _requests(stream: BinaryIO) -> queue.Queue:
    """Requests as they come; the process ends with the stream, also in the midst of a long run."""
    found: queue.Queue = queue.Queue()

    def read() -> None:
        while True:
            try:
                found.put(receive(stream))
            except EOFError:
                os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return found


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    threads = parser.parse_args().threads
    # Ctrl-C reaches the whole group of processes: it is up to the benchmark to end its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not end up between the answers.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    torch.set_num_threads(threads)
    session = Session(threads)
    send(answers, {HELLO: __version__, "environment": environment_info(threads)})
    waiting = _requests(requests)
    while True:
        message, arrays = waiting.get()
        try:
            reply, results = getattr(session, message.pop("call"))(arrays, **message)
        except FlexCompressError as error:
            reply, results = {"error": str(error)}, {}
        send(answers, reply, results)


if __name__ == "__main__":
    _main()
