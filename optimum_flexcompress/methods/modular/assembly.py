"""Assemblies: which layers and modules make up a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import FlexCompressError, nearest
from ...output import write_text_atomically


@dataclass(frozen=True, order=True)
class Piece:
    """One layer of an assembly.

    Attributes:
        granularity: How many original layers it stands for; 1 is an original layer.
        block: Which of the blocks of that many layers, from 0.
    """

    granularity: int
    block: int

    @property
    def start(self) -> int:
        """The first original layer it stands for."""
        return self.granularity * self.block

    @property
    def stop(self) -> int:
        """One past the last."""
        return self.start + self.granularity

    @property
    def is_module(self) -> bool:
        """Whether a module stands there, rather than a layer."""
        return self.granularity > 1

    def to_dict(self) -> dict[str, int]:
        """`{"layer": i}` or `{"granularity": g, "block": j}`."""
        if not self.is_module:
            return {"layer": self.block}
        return {"granularity": self.granularity, "block": self.block}

    def __str__(self) -> str:
        if not self.is_module:
            return f"layer {self.block}"
        return f"module {self.granularity}.{self.block} ({_layers(self.start, self.stop)})"


@dataclass(frozen=True)
class Assembly:
    """What a model is assembled from, stack by stack.

    As JSON it is a mapping from stacks to lists, bottom layer first, of `{"layer": i}` for an original layer and
    `{"granularity": g, "block": j}` for the module that stands for the layers `g * j` to `g * j + g - 1`; all count
    from 0. A stack that is left out stays whole.

    Attributes:
        stacks: The pieces of each stack.
    """

    stacks: Mapping[str, tuple[Piece, ...]]

    @property
    def layers(self) -> int:
        """Layers of all stacks together."""
        return sum(len(pieces) for pieces in self.stacks.values())

    @property
    def ratio(self) -> float:
        """Layers of the original model over those of this one."""
        return sum(piece.granularity for pieces in self.stacks.values() for piece in pieces) / self.layers

    def sources(self) -> dict[str, list[int]]:
        """For each stack the first original layer of each piece."""
        return {name: [piece.start for piece in pieces] for name, pieces in self.stacks.items()}

    def summary(self) -> str:
        """A line for each stack, such as `encoder: 0 1 [2-3] [4-7]`: layers, and modules with what they stand for."""
        return "\n".join(
            f"{name}: " + " ".join(f"[{p.start}-{p.stop - 1}]" if p.is_module else str(p.block) for p in pieces)
            for name, pieces in self.stacks.items()
        )

    def to_dict(self) -> dict[str, list[dict[str, int]]]:
        """The assembly as plain JSON types."""
        return {name: [piece.to_dict() for piece in pieces] for name, pieces in self.stacks.items()}

    @classmethod
    def from_dict(cls, data: Any) -> Assembly:
        """Reads what [`to_dict`] made, or what a user wrote.

        Raises:
            FlexCompressError: It is no plan.
        """
        if not isinstance(data, Mapping) or not data:
            this = "one is empty" if data == {} else f"is {type(data).__name__}"
            raise FlexCompressError(
                'A plan maps stacks to lists of pieces, such as {"decoder": [{"layer": 0}, {"granularity": 2, '
                f'"block": 1}}]}}; this {this}.'
            )
        return cls({str(name): tuple(_read_pieces(str(name), pieces)) for name, pieces in data.items()})

    @classmethod
    def from_json_file(cls, path: str | os.PathLike) -> Assembly:
        """Reads a plan from a JSON file.

        Raises:
            FlexCompressError: The file cannot be read or holds no plan.
        """
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
        except OSError as error:
            raise FlexCompressError(f"Cannot read the plan {path}: {error.strerror}.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FlexCompressError(f"{path} is not JSON ({error}).") from None
        return cls.from_dict(data)

    def to_json_file(self, path: str | os.PathLike) -> None:
        """Writes the plan, one piece to a line."""
        stacks = [
            f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(p.to_dict())}" for p in pieces) + "\n  ]"
            for name, pieces in self.stacks.items()
        ]
        write_text_atomically(path, "{\n" + ",\n".join(stacks) + "\n}\n")

    def checked(self, depths: Mapping[str, int], granularities: Mapping[str, Sequence[int]]) -> Assembly:
        """The assembly with every stack of the model in it, once it is known to fit.

        Args:
            depths: Layers of each stack of the original model.
            granularities: Granularities of the modules that there are in each stack.

        Raises:
            FlexCompressError: An unknown stack, a module that was not trained, a gap or an overlap.
        """
        for name in self.stacks:
            if name not in depths:
                raise FlexCompressError(f'The plan has the stack "{name}".{nearest(name, depths)}')
        whole = {name: tuple(Piece(1, index) for index in range(depth)) for name, depth in depths.items()}
        assembly = Assembly({name: self.stacks.get(name, whole[name]) for name in depths})
        for name, pieces in assembly.stacks.items():
            _check_stack(name, pieces, depths[name], granularities.get(name, ()))
        return assembly


def _read_pieces(stack: str, data: Any) -> list[Piece]:
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        raise FlexCompressError(f"The plan of the {stack} is {data!r}: give a list with at least one piece.")
    pieces = []
    for item in data:
        keys = set(item) if isinstance(item, Mapping) else set()
        if keys not in ({"layer"}, {"granularity", "block"}):
            raise FlexCompressError(
                f'The plan of the {stack} has {item!r}: a piece is {{"layer": i}} or {{"granularity": g, "block": j}}.'
            )
        numbers = (item.get("granularity", 1), item.get("block", item.get("layer")))
        if any(not isinstance(n, int) or isinstance(n, bool) or n < low for n, low in zip(numbers, (1, 0))):
            raise FlexCompressError(f"The plan of the {stack} has {item!r}: give whole numbers, blocks from 0 up.")
        pieces.append(Piece(*numbers))
    return pieces


def _check_stack(name: str, pieces: Sequence[Piece], depth: int, granularities: Sequence[int]) -> None:
    place, before = 0, None
    # What seems to be missing may come further up.
    in_order = list(pieces) == sorted(pieces, key=lambda p: p.start)
    order = "list pieces bottom layer first"
    add = "add what is missing, layer by layer or as a module" if in_order else order
    for piece in pieces:
        if piece.is_module and piece.granularity not in granularities:
            trained = ", ".join(map(str, granularities)) or "no granularity"
            raise FlexCompressError(
                f"The plan of the {name} has a module of granularity {piece.granularity}, and this checkpoint was "
                f"trained for {trained} there: use these, or train again with that one in granularities."
            )
        if piece.stop > depth:
            raise FlexCompressError(
                f"The plan has {piece} of the {name}, which has the layers 0 to {depth - 1}: take pieces of these."
            )
        if piece.start > place:
            where = f"between {before} and {piece}" if before is not None else f"before {piece}"
            raise FlexCompressError(
                f"The plan of the {name} has a gap {where}: nothing stands for {_layers(place, piece.start)}; {add}."
            )
        if piece.start < place:
            raise FlexCompressError(
                f"The plan of the {name} has an overlap: both {before} and {piece} stand for "
                f"{_layers(piece.start, min(place, piece.stop))}; {'leave one of them out' if in_order else order}."
            )
        place, before = piece.stop, piece
    if place < depth:
        raise FlexCompressError(
            f"The plan of the {name} has a gap after {before}: nothing stands for {_layers(place, depth)}; {add}."
        )


def _layers(start: int, stop: int) -> str:
    return f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"
