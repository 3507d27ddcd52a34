"""Has a model run under its masks: noisy in training, hard in evaluation."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...architectures import FeedForwardView, describe
from ...masking import hidden_sites, mask_norm
from .layout import FFN, MaskLayout, Sublayer
from .masks import Counts, VIBMasks


@dataclass
class Applied:
    """The masks of one forward pass.

    Attributes:
        values: Means of what is kept and 0 for the rest, `[size]`.
        sigma: Standard deviations of the noise, likewise, `[size]`; `None` for none.
        keep: Indicator of what is kept, with its gradient in training, `[size]`.
        hidden: That of the dims of the residual stream, without a gradient, `[hidden size]`.
        counts: What is left of every sub-layer, without a gradient.
        dims: Once the masks are zeros and ones for good, the inner dims that FFNs keep, by the index of the sub-layer;
            without those that keep all or nothing.
        drawn: Noisy masks of the residual stream for the sequences of the batch, once they are drawn.
    """

    values: torch.Tensor
    sigma: torch.Tensor | None
    keep: torch.Tensor
    hidden: torch.Tensor
    counts: Counts
    dims: dict[int, torch.Tensor] = field(default_factory=dict)
    drawn: torch.Tensor | None = None


class _NoisyMask(torch.autograd.Function):
    """`z = mu + eps * sigma`, of which the log variance gets the gradient that it has on average over the noise.

    What a draw tells about the gradient of `log(sigma^2)`, `eps * sigma / 2 * dL/dz`, is almost all noise: a mask that
    matters moves as much at random as one that does not. Its mean over the draws is `sigma^2 / 2 * d^2L/dz^2` (Price's
    theorem), and the second derivative of a likelihood is the mean square of the gradients of single samples (the
    Fisher information), which backward passes through here anyway. At the threshold, where sigma is mu, that is what
    optimal brain damage says the removal costs.
    """

    @staticmethod
    def forward(ctx, values, log_variance, sigma, noise, samples):
        ctx.save_for_backward(sigma)
        ctx.samples = samples
        return torch.addcmul(values, noise, sigma)

    @staticmethod
    def backward(ctx, gradient):
        (sigma,) = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        # The loss is a mean over samples, so a sample's own gradient is `samples` times what arrives here.
        curvature = ctx.samples * rows.square().sum(0)
        return rows.sum(0), 0.5 * sigma.square() * curvature, None, None, None


class MaskHooks:
    """The hooks on a model, from `attach` to `detach`.

    A head or FFN dim is scaled before the projection that reads it, and so is a whole sub-layer; the residual stream
    where embeddings and sub-layers write to it. A sub-layer of which nothing is left writes nothing, its bias
    included, and norms run over what is left of the residual stream. All that is hard in training too, and what is
    off is silent, so that training and evaluation differ in the noise alone. Once the masks are frozen, FFNs compute
    the dims that they keep and no others, while their parameters, which optimizers and checkpoints know, stay whole.

    Args:
        masks: The masks.
        beta: Slope of the straight-through gradient of the constraint.
        per_token: Whether noise is drawn for every token instead of once per sequence.
    """

    def __init__(self, masks: VIBMasks, beta: float, per_token: bool):
        self.masks = masks
        self.beta = beta
        self.per_token = per_token
        self.frozen = False
        """Once the masks are zeros and ones for good."""
        self.batches = 1
        """How many batches like this one the loss is a mean over."""
        self.loss_scale = 1.0
        """What multiplies the loss before the backward pass, in half precision."""
        self._handles: list[Any] = []
        self._narrowed: list[nn.Module] = []
        self._applied: Applied | None = None
        self._evaluated: tuple[tuple, Applied] | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Puts the hooks on a model."""
        self.detach()
        layout: MaskLayout = self.masks.layout
        view = describe(model)
        self._model = model
        self._handles.append(model.register_forward_pre_hook(self._start))
        for index, part in enumerate(layout.sublayers):
            sublayer = getattr(view.stacks[part.stack].layers[part.layer], part.kind)
            output = sublayer.down if part.kind == FFN else sublayer.o
            self._handles.append(output.register_forward_pre_hook(self._scale_units(part)))
            self._handles.append(output.register_forward_hook(self._switch(index)))
            if part.kind == FFN:
                self._narrow(index, sublayer)
        if "hidden" in layout.kinds:
            sites = hidden_sites(view)
            self._handles += [module.register_forward_hook(self._scale_hidden) for module in sites.scaled]
            self._handles += [module.register_forward_hook(self._keep_hidden) for module in sites.kept]
            self._handles += [mask_norm(module, self._hidden_indicator) for module in sites.norms]

    def detach(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        for module in self._narrowed:
            vars(module).pop("forward", None)
        self._handles, self._narrowed = [], []
        self._applied = self._evaluated = None

    @property
    def applied(self) -> Applied:
        """The masks of the forward pass that runs, or ran last."""
        if self._noisy:
            if self._applied is None:
                self._applied = self._sampled()
            return self._applied
        # Parts of a model also run by themselves (the encoder in generation), so nothing may depend on a start.
        masks = self.masks
        key = (masks.mu._version, masks.log_variance._version, masks.mu.device, self.frozen)
        if self._evaluated is None or self._evaluated[0] != key:
            self._evaluated = (key, self._hard())
        return self._evaluated[1]

    @property
    def _noisy(self) -> bool:
        return self._model.training and not self.frozen

    def _start(self, _module: nn.Module, _args: tuple) -> None:
        # The graph of the last pass is gone; a pass that gradient checkpointing repeats does not come through here.
        self._applied = None

    def _sampled(self) -> Applied:
        masks = self.masks
        keep = masks.keep(self.beta)
        hard = keep.detach()
        values = torch.where(masks.active, masks.mu, 1.0) * hard
        sigma = masks.sigma().detach() * hard
        return Applied(values, sigma, keep, hard[: masks.layout.hidden], masks.counts(hard))

    @torch.no_grad()
    def _hard(self) -> Applied:
        masks = self.masks
        keep = (masks.scores() > 0).to(masks.mu.dtype)
        values, dims = masks.evaluation_values(), {}
        if self.frozen:
            for index, part in enumerate(masks.layout.sublayers):
                kept = values[part.start : part.stop].nonzero().squeeze(1)
                if part.kind == FFN and 0 < len(kept) < part.units and values[part.gate]:
                    dims[index] = kept
        return Applied(values, None, keep, keep[: masks.layout.hidden], masks.counts(keep), dims)

    # Hooks

    def _factors(self, start: int, stop: int, like: torch.Tensor) -> torch.Tensor:
        """Masks `[start:stop]` for a batch, `[batch, 1 or length, stop - start]`, or `[stop - start]` in evaluation."""
        applied = self.applied
        values = applied.values[start:stop]
        if applied.sigma is None:
            return values
        shape = like.shape[:-1] if self.per_token else (like.shape[0], *([1] * (like.dim() - 2)))
        noise = torch.randn(*shape, stop - start, device=values.device, dtype=values.dtype)
        part = slice(start, stop)
        samples = like.shape[0] * self.batches / self.loss_scale
        return _NoisyMask.apply(values, self.masks.log_variance[part], applied.sigma[part], noise, samples)

    def _narrow(self, index: int, ffn: FeedForwardView) -> None:
        modules = [*ffn.up, ffn.down]
        # A forward of somebody else's may count on all dims.
        if any(type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module) for module in modules):
            return
        for module in modules:
            # Bound, so that copies of the model are about themselves.
            module.forward = types.MethodType(self._compute_kept(index, "in" if module is ffn.down else "out"), module)
        self._narrowed += modules

    def _compute_kept(self, index: int, side: str) -> Callable:
        def forward(module: nn.Linear | Conv1D, states: torch.Tensor) -> torch.Tensor:
            kept = self.applied.dims.get(index)
            # Adapters may have taken the place of what feeds it.
            if kept is None or (side == "in" and states.shape[-1] != len(kept)):
                return type(module).forward(module, states)
            weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
            if side == "in":
                return functional.linear(states, weight.index_select(1, kept), module.bias)
            bias = None if module.bias is None else module.bias.index_select(0, kept)
            return functional.linear(states, weight.index_select(0, kept), bias)

        return forward

    def _scale_units(self, part: Sublayer) -> Callable:
        def hook(_module: nn.Module, args: tuple) -> tuple:
            states = args[0]
            if states.shape[-1] < part.units * part.width:
                # What is kept and nothing else, all with a factor of 1.
                return args
            factors = self._factors(part.start, part.stop, states)
            if part.width > 1:
                factors = factors.repeat_interleave(part.width, -1)
            factors = factors * self._factors(part.gate, part.gate + 1, states)
            return (states * factors.to(states.dtype), *args[1:])

        return hook

    def _switch(self, index: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
            return output * self.applied.counts.on[index].to(output.dtype)

        return hook

    def _scale_hidden(self, _module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        applied, factors = self.applied, self.applied.drawn
        # One mask, and so one draw for a sequence, wherever the stream is written to: here by embeddings of positions
        # too, which all sequences share. Tokens differ in number between the places.
        if factors is None or output.shape[0] not in (1, factors.shape[0]):
            factors = self._factors(0, self.masks.layout.hidden, output)
            if applied.sigma is not None and not self.per_token:
                applied.drawn = factors
        return output * factors.to(output.dtype)

    def _keep_hidden(self, _module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * self._hidden_indicator().to(output.dtype)

    def _hidden_indicator(self) -> torch.Tensor:
        return self.applied.hidden
