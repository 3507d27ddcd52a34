"""The size constraint: a Lagrangian whose multipliers ascend."""

from __future__ import annotations

import math

import torch
from torch import nn


class SizeConstraint(nn.Module):
    """`lambda_1 (s - t) + lambda_2 (s - t)^2`, for a sparsity s and its target t.

    What size the multipliers need follows the gradients of the task, which differ by orders of magnitude between
    models, while Adam ascends by the same step everywhere. Hence `lambda = sinh(raw)`: near 0 the ascent is linear as
    usual, and further out a step changes a multiplier by a share of itself.

    Attributes:
        raw: `arsinh` of the two multipliers, which start at 0.
    """

    def __init__(self, bound: float):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(2))
        self._bound = math.asinh(bound)

    @property
    def multipliers(self) -> torch.Tensor:
        """`lambda_1` and `lambda_2`; the second one is never negative."""
        return torch.sinh(self.raw)

    def forward(self, sparsity: torch.Tensor, target: float) -> torch.Tensor:
        """The term of the loss, which masks descend and multipliers ascend.

        Args:
            sparsity: What the masks leave out, with its gradient.
            target: What they should.
        """
        first, second = self.multipliers
        gap = sparsity - target
        return first * gap + second * gap.square()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps the multipliers in bounds, without waiting for the device."""
        self.raw[0].clamp_(-self._bound, self._bound)
        self.raw[1].clamp_(0.0, self._bound)
