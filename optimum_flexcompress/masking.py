"""Runs a model as if parts of it were gone, without touching its weights.

What [`masked`] computes is what [`surgery.select`] makes physical: a masked head or FFN dim is multiplied by zero
before the projection that reads it, a sub-layer with nothing left is off together with its output bias, and norms
take their statistics over the kept dims of the residual stream only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import AttentionView, ModelView, describe
from .architectures.removed import RemovedModule
from .errors import FlexCompressError
from .kept import Kept
from .surgery import hidden_sides


@contextlib.contextmanager
def masked(model: PreTrainedModel, kept: Kept) -> Iterator[PreTrainedModel]:
    """Runs the model with only the `kept` parts on, for as long as the block lasts.

    Args:
        model: The model; its weights stay as they are.
        kept: What stays on, as for [`surgery.select`]. Layers cannot be dropped or reordered here: empty all of a
            layer's sub-layers instead.

    Yields:
        The same model.

    Raises:
        FlexCompressError: `kept` drops or reorders layers.
    """
    view = describe(model)
    handles: list = []
    try:
        for name, layers in kept.stacks.items():
            stack = view.stacks[name]
            if [layer.source for layer in layers] != list(range(len(stack.layers))):
                raise FlexCompressError(
                    "Masks keep the layers of a stack in place: use surgery.keep_layers to drop some."
                )
            for layer, keep in zip(stack.layers, layers):
                for attention, heads in (
                    (layer.attention, keep.attention),
                    (layer.cross_attention, keep.cross_attention),
                ):
                    if attention is not None and heads is not None:
                        handles += _mask_attention(attention, heads)
                if layer.ffn is not None and keep.ffn is not None:
                    handles += mask_projection_input(layer.ffn.down, _indicator(keep.ffn, layer.ffn.size))
        if kept.hidden is not None:
            handles += _mask_hidden(view, _indicator(kept.hidden, view.hidden_size))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _indicator(kept, size: int) -> torch.Tensor:
    indicator = torch.zeros(size)
    indicator[torch.as_tensor(list(kept), dtype=torch.long)] = 1.0
    return indicator


def _mask_attention(attention: AttentionView, groups) -> list:
    mask = _indicator(groups, attention.num_kv_heads)
    queries_per_group = attention.num_heads // attention.num_kv_heads
    return mask_projection_input(attention.o, mask.repeat_interleave(queries_per_group * attention.head_size))


def mask_projection_input(module: nn.Module, mask: torch.Tensor) -> list:
    """Multiplies what a projection reads by `mask` (`[in features]`), and turns it off, bias included, if all is 0."""

    def scale(_module: nn.Module, args: tuple) -> tuple:
        return (args[0] * mask.to(args[0]), *args[1:])

    handles = [module.register_forward_pre_hook(scale)]
    if not mask.any():
        handles.append(module.register_forward_hook(lambda _module, _args, output: output * 0))
    return handles


def mask_output(module: nn.Module, mask: torch.Tensor):
    """Multiplies what a module returns by `mask` (`[features]`)."""
    return module.register_forward_hook(lambda _module, _args, output: output * mask.to(output))


class _NormHandle:
    def __init__(self, module: nn.Module):
        self.module = module

    def remove(self) -> None:
        del self.module.forward


def mask_norm(module: nn.Module, keep: torch.Tensor) -> _NormHandle:
    """Makes a LayerNorm or RMS norm run over the dims where `keep` (`[hidden size]`) is 1, and return 0 elsewhere."""
    centred = isinstance(module, nn.LayerNorm)
    eps = next(getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name))

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        mask = keep.to(hidden_states.device, torch.float32)
        count = mask.sum()
        states = hidden_states.float() * mask
        if centred:
            states = (states - states.sum(-1, keepdim=True) / count) * mask
        variance = states.pow(2).sum(-1, keepdim=True) / count
        output = (states * torch.rsqrt(variance + eps)).to(module.weight.dtype) * module.weight
        if centred and module.bias is not None:
            output = output + module.bias
        return output * mask.to(output.dtype)

    module.forward = forward
    return _NormHandle(module)


def _mask_hidden(view: ModelView, keep: torch.Tensor) -> list:
    handles = [mask_output(module, keep) for module in view.embedding_outputs()]
    for item, sides in hidden_sides(view).values():
        if isinstance(item, nn.Parameter | nn.Embedding | nn.Conv2d | RemovedModule) or "out" not in sides:
            continue
        if next(iter(item.parameters(recurse=False))).dim() == 1:
            handles.append(mask_norm(item, keep))
        else:
            handles.append(mask_output(item, keep))
    return handles
