"""What stands in the place of a removed sub-layer.

Each stand-in keeps a zero-size tensor under the stock name of every tensor it replaces. A process without the plugin
therefore meets tensors of the wrong shape and stops, where missing ones would be filled with random numbers.
"""

from __future__ import annotations

import torch
from torch import nn


class RemovedModule(nn.Module):
    """Base of the stand-ins: the names of the removed tensors, with nothing in them.

    Args:
        original: The module that is replaced.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self._keep_names(self, original)

    @staticmethod
    def _keep_names(target: nn.Module, original: nn.Module) -> None:
        for name, tensor in [*original.named_parameters(recurse=False), *original.named_buffers(recurse=False)]:
            if name not in original._non_persistent_buffers_set:
                # A buffer, so that no optimizer ever meets it.
                target.register_buffer(name, torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        for name, child in original.named_children():
            if child.state_dict():
                target.add_module(name, nn.Module())
                RemovedModule._keep_names(target.get_submodule(name), child)

    def zero(self, like: torch.Tensor) -> torch.Tensor:
        """A scalar zero of the dtype and on the device of `like`: adding it leaves the residual stream as it is."""
        return like.new_zeros(())


class RemovedProjection(RemovedModule):
    """In the place of a linear layer; returns a scalar zero."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.zero(hidden_states)


class RemovedNorm(RemovedModule):
    """In the place of the norm of a removed pre-LN sub-layer; returns its input, which is then not used."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class RemovedAttention(RemovedModule):
    """In the place of an attention module; returns a scalar zero and no weights.

    Args:
        original: The attention module.
        returns_position_bias: Whether the second output is a position bias that the next layer is handed (T5).
    """

    def __init__(self, original: nn.Module, returns_position_bias: bool = False):
        super().__init__(original)
        self.returns_position_bias = returns_position_bias

    def forward(self, *args, **kwargs) -> tuple[torch.Tensor | None, ...]:
        if args:
            hidden_states = args[0]
        else:
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["query"]
        outputs = (self.zero(hidden_states),)
        if self.returns_position_bias:
            outputs += (kwargs.get("position_bias"),)
            return outputs + (None,) if kwargs.get("output_attentions") else outputs
        return outputs + (None,)
