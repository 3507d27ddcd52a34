"""What a model costs in time, read off a table of latencies, in nanoseconds."""

from __future__ import annotations

import numpy as np
import torch

from .cost import Cost
from .latency import LatencyTable
from .layout import MaskLayout
from .masks import Counts


PER_MILLISECOND = 1_000_000


class LatencyCost(Cost):
    """Times between those of a table by linear interpolation, beyond its ends those at the ends.

    A sub-layer that is there costs at least what the smallest one in the table does.

    Args:
        layout: The masks.
        table: The table.
    """

    def __init__(self, layout: MaskLayout, table: LatencyTable):
        super().__init__(layout)
        self.table = table
        self.kinds = list(table.sizes)
        self.groups = np.array([self.kinds.index(f"{part.stack}.{part.kind}") for part in layout.sublayers])
        self.finish()

    def outside(self, hidden: int) -> int:
        return round(PER_MILLISECOND * float(np.interp(hidden, self.table.widths, self.table.rest)))

    def sublayers(self, index: np.ndarray | int, units: np.ndarray | int, hidden: int) -> np.ndarray:
        groups, units = np.broadcast_arrays(self.groups[index], units)
        total = np.zeros(units.shape)
        for number, name in enumerate(self.kinds):
            row = [np.interp(hidden, self.table.widths, column) for column in zip(*self.table.times[name])]
            here = groups == number
            total[here] = np.interp(units[here], self.table.sizes[name], row)
        return np.where(units > 0, np.rint(PER_MILLISECOND * total), 0).astype(np.int64)

    def differentiable(self) -> DifferentiableLatency:
        return DifferentiableLatency(self)


class DifferentiableLatency(torch.nn.Module):
    """A [`LatencyCost`] of counts with gradients, which are the slopes between the sizes of the table."""

    def __init__(self, cost: LatencyCost):
        super().__init__()
        table = cost.table
        self._kinds = cost.kinds
        self._add("widths", table.widths)
        self._add("rest", table.rest)
        for number, name in enumerate(cost.kinds):
            self._add(f"sizes_{number}", table.sizes[name])
            self._add(f"times_{number}", table.times[name])
            self.register_buffer(f"index_{number}", torch.tensor(np.flatnonzero(cost.groups == number)), False)

    def _add(self, name: str, values: list) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)

    def forward(self, counts: Counts) -> torch.Tensor:
        """The cost, a 64-bit scalar."""
        hidden = counts.hidden[None]
        total = _interpolate(hidden, self.widths, self.rest[:, None]).sum()
        for number in range(len(self._kinds)):
            index = getattr(self, f"index_{number}")
            row = _interpolate(hidden, self.widths, getattr(self, f"times_{number}"))[0]
            times = _interpolate(counts.units[index], getattr(self, f"sizes_{number}"), row[:, None])[:, 0]
            # Being there costs the least time, and units beyond the fewest of the table the rest.
            total = total + (counts.on[index] * row[0] + times - row[0]).sum()
        return PER_MILLISECOND * total


def _interpolate(at: torch.Tensor, points: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Rows of `values` (`[points, n]`) between those at ascending `points`, for every entry of `at`: `[entries, n]`."""
    if len(points) == 1:
        return values.expand(len(at), -1)
    right = torch.searchsorted(points, at.detach()).clamp(1, len(points) - 1)
    share = (at - points[right - 1]) / (points[right] - points[right - 1])
    share = share.clamp(0.0, 1.0)[:, None]
    return values[right - 1] * (1 - share) + values[right] * share
