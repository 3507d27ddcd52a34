"""Runs a model as if parts of it were gone or scaled, and folds such scales into the weights.

What [`masked`] computes is what [`fold`] and [`surgery.select`] make physical: a masked head or FFN dim is multiplied
by its mask before the projection that reads it, a sub-layer with nothing left is off together with its output bias,
and norms take their statistics over the kept dims of the residual stream only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import AttentionView, LayerView, ModelView, describe
from .architectures.removed import RemovedModule
from .errors import FlexCompressError
from .kept import Indices, Kept, KeptLayer
from .surgery import hidden_sides


@dataclass
class LayerMasks:
    """Masks of a layer; `None` leaves a sub-layer as it is.

    Attributes:
        attention: `[key-value heads]`, a factor for each group of heads.
        cross_attention: The same for the cross-attention.
        ffn: `[FFN size]`.
    """

    attention: torch.Tensor | None = None
    cross_attention: torch.Tensor | None = None
    ffn: torch.Tensor | None = None


@dataclass
class Masks:
    """A factor for everything that can go; 0 turns it off, and other values scale it.

    Attributes:
        hidden: `[hidden size]`: scales what the embeddings and every sub-layer add to the residual stream.
        stacks: For each stack the masks of all its layers.
    """

    hidden: torch.Tensor | None = None
    stacks: dict[str, list[LayerMasks]] = field(default_factory=dict)

    @classmethod
    def of(cls, view: ModelView, kept: Kept) -> Masks:
        """Masks of 1 for what is kept and 0 for the rest.

        Raises:
            FlexCompressError: `kept` drops or reorders layers.
        """
        masks = cls(_indicator(kept.hidden, view.hidden_size))
        for name, layers in kept.stacks.items():
            stack = view.stacks[name]
            if [layer.source for layer in layers] != list(range(len(stack.layers))):
                raise FlexCompressError(
                    "Masks keep the layers of a stack in place: use surgery.keep_layers to drop some."
                )
            masks.stacks[name] = [_layer_indicators(layer, keep) for layer, keep in zip(stack.layers, layers)]
        return masks

    def kept(self) -> Kept:
        """What is not masked by 0, for [`surgery.select`]."""

        def indices(mask: torch.Tensor | None) -> Indices:
            return None if mask is None else mask != 0

        return Kept(
            indices(self.hidden),
            {
                name: [
                    KeptLayer(index, indices(layer.attention), indices(layer.cross_attention), indices(layer.ffn))
                    for index, layer in enumerate(layers)
                ]
                for name, layers in self.stacks.items()
            },
        )


def _indicator(kept: Indices, size: int) -> torch.Tensor | None:
    if kept is None:
        return None
    indicator = torch.zeros(size)
    indicator[torch.as_tensor(list(kept), dtype=torch.long)] = 1.0
    return indicator


def _layer_indicators(layer: LayerView, keep: KeptLayer) -> LayerMasks:
    def of(attention: AttentionView | None, heads: Indices) -> torch.Tensor | None:
        return None if attention is None else _indicator(heads, attention.num_kv_heads)

    ffn = None if layer.ffn is None else _indicator(keep.ffn, layer.ffn.size)
    return LayerMasks(of(layer.attention, keep.attention), of(layer.cross_attention, keep.cross_attention), ffn)


def _masked_inputs(view: ModelView, masks: Masks) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Projections that write to the residual stream, with the mask (`[in features]`) of what they read."""
    for name, layers in masks.stacks.items():
        for layer, mask in zip(view.stacks[name].layers, layers, strict=True):
            for attention, heads in (
                (layer.attention, mask.attention),
                (layer.cross_attention, mask.cross_attention),
            ):
                if attention is not None and heads is not None:
                    queries_per_group = attention.num_heads // attention.num_kv_heads
                    yield attention.o, heads.repeat_interleave(queries_per_group * attention.head_size)
            if layer.ffn is not None and mask.ffn is not None:
                yield layer.ffn.down, mask.ffn


def _writers(view: ModelView) -> Iterator[nn.Module]:
    """The output projections of all sub-layers."""
    for stack in view.stacks.values():
        for layer in stack.layers:
            yield from (part.o for part in (layer.attention, layer.cross_attention) if part is not None)
            if layer.ffn is not None:
                yield layer.ffn.down


# -- Masked forward -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def masked(model: PreTrainedModel, masks: Masks | Kept) -> Iterator[PreTrainedModel]:
    """Runs the model masked for as long as the block lasts; its weights stay as they are.

    Args:
        model: The model.
        masks: The masks, or what is kept, as for [`surgery.select`], where nothing is scaled.

    Yields:
        The same model.

    Raises:
        FlexCompressError: A `Kept` that drops or reorders layers.
    """
    view = describe(model)
    if isinstance(masks, Kept):
        masks = Masks.of(view, masks)
    handles: list = []
    try:
        for module, mask in _masked_inputs(view, masks):
            handles += mask_input(module, mask)
        if masks.hidden is not None:
            handles += _mask_hidden(view, masks.hidden)
        yield model
    finally:
        for handle in handles:
            handle.remove()


