"""Digests that say whether a stage would do again what it did before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


# What an output folder of `compress` holds at its top.
RUN_FILE = "run.json"
_BLOCK = 1 << 20


def digest(value: Any) -> str:
    """SHA-256 of `value`, which must be made of JSON types, in one canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(source: str | Path) -> str:
    """Identifies a model or a data set: by content where it is a file or a folder, else by its Hub id.

    Sub-folders count too, but for what `compress` has written into them. Hidden files and folders do not.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return digest({path.name: _file_digest(path)})
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        runs = {file.parent for file in found if file.name == RUN_FILE} - {path}
        files = [file for file in found if runs.isdisjoint(file.parents)]
        return digest({file.relative_to(path).as_posix(): _file_digest(file) for file in files})
    return digest({"hub": str(source)})


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below `folder`, by relative path."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file_digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha.update(block)
    return sha.hexdigest()
