"""The errors that are meant for the user."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


# Bytes that may be left of a disk on which a write has just failed.
_FULL = 8 << 20


class FlexCompressError(ValueError):
    """Something the user can mend.

    The message is one clear sentence that says what is wrong and what to do instead. The command line prints it
    without a traceback and exits with a non-zero code.
    """


class UnsupportedArchitectureError(FlexCompressError):
    """The model family has no table under `optimum_flexcompress/architectures/`."""


class MissingExtraError(FlexCompressError, ImportError):
    """An optional dependency is missing; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"`{package}` is not installed: run `pip install optimum-flexcompress[{extra}]` and try again."
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name.

    Args:
        word: What the user wrote.
        known: The names that would have been accepted.

    Returns:
        ` Did you mean "x"? Known: "a", "b".` with a leading space, ready to be appended to a sentence.
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    return f"{hint} Known: {', '.join(known)}."


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a sentence: its first line, or else its class."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def disk_is_full(error: Exception, folder: str | os.PathLike) -> bool:
    """Whether `error` comes from a full disk, whatever the library that met it makes of that.

    Args:
        error: What was raised.
        folder: Lies on the disk that was written to, or would if it were there.
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    # safetensors quotes the system; PyTorch's archive writer does not say why it failed.
    if "No space left on device" in str(error):
        return True
    if "inline_container" not in str(error):
        return False
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(there).free < _FULL


@contextlib.contextmanager
def damage_explained(graph: str | os.PathLike) -> Iterator[None]:
    """Says in one sentence that ONNX Runtime, whose errors have no class in common, cannot open a file.

    Args:
        graph: The file, or the folder of several.

    Raises:
        FlexCompressError: ONNX Runtime raised an error of its own in the block.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise FlexCompressError(
            f"{graph} cannot be opened ({first_line(error)}): it is damaged; copy the folder again, or quantize the original again."
        ) from error
