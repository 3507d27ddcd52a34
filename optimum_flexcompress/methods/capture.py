"""Reads the outputs of projections while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import Projection


class Capture:
    """Hooks on the modules of projections.

    They are there from `attach` to `detach` and record only between `start` and `stop`: gradient checkpointing runs
    the modules once more in the backward pass, when nothing must be recorded.

    Args:
        projections: What to record, by key.
    """

    def __init__(self, projections: Mapping[Any, Projection]):
        self._by_module: dict[nn.Module, list[tuple[Any, Projection]]] = {}
        for key, projection in projections.items():
            self._by_module.setdefault(projection.module, []).append((key, projection))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._values: dict[Any, torch.Tensor] | None = None

    def attach(self) -> None:
        self._handles = [module.register_forward_hook(self._record) for module in self._by_module]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._values = None

    def start(self) -> None:
        self._values = {}

    def stop(self) -> dict[Any, torch.Tensor]:
        """Ends recording.

        Returns:
            By key the output features of the projection, `[batch, length, size]`, with their graph.
        """
        values, self._values = self._values, None
        return values

    def _record(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if self._values is None:
            return
        for key, projection in self._by_module[module]:
            whole = projection.start == 0 and projection.stop == output.shape[-1]
            self._values[key] = output if whole else output[..., projection.start : projection.stop]


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Has a model return its attention maps while the block runs, and attend as before afterwards.

    Families that choose their attention function at each call read the config; the others compute the maps on their
    own when `output_attentions` is passed.
    """
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config, _ in before:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
