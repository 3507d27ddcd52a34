"""Reads what layers are given, the hidden states after them, and their attention maps."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...architectures import AttentionTable, StackTable
from ...errors import FlexCompressError


@dataclass
class Observation:
    """What a layer did.

    Attributes:
        arguments: What it was called with, positional and by name.
        hidden: The residual stream after it, `[batch, length, size]`.
        attention: Maps of the self-attention, `[batch, heads, length, length]`.
        cross_attention: Maps of the cross-attention, `[batch, heads, length, source length]`.
    """

    arguments: tuple[tuple, dict[str, Any]] | None = None
    hidden: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    cross_attention: torch.Tensor | None = None


class Observer:
    """Hooks on layers from `start` to `stop`.

    Gradient checkpointing runs layers once more in the backward pass, when the hooks must be gone.
    """

    def __init__(self):
        self._handles: list[Any] = []
        self._seen: dict[Hashable, Observation] = {}

    def start(self, layers: Mapping[Hashable, tuple[StackTable, nn.Module]], maps: bool) -> None:
        """Starts to observe layers, by key.

        Args:
            layers: The layers with the tables of their stacks.
            maps: Whether to read attention maps, which the model has to compute then.
        """
        self.stop()
        self._seen = {key: Observation() for key in layers}
        for key, (table, layer) in layers.items():
            note = functools.partial(self._note_hidden, self._seen[key], table.hidden_output)
            self._handles.append(layer.register_forward_hook(note))
            note = functools.partial(self._note_arguments, self._seen[key])
            self._handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
            attentions = {"attention": table.attention, "cross_attention": table.cross_attention} if maps else {}
            for name, attention in attentions.items():
                if attention is not None:
                    note = functools.partial(self._note_maps, self._seen[key], name, attention)
                    self._handles.append(layer.get_submodule(attention.module).register_forward_hook(note))

    def stop(self) -> dict[Hashable, Observation]:
        """Ends it, and returns what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        seen, self._seen = self._seen, {}
        return seen

    @staticmethod
    def _note_arguments(seen: Observation, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.arguments = args, kwargs

    @staticmethod
    def _note_hidden(seen: Observation, place: int, module: nn.Module, args: tuple, output: Any) -> None:
        seen.hidden = output[place] if isinstance(output, tuple) else output

    @staticmethod
    def _note_maps(
        seen: Observation, name: str, table: AttentionTable, module: nn.Module, args: tuple, output: tuple
    ) -> None:
        maps = output[table.maps] if len(output) > table.maps else None
        if maps is None:
            raise FlexCompressError(
                f"{type(module).__name__} returns no attention maps: set attention_weight=0 for this model."
            )
        setattr(seen, name, maps)
