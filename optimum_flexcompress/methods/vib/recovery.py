"""Recovery by LoRA after pruning with frozen weights, through PEFT."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...architectures import describe
from ...errors import MissingExtraError


DEFAULT_OPTIONS = {"r": 16, "lora_alpha": 32}

RATE_WARMUP = 0.1
"""Share of the steps of the recovery in which its learning rate rises."""


def require_peft() -> Any:
    """The package, or an error that names the extra."""
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "lora") from None
    return peft


class LoRARecovery:
    """Adapters on the projections of all sub-layers, beside a model that keeps its modules as they are.

    PEFT puts its layers around copies of the projections that share their weights; while attached, the projections
    compute what those layers do. So the hooks and names of the model stay, its checkpoints hold plain weights, and
    the adapters are parameters of the method.

    Attributes:
        adapters: The parameters.

    Args:
        model: The model.
        options: Of `peft.LoraConfig`.

    Raises:
        MissingExtraError: PEFT is not installed.
    """

    def __init__(self, model: PreTrainedModel, options: Mapping[str, Any]):
        peft = require_peft()
        self._options = dict(options)
        self._projections = _projections(model)
        container = nn.ModuleDict({str(i): _alias(module) for i, module in enumerate(self._projections)})
        config = peft.LoraConfig(
            target_modules=list(container),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in self._projections),
            **{**DEFAULT_OPTIONS, **options},
        )
        parameters = [parameter for module in self._projections for parameter in module.parameters()]
        trained = [parameter.requires_grad for parameter in parameters]
        container = peft.inject_adapter_in_model(config, container)
        # PEFT freezes what it wraps, which here is the caller's business.
        for parameter, flag in zip(parameters, trained, strict=True):
            parameter.requires_grad_(flag)
        self._layers = list(container.values())
        self.adapters = nn.ModuleList(nn.ModuleList([layer.lora_A, layer.lora_B]) for layer in self._layers)

    def attach(self) -> None:
        """Has the projections use their adapters."""
        for module, layer in zip(self._projections, self._layers, strict=True):
            module.forward = _forward(module, layer)

    def detach(self) -> None:
        """Has the projections be themselves."""
        for module in self._projections:
            vars(module).pop("forward", None)

    def merge_into(self, model: PreTrainedModel) -> None:
        """Adds the adapters to the weights.

        Args:
            model: The model that was given, or a copy of it without its hooks.
        """
        modules = _projections(model)
        if modules == self._projections:
            self.detach()
            other = self
        else:
            devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
            # The adapters of the copy are drawn at random first, which must not move the run's dropout.
            with torch.random.fork_rng([device.index for device in devices]):
                other = LoRARecovery(model, self._options)
            other.adapters.load_state_dict(self.adapters.state_dict())
            other.adapters.to(next(self.adapters.parameters()).device)
        for layer in other._layers:
            layer.merge()

    @staticmethod
    def rate(step: int, start: int, stop: int) -> float:
        """Factor of the learning rate: 0 before the recovery, then a short rise and a linear fall to 0."""
        if step < start or stop <= start:
            return 0.0
        done = (step - start + 0.5) / (stop - start)
        return min(done / RATE_WARMUP, (1.0 - done) / (1.0 - RATE_WARMUP))


def _projections(model: PreTrainedModel) -> list[nn.Module]:
    """The projections inside all sub-layers, fused ones once."""
    found: dict[int, nn.Module] = {}
    for stack in describe(model).stacks.values():
        for layer in stack.layers:
            for part in (layer.attention, layer.cross_attention):
                if part is not None:
                    for module in (part.q.module, part.k.module, part.v.module, part.o):
                        found[id(module)] = module
            if layer.ffn is not None:
                for module in (*layer.ffn.up, layer.ffn.down):
                    found[id(module)] = module
    return list(found.values())


def _alias(module: nn.Module) -> nn.Module:
    """The same weights in a module without hooks."""
    alias = copy.copy(module)
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            vars(alias)[name] = type(value)()
    return alias


def _forward(module: nn.Module, layer: nn.Module):
    def forward(states: torch.Tensor) -> torch.Tensor:
        # PEFT's layer is no part of the model, so it is not told when the model changes between the two.
        if layer.training != module.training:
            layer.train(module.training)
        return layer(states)

    return forward
