"""YAML that remembers where each key was written, so that an error can name the line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import FlexCompressError


KeyPath = tuple[str, ...]


@dataclass
class Document:
    """A nested mapping and the place where each of its keys comes from.

    Attributes:
        source: The file's name, for messages.
        values: The content.
        places: For each key path, such as `("stages", "distill", "epochs")`, where it was set.
    """

    source: str
    values: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where `path` was set, or the closest of its parents."""
        while path:
            if path in self.places:
                return self.places[path]
            path = path[:-1]
        return self.source

    def set(self, path: KeyPath, value: Any, place: str) -> None:
        """Sets the key at `path`, making the mappings on the way where they are missing.

        Raises:
            FlexCompressError: A key on the way holds something else than a mapping.
        """
        mapping = self.values
        for depth, key in enumerate(path[:-1], start=1):
            if mapping.get(key) is None:
                mapping[key] = {}
                self.places.setdefault(path[:depth], place)
            mapping = mapping[key]
            if not isinstance(mapping, dict):
                raise FlexCompressError(f"{place}: {dotted(path[:depth])} is a value, not a group of settings.")
        mapping[path[-1]] = value
        self.places[path] = place


def dotted(path: Iterable[str]) -> str:
    """`("stages", "distill")` as `stages.distill`."""
    return ".".join(path)


def parse_document(text: str, source: str) -> Document:
    """Reads YAML whose top level is a mapping.

    Args:
        text: The YAML.
        source: The file's name, for messages.

    Raises:
        FlexCompressError: No valid YAML, no mapping at the top, a key that is no text, or the same key twice (YAML
            libraries keep the last one without a word).
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise FlexCompressError(f"{source} must hold `key: value` lines: see the recipes of this package.")
        document = Document(source=source, values={})
        document.values = _construct(node, (), document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark is not None else source
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise FlexCompressError(f"{where}: this is not valid YAML ({problem}): correct the file.") from error
    return document


def parse_value(text: str, place: str) -> Any:
    """Reads the value of a `--set key=value` as YAML: `3` is a number, `[1, 3]` a list, `null` nothing."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FlexCompressError(
            f"{place}: the value is not valid YAML: put text with special signs in quotes."
        ) from error


def _construct(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    if isinstance(node, yaml.MappingNode):
        mapping = {}
        for key_node, value_node in node.value:
            place = f"{document.source}, line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise FlexCompressError(f"{place}: a key must be a plain word.")
            key = key_node.value
            if key in mapping:
                raise FlexCompressError(f'{place}: the key "{key}" is there twice: remove one of them.')
            document.places[(*path, key)] = place
            mapping[key] = _construct(value_node, (*path, key), document)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*path, str(position)), document) for position, child in enumerate(node.value)]
    return yaml.constructor.SafeConstructor().construct_object(node, deep=True)
