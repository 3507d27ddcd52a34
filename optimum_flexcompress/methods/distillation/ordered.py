"""Layer matching that follows the student while it loses layers (CoFi, arXiv 2204.00408, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .hidden_states import check_same_length, hidden_state_loss


TEACHER_LAYERS = 4
"""How many layers of a teacher are matched; fewer where it has fewer."""


def spread_layers(count: int) -> list[int]:
    """The layers of a teacher of `count` layers that a student learns from, evenly spaced; the last is among them."""
    matched = min(TEACHER_LAYERS, count)
    return [math.ceil(count * (i + 1) / matched) for i in range(matched)]


def identity_projection(student_size: int, teacher_size: int) -> nn.Linear:
    """A projection that starts as the identity where the sizes agree.

    It is there also where they do: a student of which dims are masked gives back in the others what they held.
    """
    projection = nn.Linear(student_size, teacher_size, bias=False)
    if student_size == teacher_size:
        with torch.no_grad():
            nn.init.eye_(projection.weight)
    return projection


@torch.no_grad()
def match_layers(distances: torch.Tensor, existing: torch.Tensor | None) -> torch.Tensor:
    """Matches each teacher layer with the nearest student layer, from the last one down and in order.

    A student layer below the one that the next teacher layer has got, and that still exists. Where there is none
    left, the layers below share the last one that was found.

    Args:
        distances: `[teacher layers, student layers]`, ascending layers.
        existing: Booleans `[student layers]`, or `None` if all exist.

    Returns:
        The index of a student layer for every teacher layer, on the device, without waiting for it.
    """
    positions = torch.arange(distances.shape[1], device=distances.device)
    last = torch.full((), distances.shape[1], device=distances.device)
    found = []
    for row in reversed(distances.unbind()):
        allowed = positions < last
        if existing is not None:
            allowed = allowed & existing
        nearest = torch.where(allowed, row, torch.inf).argmin()
        last = torch.where(allowed.any(), nearest, last)
        found.append(last)
    return torch.stack(found[::-1]).clamp_max(distances.shape[1] - 1)


def ordered_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    valid: torch.Tensor | None,
    projection: nn.Linear,
    existing: torch.Tensor | None,
) -> torch.Tensor:
    """The mean over matched layers of [`hidden_state_loss`].

    Args:
        student: Outputs of all layers, `[batch, length, size]` each.
        teacher: Outputs of the layers that are matched, ascending.
        valid: Booleans `[batch, length]`, or `None`.
        projection: From the student's size to the teacher's.
        existing: Booleans `[student layers]`, or `None`.
    """
    check_same_length(student[0], teacher[0])
    # Distances in one product: |s|^2 - 2 <s, t> (+ |t|^2, which is the same for all layers of the student).
    states = torch.stack([states.float() for states in student])
    with torch.no_grad():
        projected = projection(states)
        if valid is not None:
            projected = projected * valid[None, ..., None]
        flat = projected.flatten(1)
        wanted = torch.stack([states.float() for states in teacher]).flatten(1)
        distances = flat.square().sum(-1) - 2 * wanted @ flat.T
    chosen = projection(states.index_select(0, match_layers(distances, existing)))
    return sum(hidden_state_loss(*pair, valid) for pair in zip(chosen, teacher)) / len(teacher)
