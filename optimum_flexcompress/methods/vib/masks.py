"""The information-bottleneck masks (VTrans, arXiv 2406.05276, section 2; Dai et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...masking import LayerMasks, Masks
from .layout import FFN, MaskLayout


INITIAL_LOG_VARIANCE = -9.0
INITIAL_SPREAD = 0.01
EPSILON = 1e-8

LOG_VARIANCE_RANGE = (-12.0, 6.0)
"""How far a mask may drift from the threshold: the way back has to be open when the target rises."""

SMALLEST_FOLDED = 1e-3
"""Least size of a mean that is folded into weights: tied embeddings are also divided by it."""


class VIBMasks(nn.Module):
    """One Gaussian for every entry of a layout, `z = mu + eps * sigma`.

    Attributes:
        mu: Means, `[size]`.
        log_variance: `log(sigma^2)`, `[size]`.
        active: Which entries learn; the others are 1.
    """

    def __init__(self, layout: MaskLayout):
        super().__init__()
        self.layout = layout
        active = layout.active()
        spread = INITIAL_SPREAD * torch.randn(2, layout.size)
        self.mu = nn.Parameter(torch.where(active, 1.0 + spread[0], torch.ones(())))
        self.log_variance = nn.Parameter(INITIAL_LOG_VARIANCE + spread[1])
        self.register_buffer("active", active, persistent=False)
        self.register_buffer("_owners", layout.owners(), persistent=False)

    def scores(self) -> torch.Tensor:
        """`log(mu^2 / sigma^2)`: above 0 an entry is kept. Infinite where there is no mask. `[size]`."""
        scores = torch.log(self.mu.square() + EPSILON) - self.log_variance
        return torch.where(self.active, scores, torch.inf)

    def keep(self, beta: float) -> torch.Tensor:
        """1 where an entry is kept and 0 elsewhere, with the gradient of `sigmoid(beta * score)`. `[size]`."""
        scores = self.scores()
        soft = torch.sigmoid(beta * scores)
        return (scores > 0).to(soft.dtype) + (soft - soft.detach())

    def kl(self, weights: torch.Tensor) -> torch.Tensor:
        """KL divergence to the prior with the best variance, `0.5 * sum_j w_j log(1 + mu_j^2 / sigma_j^2)`.

        The prior is `N(0, mu^2 + sigma^2)`, the zero-mean Gaussian for which the divergence is least.

        Args:
            weights: `[size]`.
        """
        return 0.5 * (weights * torch.log1p(self.mu.square() * torch.exp(-self.log_variance))).sum()

    def sigma(self) -> torch.Tensor:
        """Standard deviations, `[size]`; 0 where there is no mask."""
        return torch.where(self.active, torch.exp(0.5 * self.log_variance), 0.0)

    def counts(self, keep: torch.Tensor) -> Counts:
        """What a keep vector leaves of every sub-layer, differentiable.

        Args:
            keep: `[size]`, zeros and ones.
        """
        layout = self.layout
        gates = keep[layout.gates]
        kept_units = keep[layout.units] * gates[self._owners]
        zeros = torch.zeros(len(layout.sublayers), dtype=torch.float64, device=keep.device)
        units = zeros.index_add(0, self._owners, kept_units.double())
        on = zeros.scatter_reduce(0, self._owners, kept_units.double(), "amax", include_self=False)
        return Counts(keep[: layout.hidden].double().sum(), units, on, kept_units)

    def kept_shares(self, counts: Counts) -> dict[str, torch.Tensor]:
        """The shares that are left, between 0 and 1: of `heads` (groups that share a key), of `ffn` dims, of
        `sublayers`, and of the dims of the residual stream where these have masks, as `hidden`.

        Args:
            counts: What [`counts`] gave.
        """
        layout, shares = self.layout, {}
        for name, is_ffn in (("heads", False), ("ffn", True)):
            chosen = [index for index, part in enumerate(layout.sublayers) if (part.kind == FFN) == is_ffn]
            if chosen:
                shares[name] = counts.units[chosen].sum() / sum(layout.sublayers[index].units for index in chosen)
        shares["sublayers"] = counts.on.mean()
        if "hidden" in layout.kinds:
            shares["hidden"] = counts.hidden / layout.hidden
        return shares

    @torch.no_grad()
    def evaluation_values(self) -> torch.Tensor:
        """The means of what is kept and 0 for the rest, `[size]`."""
        return self.mu * (self.scores() > 0)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps the variances in their range."""
        self.log_variance.clamp_(*LOG_VARIANCE_RANGE)

    @torch.no_grad()
    def harden(self, values: torch.Tensor) -> None:
        """Sets the masks to given zeros and ones, for good."""
        self.mu.copy_(values)
        self.log_variance.fill_(INITIAL_LOG_VARIANCE)


@dataclass
class Counts:
    """Sizes as 64-bit floats, so that they stay whole numbers, with gradients.

    Attributes:
        hidden: Dims of the residual stream, a scalar.
        units: Units of every sub-layer, `[sub-layers]`.
        on: Whether a sub-layer is there, `[sub-layers]`.
        kept_units: Indicator of every unit, `[units]`.
    """

    hidden: torch.Tensor
    units: torch.Tensor
    on: torch.Tensor
    kept_units: torch.Tensor


def as_masks(layout: MaskLayout, values: torch.Tensor) -> Masks:
    """The masks of a model, for [`masking.masked`], [`masking.fold`] and [`surgery.select`].

    The mask of a whole sub-layer is a factor on all its units.

    Args:
        layout: The layout.
        values: `[size]`.
    """
    stacks = {name: [LayerMasks() for _ in range(depth)] for name, depth in layout.depths.items()}
    for part in layout.sublayers:
        setattr(stacks[part.stack][part.layer], part.kind, values[part.start : part.stop] * values[part.gate])
    return Masks(values[: layout.hidden] if "hidden" in layout.kinds else None, stacks)
