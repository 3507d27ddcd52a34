"""What is written beside the weights of a saved int8 model, and checked before they are opened.

One JSON file names the runtime, the versions that made it, and the size and SHA-256 of every weight file. It finds
damage by itself; against malice it has to be pinned, since whoever can change the weights can change the record too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FlexCompressError
from ..output import write_text_atomically


RECORD_NAME = "flexcompress_backend.json"
FORMAT = 1
_OWN_KEYS = ("backend", "format", "lane", "versions", "files")


@dataclass(frozen=True)
class Saved:
    """A saved model whose files are those that were written.

    Attributes:
        folder: Where it is.
        backend: The runtime that it is for.
        lane: The environment that the runtime needs: `main` or `ipex`.
        versions: Of the packages that made it.
        files: The weight files, by the names under which they were recorded.
        facts: What the backend wrote down for itself.
    """

    folder: Path
    backend: str
    lane: str
    versions: Mapping[str, str]
    files: Mapping[str, Path]
    facts: Mapping[str, Any]


def installed_versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages; those that are not installed are left out."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_saved(
    folder: str | os.PathLike,
    backend: str,
    lane: str,
    versions: Mapping[str, str],
    files: Iterable[str],
    **facts: Any,
) -> Path:
    """Writes the record of a model whose files are complete.

    Args:
        folder: Where the files are.
        backend: The runtime, as `--backend` names it.
        lane: The environment that the runtime needs: `main` or `ipex`.
        versions: Of the packages that made the files; see [`installed_versions`].
        files: Names of the weight files, relative to `folder`.
        **facts: What the backend wants to know again; must go into JSON, and cannot have the names of the record's own
            entries.

    Returns:
        The record's file.
    """
    folder = Path(folder)
    clash = set(facts) & set(_OWN_KEYS)
    if clash:
        raise ValueError(f"These entries belong to the record itself: {', '.join(sorted(clash))}.")
    record = {
        "backend": backend,
        "format": FORMAT,
        "lane": lane,
        "versions": dict(versions),
        "files": {
            name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in files
        },
        **facts,
    }
    write_text_atomically(folder / RECORD_NAME, json.dumps(record, indent=2) + "\n")
    return folder / RECORD_NAME


def has_saved(folder: str | os.PathLike) -> bool:
    """Whether a folder has a record."""
    return (Path(folder) / RECORD_NAME).is_file()


def peek_saved(folder: str | os.PathLike) -> Saved:
    """Reads a record without a look at the weights, to learn which runtime and lane a model needs.

    Raises:
        FlexCompressError: There is none, it is damaged, or of another format.
    """
    folder = Path(folder)
    return _parse(folder, _read(folder))


def read_saved(
    folder: str | os.PathLike,
    backend: str,
    expected_sha256: str | None = None,
    same_versions: Collection[str] = (),
) -> Saved:
    """Reads a record and checks every file against it.

    Args:
        folder: The folder of the model.
        backend: The runtime that is going to open it.
        expected_sha256: SHA-256 of the record, `flexcompress_backend.json`, as `sha256sum` prints it. The record holds
            the digests of all weight files, so that this one pins them all.
        same_versions: Packages whose major and minor version must be those that made the model.

    Returns:
        The record.

    Raises:
        FlexCompressError: Record or files are missing, damaged, not those that are expected, of another format, for
            another runtime, or made by other versions.
    """
    folder = Path(folder)
    text = _read(folder)
    if expected_sha256 is not None:
        digest = hashlib.sha256(text).hexdigest()
        if digest != expected_sha256.strip().lower():
            raise FlexCompressError(
                f"{folder / RECORD_NAME} has the SHA-256 {digest} where {expected_sha256} is expected: this is not the "
                "model that you pinned; get it again from where you trust it, or pin this one."
            )
    saved = _parse(folder, text)
    if saved.backend != backend:
        raise FlexCompressError(
            f"{folder} was made for the backend {saved.backend}, not for {backend}: open it with the classes of "
            f"{saved.backend}, or quantize the original with --backend {backend}."
        )
    files = json.loads(text)["files"]
    for name, path in saved.files.items():
        _check_file(path, files[name])
    _check_versions(saved, same_versions)
    return saved


def _read(folder: Path) -> bytes:
    try:
        return (folder / RECORD_NAME).read_bytes()
    except FileNotFoundError:
        raise FlexCompressError(
            f"{folder} has no {RECORD_NAME}: give a folder that `quantize` wrote, or quantize the model again."
        ) from None


def _parse(folder: Path, text: bytes) -> Saved:
    damaged = FlexCompressError(f"{folder / RECORD_NAME} is damaged: quantize the original model again.")
    try:
        record = json.loads(text)
    except ValueError:
        raise damaged from None
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise damaged
    if record["format"] != FORMAT:
        what = "update optimum-flexcompress" if record["format"] > FORMAT else "quantize the original model again"
        raise FlexCompressError(
            f"{folder} is a saved model of format {record['format']}, and this version reads format {FORMAT}: {what}."
        )
    if not _is_complete(record):
        raise damaged
    return Saved(
        folder=folder,
        backend=record["backend"],
        lane=record["lane"],
        versions=record["versions"],
        files={name: folder / name for name in record["files"]},
        facts={name: value for name, value in record.items() if name not in _OWN_KEYS},
    )


def _is_complete(record: Mapping[str, Any]) -> bool:
    files, versions = record.get("files"), record.get("versions")
    if not (isinstance(record.get("backend"), str) and isinstance(record.get("lane"), str)):
        return False
    if not isinstance(versions, dict) or not isinstance(files, dict) or not files:
        return False
    return all(
        # A record from elsewhere must not make us read files outside its folder.
        not Path(name).is_absolute()
        and ".." not in Path(name).parts
        and isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        for name, entry in files.items()
    )


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise FlexCompressError(f"{path} is missing: copy the whole folder again, or quantize the original again.")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise FlexCompressError(
            f"{path} has {size} bytes where {entry['bytes']} were written: it is incomplete or was changed; copy the "
            "whole folder again, or quantize the original again."
        )
    if sha256_of(path) != entry["sha256"]:
        raise FlexCompressError(
            f"{path} is not the file that was written (its SHA-256 differs): it is damaged or was changed; copy the whole "
            "folder again, or quantize the original again."
        )


def _check_versions(saved: Saved, packages: Collection[str]) -> None:
    installed = installed_versions(*packages)
    for package in packages:
        made, here = saved.versions.get(package), installed.get(package)
        if made is None or here is None or _minor(made) != _minor(here):
            raise FlexCompressError(
                f"{saved.folder} was made with {package} {made or 'of an unknown version'}, and "
                f"{here or 'none'} is installed: install that version, or quantize the original model again."
            )


def _minor(version: str) -> list[str]:
    return str(version).split("+")[0].split(".")[:2]
