"""Hooks that make an encoder drop tokens, layer by layer.

A layer chooses after its self-attention which tokens stay, by the attention they receive; its feed-forward network
and all later layers see these only. Model code stays as it is: hooks read queries and keys, hand the shorter tensors
on, adjust the padding mask and the position bias, and put the tokens back to their places after the last layer.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from ..architectures import LayerView, ModelView, StackView
from ..errors import FlexCompressError
from .lengths import LengthConfig, numerator
from .rows import Limit, additive_mask, count_limit, fraction_limit, mask_like, take, valid_tokens
from .significance import attention_received, column_sums
from .state import LayerRecord, PassState


Counts = Callable[[int], Sequence[int]]
"""Counts of the layers that run, from the length of the input."""

Watch = Callable[[int, torch.Tensor | None, torch.Tensor | None], None]
"""Told after a layer which tokens are left: the layer, positions in the input (`None`: all of them), and which of these
are valid (`None`: all), both `[batch, length]`."""


class TokenDropper:
    """Installs the hooks for one length configuration.

    Args:
        view: The model.
        stack: Its encoder.
        lengths: How many tokens each layer keeps, or a function of the input length that gives the counts of those
            layers that run.
        keep_first: Whether the first token always stays.
        restore: Whether dropped tokens are put back after the last layer. Without, the encoder returns what is left.
        skip: Layers that do not run.
    """

    def __init__(
        self,
        view: ModelView,
        stack: StackView,
        lengths: LengthConfig | Counts,
        *,
        keep_first: bool,
        restore: bool,
        skip: Collection[int] = (),
    ):
        self.lengths, self.skip = lengths, skip
        self._table = stack.table
        self._keep_first, self._restore = keep_first, restore
        self._module_list = stack.module_list
        self._active = [layer.index for layer in stack.layers if layer.index not in skip]
        self._skips = len(self._active) < len(stack.layers)
        self._layers = {layer.index: layer for layer in stack.layers}
        self._dropping = self._dropping_layers()
        self._owner = _bias_owner(stack)
        self.watch: Watch | None = None
        self._handles: list[Any] = []
        self._state: PassState | None = None
        self._current: LayerRecord | None = None
        self._all_layers: OrderedDict | None = None
        self._in_base = False
        stack_path, _, _ = stack.table.layers.rpartition(".")
        self._install(view.base, view.base.get_submodule(stack_path))

    def _dropping_layers(self) -> list[int]:
        """Active layers that may have to drop something; those without self-attention pass on what they get."""
        able = [index for index in self._active if self._layers[index].attention is not None]
        if not isinstance(self.lengths, LengthConfig):
            return able
        full = None if self.lengths.unit == "counts" else 1.0
        dropping, before = [], full
        for index in able:
            if self.lengths.values[index] != before:
                dropping.append(index)
            before = self.lengths.values[index]
        return dropping

    # Hooks

    def _install(self, base: nn.Module, stack_module: nn.Module) -> None:
        hooks = self._handles
        if self._dropping or self._skips:
            hooks += [
                stack_module.register_forward_pre_hook(self._begin),
                stack_module.register_forward_hook(self._end, always_call=True),
            ]
        if not self._dropping:
            return
        if base is not stack_module:
            hooks += [
                base.register_forward_pre_hook(self._begin_base),
                base.register_forward_hook(self._end_base, always_call=True),
            ]
        for index in self._active[self._active.index(self._dropping[0]) :]:
            layer = self._layers[index]
            enter = functools.partial(self._enter, index, self._mask_place(layer))
            hooks.append(layer.module.register_forward_pre_hook(enter, with_kwargs=True))
            if index in self._dropping:
                hooks += self._dropping_hooks(layer)
            leave = functools.partial(self._leave, index)
            hooks.append(layer.module.register_forward_hook(leave))

    def _dropping_hooks(self, layer: LayerView) -> list[Any]:
        attention = layer.attention
        hooks = [
            part.module.register_forward_hook(functools.partial(self._remember, name, part.start, part.stop))
            for name, part in (("query", attention.q), ("key", attention.k))
        ]
        hooks.append(attention.module.register_forward_hook(functools.partial(self._decide, layer)))
        if not self._table.between:
            hooks.append(attention.norm.register_forward_hook(self._gather_output))
        for path, argument in self._table.between:
            gather = functools.partial(self._gather_argument, argument)
            hooks.append(layer.module.get_submodule(path).register_forward_pre_hook(gather))
        return hooks

    def _mask_place(self, layer: LayerView) -> tuple[str, int] | None:
        if self._table.mask is None:
            return None
        parameters = list(inspect.signature(type(layer.module).forward).parameters)
        return self._table.mask, parameters.index(self._table.mask) - 1

    def remove(self) -> None:
        """Takes the hooks away; the model is stock again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._bring_layers_back()
        self._state = self._current = None

    # The stack as a whole

    def _begin_base(self, module: nn.Module, args: tuple) -> None:
        self._in_base = True

    def _end_base(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self._in_base = False
        # Some families collect hidden states here, not in the stack.
        output = self._with_whole_hidden_states(output)
        self._forget()
        return output

    def _begin(self, module: nn.Module, args: tuple) -> None:
        self._state = None
        if self._skips:
            self._all_layers = self._module_list._modules
            self._module_list._modules = OrderedDict(
                (str(place), self._layers[index].module) for place, index in enumerate(self._active)
            )

    def _end(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self._bring_layers_back()
        output = self._with_whole_hidden_states(output)
        if not self._in_base:
            self._forget()
        return output

    def _bring_layers_back(self) -> None:
        if self._all_layers is not None:
            self._module_list._modules, self._all_layers = self._all_layers, None

    def _forget(self) -> None:
        """Lets go of the activations, unless gradient checkpointing will run the layers again."""
        checkpointed = any(
            getattr(layer.module, "gradient_checkpointing", False) and layer.module.training
            for layer in self._layers.values()
        )
        if not (checkpointed and torch.is_grad_enabled()):
            self._state = self._current = None

    def _with_whole_hidden_states(self, output: Any) -> Any:
        """Puts tokens back also in the hidden states of single layers, where a caller asked for them."""
        state = self._state
        if not self._restore or state is None or not state.pieces:
            return output
        if isinstance(output, dict):
            if output.get("hidden_states") is not None:
                output["hidden_states"] = self._whole(output["hidden_states"])
        elif isinstance(output, tuple):
            output = tuple(self._whole(part) if _is_hidden_states(part) else part for part in output)
        return output

    def _whole(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # The first are the embeddings; the last may be what the stack returns, which is whole.
        state = self._state
        return tuple(
            state.restore(hidden, self._active[place - 1]) if hidden.shape[1] < state.total else hidden
            for place, hidden in enumerate(hidden_states)
        )

    # A layer

    def _enter(
        self, index: int, mask_place: tuple[str, int] | None, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        hidden = args[0]
        mask = _argument(mask_place, args, kwargs)
        if self._state is None:
            self._state = self._start(hidden, mask)
        state = self._state
        record = state.records.get(index)
        if record is None:
            record = state.records[index] = LayerRecord(hidden, state.positions, state.valid)
        elif record.hidden.data_ptr() != hidden.data_ptr():
            raise FlexCompressError(
                "With gradient checkpointing, a model that drops tokens needs the backward pass of one batch before "
                "the forward pass of the next: call them in turn, or turn gradient checkpointing off."
            )
        self._current = record
        if record.positions is None or mask is None:
            return None
        return _with_argument(mask_place, args, kwargs, mask_like(mask, record.valid))

    def _start(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> PassState:
        valid = valid_tokens(mask)
        batch, total = hidden.shape[:2]
        if valid is None:
            tokens = torch.ones(batch, dtype=torch.long, device=hidden.device) * total
        else:
            tokens = valid.long().sum(1)
        return PassState(total, tokens, self._restore, valid)

    def _remember(
        self, name: str, start: int, stop: int, module: nn.Module, args: tuple, output: torch.Tensor
    ) -> None:
        if not self._current.decided:
            output = output.detach()
            setattr(self._current, name, output if stop - start == output.shape[-1] else output[..., start:stop])

    def _decide(self, layer: LayerView, module: nn.Module, args: tuple, output: tuple) -> None:
        record = self._current
        if record.decided:
            return
        record.decided = True
        limit = self._limit(layer.index, record.hidden)
        if limit is not None:
            with torch.no_grad():
                scores = self._significance(layer, record, output)
                if record.valid is not None:
                    scores = torch.where(record.valid, scores, scores.new_tensor(-1.0))
                if self._keep_first:
                    first = torch.arange(scores.shape[1], device=scores.device) == 0
                    scores = scores.masked_fill(first, torch.finfo(scores.dtype).max)
                self._state.drop(layer.index, scores, limit)
        record.query = record.key = None

    def _limit(self, index: int, hidden: torch.Tensor) -> Limit | None:
        if not isinstance(self.lengths, LengthConfig):
            counts = self.lengths(int(self._state.total))
            return count_limit(hidden, counts[self._active.index(index)])
        value = self.lengths.values[index]
        if self.lengths.unit == "counts":
            return count_limit(hidden, value)
        return fraction_limit(hidden, self._state.tokens, numerator(value))

    def _significance(self, layer: LayerView, record: LayerRecord, output: tuple) -> torch.Tensor:
        attention = layer.attention
        table = attention.table
        if not attention.module.training and len(output) > table.maps and output[table.maps] is not None:
            return column_sums(output[table.maps].detach(), record.valid)
        bias = None
        if table.returns_position_bias:
            bias = output[1].detach()
            removed = attention.module.pruned_heads
            if removed:
                bias = bias[:, [head for head in range(bias.shape[1]) if head not in removed]]
        return attention_received(attention, record.query, record.key, record.valid, bias)

    def _gather(self, hidden: torch.Tensor) -> torch.Tensor:
        record = self._current
        if record.kept is None:
            return hidden
        if record.gathered is None or record.gathered[0] is not hidden:
            record.gathered = (hidden, take(hidden, record.kept))
        return record.gathered[1]

    def _gather_output(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return self._gather(output)

    def _gather_argument(self, argument: int, module: nn.Module, args: tuple) -> tuple:
        return (*args[:argument], self._gather(args[argument]), *args[argument + 1 :])

    def _leave(self, index: int, module: nn.Module, args: tuple, output: Any) -> Any:
        record, state = self._current, self._state
        record.gathered = None
        if self.watch is not None:
            self.watch(index, state.positions, state.valid)
        values = list(output) if isinstance(output, tuple) else [output]
        place = self._table.hidden_output if isinstance(output, tuple) else 0
        if self._table.attention.returns_position_bias and record.kept is not None:
            values[1] = self._position_bias(record)
        if self._restore and index == self._active[-1]:
            values[place] = state.restore(values[place])
        return tuple(values) if isinstance(output, tuple) else values[0]

    def _position_bias(self, record: LayerRecord) -> torch.Tensor:
        bias = self._table.attention.rebuild_position_bias(self._owner, record.after)
        return bias if record.after_valid is None else bias + additive_mask(record.after_valid, bias.dtype)


def _bias_owner(stack: StackView) -> nn.Module | None:
    """The module with the embedding of relative positions, where the stack has one."""
    name = stack.table.attention.position_bias
    modules = [layer.attention.module for layer in stack.layers if layer.attention is not None]
    return next((module for module in modules if name is not None and hasattr(module, name)), None)


def _is_hidden_states(part: Any) -> bool:
    return isinstance(part, tuple) and all(isinstance(item, torch.Tensor) and item.dim() == 3 for item in part)


def _argument(place: tuple[str, int] | None, args: tuple, kwargs: dict) -> Any:
    if place is None:
        return None
    name, position = place
    return args[position] if position < len(args) else kwargs.get(name)


def _with_argument(place: tuple[str, int], args: tuple, kwargs: dict, value: Any) -> tuple[tuple, dict]:
    name, position = place
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}
