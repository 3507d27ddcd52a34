"""What a pruning has removed: sizes and head numbers, what heads attended to, and how the run went."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..architectures import AttentionView, LayerView, describe
from ..errors import FlexCompressError
from ..origin import LayerOrigin, Origin
from ..output import write_text_atomically
from ..structure import count_parameters


JSON_NAME = "pruning.json"
FORMAT_VERSION = 1

Shares = dict[str, list[list[list[float] | None]]]
"""By stack, `[layers][heads][kinds]`; `None` for a head that is gone."""


@dataclass
class LayerPruning:
    """A layer of the model before, and what is left of it. Heads are query heads.

    Attributes:
        heads: Heads of its self-attention.
        kept_heads: Indices of those that are left.
        ffn: Inner dims of its feed-forward network.
        kept_ffn: How many are left.
        cross_heads: Heads of its cross-attention.
        kept_cross_heads: Indices of those that are left.
    """

    heads: int
    kept_heads: list[int]
    ffn: int
    kept_ffn: int
    cross_heads: int = 0
    kept_cross_heads: list[int] = field(default_factory=list)


@dataclass
class PruningReport:
    """A pruned model beside the one that it was made from.

    Attributes:
        hidden: Dims of the residual stream: `kept` and `of`.
        parameters: Parameters, as [`optimum_flexcompress.structure.count_parameters`] has them: `before`, `after`.
        stacks: The layers of the model before, by stack.
        attention: `kinds`, the names of what attention goes to; `tokens`, on how many it was measured; `before` and
            `after`, the shares by the heads' numbers before. `None` where attention was not probed.
        curves: What the run logged, by step.
        version: Of this format.
    """

    hidden: dict[str, int]
    parameters: dict[str, dict[str, int]]
    stacks: dict[str, list[LayerPruning]]
    attention: dict[str, Any] | None = None
    curves: list[dict[str, float]] = field(default_factory=list)
    version: int = FORMAT_VERSION

    @property
    def sparsity(self) -> float:
        """The share of the parameters of the layers that is gone."""
        return 1.0 - self.parameters["after"]["prunable"] / self.parameters["before"]["prunable"]

    @classmethod
    def of(
        cls,
        before: PreTrainedModel,
        after: PreTrainedModel,
        attention: Mapping[str, Any] | None = None,
        log_history: Iterable[Mapping[str, Any]] = (),
    ) -> PruningReport:
        """Compares two models.

        Args:
            before: The model before.
            after: The model after.
            attention: As the attribute, but `after` by the heads of that model.
            log_history: Of the run.

        Raises:
            FlexCompressError: The second model was not made from the first by surgery.
        """
        views = describe(before), describe(after)
        origins = tuple(Origin.of(view) for view in views)
        if views[0].architecture is not views[1].architecture or not origins[0].is_same(origins[1]):
            raise FlexCompressError(
                "It is not known which heads of the model before are left in the model after: give a model that "
                "pruning made from it, as it was saved."
            )
        stacks: dict[str, list[LayerPruning]] = {}
        shares: Shares = {}
        for name, stack in views[0].stacks.items():
            left = {noted.layer: index for index, noted in enumerate(origins[1].stacks[name].left)}
            stacks[name], shares[name] = [], []
            for layer, noted in zip(stack.layers, origins[0].stacks[name].left, strict=True):
                place = left.get(noted.layer)
                now = None if place is None else views[1].stacks[name].layers[place]
                ids = None if place is None else origins[1].stacks[name].left[place]
                found = _compare(layer, noted, now, ids)
                stacks[name].append(found)
                if attention is not None:
                    row: list[list[float] | None] = [None] * found.heads
                    values = [] if place is None else attention["after"][name][place]
                    for head, value in zip(found.kept_heads, values, strict=True):
                        row[head] = value
                    shares[name].append(row)
        return cls(
            hidden={"kept": views[1].hidden_size, "of": views[0].hidden_size},
            parameters={"before": count_parameters(before), "after": count_parameters(after)},
            stacks=stacks,
            attention=None if attention is None else {**attention, "after": shares},
            curves=_curves(log_history),
        )

    # Files

    def save(self, folder: str | os.PathLike, pictures: bool = True) -> Path:
        """Writes `pruning.json` and the pictures `pruning_*.png` into an existing folder.

        Args:
            folder: The folder.
            pictures: Whether to write those, which needs the extra `report`.

        Returns:
            The folder.

        Raises:
            MissingExtraError: matplotlib is missing.
        """
        folder = Path(folder)
        write_text_atomically(folder / JSON_NAME, json.dumps(asdict(self), allow_nan=False) + "\n")
        if pictures:
            from .pruning_plots import save_pictures

            save_pictures(self, folder)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike) -> PruningReport:
        """Reads what `save` wrote.

        Raises:
            FlexCompressError: There is none, or it is damaged or of a newer version.
        """
        path = Path(folder) / JSON_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] > FORMAT_VERSION:
                raise FlexCompressError(f"{path} was written by a newer version: upgrade optimum-flexcompress.")
            content["stacks"] = {
                name: [LayerPruning(**layer) for layer in layers] for name, layers in content["stacks"].items()
            }
            return cls(**{part.name: content[part.name] for part in fields(cls)})
        except FileNotFoundError as error:
            raise FlexCompressError(f"{folder} holds no {JSON_NAME}: give the folder of a pruned model.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FlexCompressError):
                raise
            raise FlexCompressError(f"{path} is damaged: prune again.") from error


def _query_heads(view: AttentionView | None, groups: list[int]) -> list[int]:
    """The query heads of groups that share a key and value head."""
    if view is None:
        return []
    shared = view.num_heads // view.num_kv_heads
    return [group * shared + index for group in groups for index in range(shared)]


def _kept(view: AttentionView | None, noted: list[int], left: list[int]) -> tuple[int, list[int]]:
    """Heads before, and the indices of those that are left, from original numbers."""
    places = {number: index for index, number in enumerate(noted)}
    return 0 if view is None else view.num_heads, _query_heads(view, [places[number] for number in left])


def _compare(before: LayerView, noted: LayerOrigin, after: LayerView | None, left: LayerOrigin | None) -> LayerPruning:
    heads, kept_heads = _kept(before.attention, noted.heads, left.heads if left else [])
    cross_heads, kept_cross_heads = _kept(before.cross_attention, noted.cross_heads, left.cross_heads if left else [])
    return LayerPruning(
        heads=heads,
        kept_heads=kept_heads,
        ffn=before.ffn.size if before.ffn else 0,
        kept_ffn=after.ffn.size if after is not None and after.ffn else 0,
        cross_heads=cross_heads,
        kept_cross_heads=kept_cross_heads,
    )


def _curves(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The trainer's step logs: those with a learning rate; others are summaries and evaluations."""
    return [
        {
            name: float(value)
            for name, value in entry.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for entry in log_history
        if "learning_rate" in entry and "step" in entry
    ]
