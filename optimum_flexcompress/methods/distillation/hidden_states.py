"""Distillation of hidden states and attention maps of mapped layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import FlexCompressError


def stack_outputs(outputs: Mapping[str, Any], kind: str, stack: str, single: bool) -> tuple[torch.Tensor, ...]:
    """Per-layer outputs of a stack.

    Args:
        outputs: A model's outputs.
        kind: `hidden_states` or `attentions`.
        stack: `encoder` or `decoder`.
        single: Whether the model has this stack only; then its outputs have no prefix.

    Raises:
        FlexCompressError: The model did not return them.
    """
    name = kind if single else f"{stack}_{kind}"
    values = outputs.get(name)
    if values is None or any(value is None for value in values):
        raise FlexCompressError(
            f"The model returned no {name}: set {'attention' if kind == 'attentions' else 'hidden_states'}_weight=0 "
            "for this model, or use MiniLM relations, which need no such outputs."
        )
    return values


def valid_positions(inputs: Mapping[str, Any], stack: str, single: bool) -> torch.Tensor | None:
    """Which positions of a stack are not padding.

    Args:
        inputs: The batch, labels included.
        stack: `encoder` or `decoder`.
        single: Whether the model has this stack only.

    Returns:
        Booleans `[batch, length]`, or `None` where all positions are valid (images, unpadded text). The decoder of an
        encoder-decoder model without a mask of its own is valid where there is a label.

    Raises:
        FlexCompressError: The mask is not `[batch, length]`.
    """
    if single or stack == "encoder":
        mask = inputs.get("attention_mask")
    else:
        mask = inputs.get("decoder_attention_mask")
        if mask is None and inputs.get("labels") is not None and inputs["labels"].dim() == 2:
            mask = inputs["labels"].ne(-100)
    if mask is not None and mask.dim() != 2:
        raise FlexCompressError(
            f"The attention mask has {mask.dim()} dimensions: distillation of layers needs one of shape [batch, "
            "length] (packed sequences are not supported)."
        )
    return None if mask is None else mask.bool()


def check_same_length(student: torch.Tensor, teacher: torch.Tensor, dim: int = 1) -> None:
    """Raises [`FlexCompressError`] where teacher and student see the input at different lengths."""
    if student.shape[dim] != teacher.shape[dim]:
        raise FlexCompressError(
            f"The student sees {student.shape[dim]} positions and the teacher {teacher.shape[dim]}: use models with "
            "the same patch or image size, or distil logits only."
        )


def hidden_state_loss(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Squared error, averaged over dims, summed over valid positions.

    Args:
        student: `[batch, length, size]`.
        teacher: `[batch, length, size]`.
        valid: Booleans `[batch, length]`; where `None` the error is averaged over positions and summed over samples.
    """
    check_same_length(student, teacher)
    error = (student.float() - teacher.float()).square().mean(-1)
    return error.mean(-1).sum() if valid is None else (error * valid).sum()


def attention_loss(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """`KL(teacher || student)` between attention maps, averaged over heads and valid queries, summed over samples.

    Args:
        student: Attention probabilities, `[batch, heads, length, length]`.
        teacher: The same of the teacher.
        valid: Booleans `[batch, length]`, or `None`.

    Raises:
        FlexCompressError: The head counts differ.
    """
    if student.shape[1] != teacher.shape[1]:
        raise FlexCompressError(
            f"The student has {student.shape[1]} heads and the teacher {teacher.shape[1]} in mapped layers: attention "
            "maps need equal head counts; set attention_weight=0, or use MiniLM version 2, which does not."
        )
    check_same_length(student, teacher, dim=2)
    tiny = torch.finfo(torch.float32).tiny
    student, teacher = student.float().clamp_min(tiny), teacher.float()
    rows = (torch.xlogy(teacher, teacher) - teacher * student.log()).sum(-1).mean(1)
    if valid is None:
        return rows.mean(-1).sum()
    return ((rows * valid).sum(-1) / valid.sum(-1).clamp_min(1)).sum()
