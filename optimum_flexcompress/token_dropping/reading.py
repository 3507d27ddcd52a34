"""Length configurations from the command line and from files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FlexCompressError
from .lengths import FULL, LengthConfig


KEYS = ("length_config", "lengths")
"""Under the first, `config.json` has a length configuration; under the second, a point of a search's front."""

PICK = "pick"
"""Under which a front has the point that was picked."""


def read_lengths(text: str) -> LengthConfig | str:
    """Reads what a user types for a length configuration.

    Args:
        text: Counts (`315,251,242`) or fractions (with a decimal point: `1.0,0.8,0.5`), with commas or spaces, also in
            brackets; `full`; or the path of a JSON file: a list, what [`LengthConfig.to_dict`] makes, a `config.json`
            that carries lengths, or the `front.json` of a search with a pick.

    Returns:
        The configuration, or `"full"`.

    Raises:
        FlexCompressError: It is none of these, or holds lengths that cannot be.
    """
    text = text.strip()
    if text.endswith(".json") or Path(text).is_file():
        return _from_file(Path(text).expanduser())
    if text == FULL:
        return FULL
    words = text.strip("[]()").replace(",", " ").split()
    try:
        values = [float(word) if "." in word else int(word) for word in words]
    except ValueError:
        raise FlexCompressError(
            f'"{text}" is no length configuration: write counts such as 128,96,64, fractions such as 1.0,0.75,0.5, the '
            'path of a JSON file with them, or "full".'
        ) from None
    return LengthConfig.parse(values) or FULL


def _from_file(path: Path) -> LengthConfig | str:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlexCompressError(f"The length configuration {path} cannot be read: check the path.") from error
    except ValueError as error:
        raise FlexCompressError(f"{path} is no JSON file ({error}): give one with a length configuration.") from error
    return LengthConfig.parse(_found(data, path)) or FULL


def _found(data: Any, path: Path) -> Any:
    if isinstance(data, Mapping) and PICK in data:
        if data[PICK] is None:
            raise FlexCompressError(
                f"{path} is the front of a search without a pick: search with --max-drop, --max-cost or --max-latency, "
                "or write the lengths of one of its points."
            )
        data = data[PICK]
    if isinstance(data, Mapping):
        found = next((data[key] for key in KEYS if key in data), None)
        if found is not None:
            return found
    if isinstance(data, list) or (isinstance(data, Mapping) and "unit" in data):
        return data
    raise FlexCompressError(
        f'{path} holds no length configuration: it is a list of lengths, or an object with "unit" or "{KEYS[0]}".'
    )
