"""The methods' own parameters in the trainer's optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed
from torch import nn
from transformers import TrainingArguments

from ..errors import FlexCompressError
from .base import CompressionMethod, ParameterGroup


GROUP_KEY = "flexcompress_group"
"""Marks the optimizer's groups that belong to methods."""


class MethodGroups:
    """The optimizer groups of the methods: schedules, clipping and gradients that neither the trainer nor DDP knows."""

    def __init__(self, methods: Sequence[CompressionMethod]):
        self.groups: dict[str, ParameterGroup] = {
            f"{method.config.method_type}.{group.name}": group
            for method in methods
            for group in method.parameter_groups()
        }
        self._norms: list[torch.Tensor] = []

    def add_to(self, optimizer: torch.optim.Optimizer, args: TrainingArguments) -> None:
        for name, group in self.groups.items():
            options = {
                "params": group.parameters,
                "lr": args.learning_rate if group.learning_rate is None else group.learning_rate,
                "weight_decay": args.weight_decay if group.decays else 0.0,
                GROUP_KEY: name,
            }
            if group.maximize:
                if "maximize" not in optimizer.defaults:
                    raise FlexCompressError(
                        f"The optimizer {type(optimizer).__name__} cannot ascend, which the multipliers of {name} "
                        'need: use optim="adamw_torch".'
                    )
                options["maximize"] = True
            optimizer.add_param_group(options)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups.values() for parameter in group.parameters]

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def average_gradients(self, processes: int) -> None:
        """What DDP does for the weights of the model; one message for all. A gradient that no process has stays
        absent, so that the optimizer leaves the parameter alone, as in a run with one process.
        """
        parameters = self.parameters()
        if processes == 1 or not parameters:
            return
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=parts[0].device)
        message = torch.cat([part.reshape(-1).float() for part in parts] + [present])
        torch.distributed.all_reduce(message)
        sizes = [part.numel() for part in parts]
        *averages, present = message.split([*sizes, len(parameters)])
        for parameter, average, someone in zip(parameters, averages, present.tolist(), strict=True):
            if someone:
                parameter.grad = (average / processes).view_as(parameter).to(parameter.dtype)

    def before_step(self, optimizer: torch.optim.Optimizer, step: int, max_steps: int, max_grad_norm: float) -> None:
        """Sets the learning rates that follow a schedule of their own, and clips each group by itself."""
        self._norms = []
        for options in optimizer.param_groups:
            group = self.groups.get(options.get(GROUP_KEY))
            if group is None:
                continue
            if group.schedule is not None:
                base = options.get("initial_lr", options["lr"])
                options["lr"] = base * group.schedule(step, max_steps)
            bound = max_grad_norm if group.max_grad_norm is None else group.max_grad_norm
            if bound:
                # Read when it is logged: to read it in every step would make the device wait.
                self._norms.append(torch.nn.utils.clip_grad_norm_(group.parameters, bound))

    def gradient_norm(self) -> float:
        """The norm of the gradients of all groups in the last step, before they were clipped."""
        return math.hypot(*(norm.item() for norm in self._norms))
