"""What a pruned model was made from: an entry of `config.json` that keeps the original numbers of layers and heads.

Surgery numbers what is left anew. To say which heads of the original went, each removal notes it here, in terms of the
model before the first one; whether or not the plugin is there, Transformers keeps the entry with the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig

from .architectures import ModelView
from .errors import FlexCompressError
from .kept import Indices, Kept, KeptLayer


ORIGIN_KEY = "pruned_from"


@dataclass
class LayerOrigin:
    """A layer that is left.

    Attributes:
        layer: Its index in the original.
        heads: The original indices of the heads of its self-attention; where key and value heads are shared, of the
            groups (one key-value head with its query heads).
        cross_heads: The same of the cross-attention.
    """

    layer: int
    heads: list[int]
    cross_heads: list[int] = field(default_factory=list)


@dataclass
class StackOrigin:
    """A stack of the original, and what is left of it.

    Attributes:
        heads: Heads (or groups) of the self-attention of every original layer.
        cross_heads: The same of the cross-attention.
        ffn: Inner dims of the feed-forward network of every original layer.
        left: The layers that are left, in their order.
    """

    heads: list[int]
    cross_heads: list[int]
    ffn: list[int]
    left: list[LayerOrigin]


@dataclass
class Origin:
    """The original.

    Attributes:
        hidden_size: Its width.
        stacks: Its stacks.
    """

    hidden_size: int
    stacks: dict[str, StackOrigin]

    @classmethod
    def of(cls, view: ModelView) -> Origin:
        """The origin of a model as it is: as noted before, or the model itself.

        Raises:
            FlexCompressError: The entry is malformed.
        """
        noted = getattr(view.model.config, ORIGIN_KEY, None)
        if noted is not None:
            origin = cls.from_dict(noted)
            # A new model that was built from the configuration of a pruned one is its own origin.
            if origin.matches(view):
                return origin
        stacks = {}
        for name, stack in view.stacks.items():
            sizes = [
                [0 if part is None else part.num_kv_heads for part in (layer.attention, layer.cross_attention)]
                for layer in stack.layers
            ]
            stacks[name] = StackOrigin(
                heads=[own for own, _ in sizes],
                cross_heads=[cross for _, cross in sizes],
                ffn=[0 if layer.ffn is None else layer.ffn.size for layer in stack.layers],
                left=[
                    LayerOrigin(index, list(range(own)), list(range(cross)))
                    for index, (own, cross) in enumerate(sizes)
                ],
            )
        return cls(view.hidden_size, stacks)

    @classmethod
    def from_dict(cls, noted: Any) -> Origin:
        """Reads the entry.

        Raises:
            FlexCompressError: It is malformed.
        """
        try:
            return cls(
                int(noted["hidden_size"]),
                {
                    name: StackOrigin(**{**stack, "left": [LayerOrigin(**layer) for layer in stack["left"]]})
                    for name, stack in noted["stacks"].items()
                },
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise FlexCompressError(
                f'The entry "{ORIGIN_KEY}" of config.json is malformed ({error!r}): remove it.'
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def is_same(self, other: Origin) -> bool:
        """Whether both speak of the same original, as far as sizes can tell."""

        def sizes(origin: Origin) -> Any:
            return origin.hidden_size, {name: (s.heads, s.cross_heads, s.ffn) for name, s in origin.stacks.items()}

        return sizes(self) == sizes(other)

    def matches(self, view: ModelView) -> bool:
        """Whether a model has the layers and heads that are said to be left."""
        return set(self.stacks) == set(view.stacks) and all(
            len(origin.left) == len(stack.layers)
            and all(
                len(ids) == (0 if part is None else part.num_kv_heads)
                for noted, layer in zip(origin.left, stack.layers)
                for ids, part in ((noted.heads, layer.attention), (noted.cross_heads, layer.cross_attention))
            )
            for origin, stack in ((self.stacks[name], stack) for name, stack in view.stacks.items())
        )

    def after(self, kept: Kept) -> Origin:
        """The origin of what a removal leaves.

        Args:
            kept: What stays, by the present indices.
        """
        stacks = dict(self.stacks)
        for name, layers in kept.stacks.items():
            stack = self.stacks[name]
            left = [_after(stack.left[layer.source], layer) for layer in layers]
            stacks[name] = StackOrigin(stack.heads, stack.cross_heads, stack.ffn, left)
        return Origin(self.hidden_size, stacks)


def _after(origin: LayerOrigin, kept: KeptLayer) -> LayerOrigin:
    return LayerOrigin(
        origin.layer, _chosen(origin.heads, kept.attention), _chosen(origin.cross_heads, kept.cross_attention)
    )


def _chosen(ids: Sequence[int], kept: Indices) -> list[int]:
    if kept is None:
        return list(ids)
    return [ids[int(index)] for index in (kept.tolist() if isinstance(kept, torch.Tensor) else kept)]


def note_origin(view: ModelView, kept: Kept) -> dict[str, Any] | None:
    """The entry for what a removal is going to leave.

    Args:
        view: The model before it.
        kept: What stays, in ascending indices.

    Returns:
        The entry; `None` where only whole layers go from a model that has none: such a model is a new one.

    Raises:
        FlexCompressError: The entry that the model has is malformed.
    """
    inside = kept.hidden is not None or any(
        part is not None
        for layers in kept.stacks.values()
        for layer in layers
        for part in (layer.attention, layer.cross_attention, layer.ffn)
    )
    if not inside and not hasattr(view.model.config, ORIGIN_KEY):
        return None
    return Origin.of(view).after(kept).to_dict()


def write_origin(config: PretrainedConfig, entry: dict[str, Any] | None) -> None:
    """Sets the entry, or removes it."""
    if entry is not None:
        setattr(config, ORIGIN_KEY, entry)
    elif hasattr(config, ORIGIN_KEY):
        delattr(config, ORIGIN_KEY)
