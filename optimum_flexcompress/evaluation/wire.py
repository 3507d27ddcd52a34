"""Messages between a benchmark and its workers: a line of JSON, then arrays as raw bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np


# What a worker says first, whatever was printed before by the libraries that it imported.
HELLO = "flexcompress_worker"


def send(stream: BinaryIO, message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes a message.

    Args:
        stream: A pipe, buffered.
        message: Plain JSON types; `bytes` is ours.
        arrays: What goes with it, by name.
    """
    payload = b""
    if arrays:
        buffer = io.BytesIO()
        # Object arrays would need pickle: they are refused here, and on the other side.
        np.savez(buffer, allow_pickle=False, **arrays)
        payload = buffer.getvalue()
    stream.write(json.dumps({**message, "bytes": len(payload)}).encode() + b"\n" + payload)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a message.

    Returns:
        The message and its arrays.

    Raises:
        EOFError: The other process is gone.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message = json.loads(line)
    size = message.pop("bytes")
    if not size:
        return message, {}
    payload = stream.read(size)
    if len(payload) < size:
        raise EOFError
    with np.load(io.BytesIO(payload), allow_pickle=False) as found:
        return message, dict(found)
