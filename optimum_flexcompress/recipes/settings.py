"""From the mappings of a recipe to dataclasses, with errors that name the place and the nearest known key."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import FlexCompressError, nearest
from .document import Document, KeyPath, dotted


T = TypeVar("T")

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a group of settings"}


def build_settings(cls: type[T], values: dict[str, Any], path: KeyPath, document: Document) -> T:
    """Makes an instance of the dataclass `cls` from `values`.

    Args:
        cls: A dataclass whose fields are annotated with plain types, `list[...]`, `Literal[...]` and unions of them.
        values: The settings as they were read.
        path: Where they stand in `document`, for messages.
        document: Knows the lines.

    Raises:
        FlexCompressError: An unknown key (with the nearest known one), a value of the wrong type, or one that the
            dataclass itself refuses.
    """
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    hints = get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        here = (*path, key)
        if key not in known:
            group = f" in {dotted(path)}" if path else ""
            raise FlexCompressError(f'{document.place(here)}: unknown key "{key}"{group}.{nearest(key, known)}')
        try:
            arguments[key] = _coerce(value, hints[key])
        except _Mismatch as error:
            raise FlexCompressError(
                f"{document.place(here)}: {dotted(here)} must be {error}, not {value!r}."
            ) from error
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init
        and f.name not in arguments
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise FlexCompressError(f"{document.place(path)}: {dotted(path)} needs the key {missing[0]}.")
    try:
        return cls(**arguments)
    except FlexCompressError as error:
        # Such a message starts with the name of the setting it is about.
        place = document.place((*path, str(error).partition(" ")[0]))
        raise FlexCompressError(f"{place}: {dotted(path)}: {error}") from error


class _Mismatch(Exception):
    """Carries what was expected, in words."""


def _coerce(value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, get_args(hint))
    if hint is Any:
        return value
    if hint is type(None):
        if value is not None:
            raise _Mismatch("null")
        return None
    if origin is Literal:
        if value not in get_args(hint):
            raise _Mismatch("one of " + ", ".join(str(choice) for choice in get_args(hint)))
        return value
    if origin is list or hint is list:
        if not isinstance(value, list):
            raise _Mismatch("a list such as [1, 3]")
        item = (get_args(hint) or (Any,))[0]
        return [_coerce(element, item) for element in value]
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise _Mismatch(_NAMES[dict])
        return value
    return _coerce_scalar(value, hint)


def _coerce_union(value: Any, hints: tuple) -> Any:
    expected = []
    # Whole numbers first, or 3 would become 3.0 in `float | int`.
    for hint in sorted(hints, key=lambda hint: hint is not int):
        try:
            return _coerce(value, hint)
        except _Mismatch as error:
            expected.append(str(error))
    raise _Mismatch(" or ".join(expected))


def _coerce_scalar(value: Any, hint: type) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float:
        if is_number:
            return float(value)
        # YAML 1.1 reads 2e-4 as text because it has no dot.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif hint is int:
        if is_number and float(value).is_integer():
            return int(value)
    elif isinstance(value, hint):
        return value
    raise _Mismatch(_NAMES.get(hint, hint.__name__))
