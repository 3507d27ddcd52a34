"""Output folders that are either complete or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import FlexCompressError


def check_output_folder(
    path: str | os.PathLike,
    overwrite: bool = False,
    *,
    source: Any = None,
    option: str = "-o/--output",
    advice: str = "choose another folder, or add --overwrite to replace it",
) -> Path:
    """Says early, before any long work, whether `path` can become an output folder.

    Args:
        path: The folder that is going to be written.
        overwrite: Whether an existing non-empty folder may be replaced.
        source: What the output is going to be made of, such as a folder or a file; models in memory are none.
        option: Where the command line takes the path.
        advice: What to do about a folder that is not empty.

    Returns:
        The path, absolute.

    Raises:
        FlexCompressError: It is a file, a non-empty folder (without `overwrite`), the source or one that the source
            lies in, or cannot be written.
    """
    path = Path(path).expanduser().absolute()
    if isinstance(source, (str, os.PathLike)):
        origin = Path(source).expanduser().resolve()
        if path.resolve() in (origin, *origin.parents) and origin.exists():
            raise FlexCompressError(
                f"{path} holds what the output is made of, which would be lost: choose another folder."
            )
    if path.exists() and not path.is_dir():
        raise FlexCompressError(f"{path} is a file: give {option} the name of a new folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FlexCompressError(f"{path} is not empty: {advice}.")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    try:
        # Trying says more than permission bits do: file systems can be read-only, or full.
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=parent))
    except OSError as error:
        raise FlexCompressError(
            f"{path} cannot be created ({parent}: {error.strerror}): choose another folder."
        ) from None
    return path


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Writes a folder to a temporary sibling and renames it into place when the block ends without an error.

    Args:
        path: The folder that is going to exist.
        overwrite: Whether an existing non-empty folder may be replaced; it stays untouched until the new one is
            complete.

    Yields:
        The temporary folder to write into.

    Raises:
        FlexCompressError: See [`check_output_folder`].
    """
    path = check_output_folder(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    temporary.chmod(_ordinary_permissions(0o777))
    try:
        yield temporary
        old = None
        if path.exists():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old is not None:
                old.rename(path)
            raise
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _ordinary_permissions(mode: int) -> int:
    """What a new file or folder would get; those that `tempfile` makes are private."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def write_text_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to the file `path` by way of a temporary sibling, so that a reader never sees half of it."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, _ordinary_permissions(0o666))
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
