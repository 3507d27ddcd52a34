"""The size constraint: a penalty whose multiplier ascends, and which masks it may move."""

from __future__ import annotations

import math

import torch
from torch import nn


class SizeConstraint(nn.Module):
    """`lambda * |s - t|`, for a sparsity s and its target t.

    The published Lagrangian is `lambda_1 (s - t) + lambda_2 (s - t)^2`. On toys of known importances its multipliers
    wind up while the masks are on their way to the threshold, and then push in the wrong direction for as long again:
    the size swings around the ramp. With the absolute value the direction is always right, and the multiplier need
    only be as large as the resistance of the task, which it finds: it grows while s lags behind the ramp or is beyond
    its target by more than a band, and falls else. The gradients of the task differ by orders of magnitude between
    models while Adam ascends by the same step everywhere, hence `lambda = sinh(raw)`: a step changes a large
    multiplier by a share of itself.

    Attributes:
        raw: `arsinh` of the multiplier, which starts at 0.
        closest: The least `|s - t|` that was noted.
    """

    band = 0.005

    def __init__(self, bound: float):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(1))
        self.register_buffer("closest", torch.ones(()))
        self._bound = math.asinh(bound)

    @property
    def multiplier(self) -> torch.Tensor:
        """`lambda`, a scalar."""
        return torch.sinh(self.raw[0])

    def forward(self, sparsity: torch.Tensor, target: float, due: float | None = None) -> torch.Tensor:
        """The term of the loss, which masks descend and the multiplier ascends; its value is `|s - t|`.

        Args:
            sparsity: What the masks leave out, with its gradient.
            target: What they should.
            due: What is due now, where the target lies ahead of it.
        """
        gap = (sparsity - target).abs()
        reached = sparsity.detach()
        late = torch.maximum((target if due is None else due) - reached, reached - target)
        drive = ((late - self.band) / self.band).clamp(-1.0, 1.0)
        # The logs show the gap: how hard the constraint pushes would drown the losses of the task.
        push = self.multiplier.detach() * gap + self.raw[0] * drive
        return gap.detach() + (push - push.detach())

    @torch.no_grad()
    def note(self, sparsity: torch.Tensor, target: float) -> None:
        """Notes how close the masks are to the target."""
        self.closest.copy_(torch.minimum(self.closest, (sparsity - target).abs()))

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps the multiplier in its bounds, without waiting for the device."""
        self.raw.clamp_(0.0, self._bound)


@torch.no_grad()
def movable(scores: torch.Tensor, keep: torch.Tensor, marginal: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """Which masks the constraint may move: those nearest to the threshold that suffice to close the gap.

    Masks start with equal scores. If the constraint pushed all of them, they would cross the threshold together, far
    beyond the target, and swing back. Of those that are pushed the important ones resist and make room for others.
    Masks that would only turn the gap around are left out: a whole sub-layer goes once enough of it is gone.

    Args:
        scores: Above 0 where a mask is on, `[size]`.
        keep: The same as zeros and ones.
        marginal: What each mask adds to the size, `[size]`.
        gap: How much is to go, or to come back where it is negative; a scalar.

    Returns:
        Zeros and ones, `[size]`.
    """
    side = torch.where(gap > 0, keep, 1 - keep)
    side = side * (marginal <= 2 * gap.abs())
    order = torch.where(side > 0, scores.abs(), torch.inf).argsort()
    amounts = (marginal * side)[order]
    within = amounts.cumsum(0) - amounts < gap.abs()
    return torch.zeros_like(side).scatter(0, order, within.to(side.dtype)) * side
