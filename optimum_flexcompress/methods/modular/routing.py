"""Has a model run other layers than its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...architectures import ModelView, StackView


class Router:
    """Puts other layers in the place of those of a stack for as long as its forward pass lasts.

    Between passes the lists of layers hold the original ones, so that `parameters` and `state_dict` of the model stay
    what they were. Generation works too: it calls the stacks on their own.

    Args:
        view: The model.

    Attributes:
        route: Layers to run, by stack; a stack that is not in it runs its own.
    """

    def __init__(self, view: ModelView):
        self.route: Mapping[str, Sequence[nn.Module]] = {}
        self._view = view
        self._own = {name: [layer.module for layer in stack.layers] for name, stack in view.stacks.items()}
        self._swapped: set[str] = set()
        self._layer_drops: list[tuple[nn.Module, str, float]] = []
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Puts the hooks in place, and keeps stacks from skipping layers on their own."""
        for stack in self._view.stacks.values():
            path, _, _ = stack.table.layers.rpartition(".")
            module = self._view.base.get_submodule(path)
            self._handles += [
                module.register_forward_pre_hook(functools.partial(self._begin, stack)),
                module.register_forward_hook(functools.partial(self._end, stack), always_call=True),
            ]
            name = stack.table.layer_drop
            if name is not None:
                self._layer_drops.append((module, name, getattr(module, name)))
                setattr(module, name, 0.0)

    def detach(self) -> None:
        """Takes the hooks away; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        for stack in self._view.stacks.values():
            self._restore(stack)
        for module, name, value in self._layer_drops:
            setattr(module, name, value)
        self._handles, self._layer_drops = [], []

    def _begin(self, stack: StackView, module: nn.Module, args: tuple) -> None:
        layers = self.route.get(stack.name)
        if layers is None:
            return
        for layer in layers:
            # Modules are no part of the model, so `train` and `eval` do not reach them.
            if layer.training != module.training:
                layer.train(module.training)
        self._swapped.add(stack.name)
        put_layers(stack, layers)

    def _end(self, stack: StackView, module: nn.Module, args: tuple, output: Any) -> None:
        self._restore(stack)

    def _restore(self, stack: StackView) -> None:
        if stack.name in self._swapped:
            self._swapped.discard(stack.name)
            put_layers(stack, self._own[stack.name])


def put_layers(stack: StackView, layers: Sequence[nn.Module]) -> None:
    """Makes `layers` those of a stack, and numbers their caches anew."""
    stack.module_list._modules = {str(index): layer for index, layer in enumerate(layers)}
    for table in (stack.table.attention, stack.table.cross_attention):
        for index, layer in enumerate(layers if table is not None else ()):
            attention = layer.get_submodule(table.module)
            if hasattr(attention, "layer_idx"):
                attention.layer_idx = index