def mask_input(module: nn.Module, mask: torch.Tensor) -> list:
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


def mask_norm(module: nn.Module, keep: torch.Tensor | Callable[[], torch.Tensor]) -> _NormHandle:
    """Makes a LayerNorm or RMS norm run over the dims where `keep` (`[hidden size]`) is 1, and return 0 elsewhere.

    Args:
        module: The norm.
        keep: Zeros and ones, or a function that returns them when the norm runs; gradients reach them.
    """
    centred = isinstance(module, nn.LayerNorm)
    eps = next(getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name))

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        mask = (keep() if callable(keep) else keep).to(hidden_states.device, torch.float32)
        # Masks that learn may turn off every dim for a while.
        count = mask.sum().clamp_min(1.0)
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


@dataclass
class HiddenSites:
    """The modules through which a mask on the residual stream acts.

    Attributes:
        scaled: Their outputs are multiplied by the mask: embeddings and the output projections of sub-layers.
        kept: Their outputs are multiplied by what is kept: other projections onto the same dims.
        norms: They run over the kept dims.
    """

    scaled: list[nn.Module]
    kept: list[nn.Module]
    norms: list[nn.Module]


def hidden_sites(view: ModelView) -> HiddenSites:
    """Finds the modules through which a mask on the residual stream acts.

    Raises:
        UnsupportedArchitectureError: A task head that the family's table does not know.
    """
    writers = {id(module) for module in _writers(view)}
    sites = HiddenSites(view.embedding_outputs(), [], [])
    for item, sides in hidden_sides(view).values():
        if isinstance(item, nn.Parameter | nn.Embedding | nn.Conv2d | RemovedModule) or "out" not in sides:
            continue
        if next(iter(item.parameters(recurse=False))).dim() == 1:
            sites.norms.append(item)
        else:
            (sites.scaled if id(item) in writers else sites.kept).append(item)
    return sites


def _mask_hidden(view: ModelView, mask: torch.Tensor) -> list:
    keep = (mask != 0).to(mask.dtype)
    sites = hidden_sites(view)
    handles = [mask_output(module, mask) for module in sites.scaled]
    handles += [mask_output(module, keep) for module in sites.kept]
    return handles + [mask_norm(module, keep) for module in sites.norms]


# -- Folding ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold(model: PreTrainedModel, masks: Masks) -> PreTrainedModel:
    """Multiplies the weights by the masks, zeros left out, so that removal is all that is left to do.

    Scaling an embedding that is tied to the output would scale the logits as well. Where the embeddings go through a
    norm (BERT, BART) that norm takes the scale; elsewhere (GPT-2, T5, LLaMA) the embeddings do, and the final norm
    in front of a tied output takes its inverse.

    Args:
        model: The model; its weights are changed in place.
        masks: The masks.

    Returns:
        The same model: after `select(model, masks.kept())` it computes what it computed in `masked(model, masks)`.
    """
    view = describe(model)
    for module, mask in _masked_inputs(view, masks):
        _scale(module.weight, _factors(mask, module.weight), 0 if isinstance(module, Conv1D) else 1)
    if masks.hidden is None:
        return model
    for module in _writers(view):
        factors = _factors(masks.hidden, module.weight)
        _scale(module.weight, factors, 1 if isinstance(module, Conv1D) else 0)
        if module.bias is not None:
            _scale(module.bias, factors, 0)
    _fold_embeddings(view, masks.hidden)
    return model


def _factors(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.where(mask == 0, torch.ones_like(mask), mask).to(like)


def _scale(tensor: torch.Tensor, factors: torch.Tensor, dim: int) -> None:
    shape = [1] * tensor.dim()
    shape[dim] = -1
    tensor.mul_(factors.view(shape))


def _fold_embeddings(view: ModelView, mask: torch.Tensor) -> None:
    norms = [module for _, module in view.matching(view.architecture.embedding_norms)]
    if norms:
        for parameter in (parameter for norm in norms for parameter in norm.parameters(recurse=False)):
            _scale(parameter, _factors(mask, parameter), 0)
        return
    scaled: set[int] = set()
    for _, item in view.matching(view.architecture.embeddings):
        for parameter in [item] if isinstance(item, nn.Parameter) else item.parameters(recurse=False):
            if id(parameter) not in scaled:
                scaled.add(id(parameter))
                out_first = isinstance(item, nn.Conv2d) or parameter.dim() == 1
                _scale(parameter, _factors(mask, parameter), 0 if out_first else parameter.dim() - 1)
    output = view.model.get_output_embeddings()
    if output is None or id(output.weight) not in scaled:
        return
    last = list(view.stacks.values())[-1]
    for parameter in view.base.get_submodule(last.table.final_norm).parameters(recurse=False):
        _scale(parameter, 1 / _factors(mask, parameter), 0)
