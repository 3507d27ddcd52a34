"""Distillation of logits, by the kind of head."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from ...errors import FlexCompressError


class Head(enum.Enum):
    """What the logits of a head range over."""

    SEQUENCE = "sequence"
    QUESTION_ANSWERING = "question answering"
    TOKEN = "token classification"
    LM = "language modeling"
    CAUSAL_LM = "causal language modeling"

    @property
    def has_labels(self) -> bool:
        """Whether the logits range over the labels of the config."""
        return self in (Head.SEQUENCE, Head.TOKEN)


# Sequence-to-sequence comes before causal: a family may list the same class under both.
_CLASS_NAMES: tuple[tuple[Head, tuple[Mapping[str, Any], ...]], ...] = (
    (
        Head.SEQUENCE,
        (
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        ),
    ),
    (Head.QUESTION_ANSWERING, (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,)),
    (Head.TOKEN, (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,)),
    (Head.LM, (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)),
    (Head.CAUSAL_LM, (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,)),
)


def _names(mapping: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    for value in mapping.values():
        names.update([value] if isinstance(value, str) else value)
    return names


def head_of(model: PreTrainedModel) -> Head:
    """The kind of head, from the Auto classes that list the model's class or one that it derives from.

    Raises:
        FlexCompressError: The model has no head with logits to compare.
    """
    classes = {base.__name__ for base in type(model).__mro__}
    for head, mappings in _CLASS_NAMES:
        if any(classes & _names(mapping) for mapping in mappings):
            return head
    raise FlexCompressError(
        f"{type(model).__name__} has no head whose logits can be distilled: set logits_weight=0 and distil hidden "
        "states or MiniLM relations, or load both models with a head."
    )


def token_mask(head: Head, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Which positions of a token-level head are compared.

    Args:
        head: `Head.TOKEN`, `Head.LM` or `Head.CAUSAL_LM`.
        inputs: The batch.

    Returns:
        Booleans `[batch, length]`: where there is a label (-100 means none), for a causal model where the *next*
        position has one; without labels, where there is no padding. `None` where the batch has neither.
    """
    labels = inputs.get("labels")
    if labels is not None:
        mask = labels.ne(-100)
    else:
        mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
        if mask is None:
            return None
        mask = mask.bool()
    if head is Head.CAUSAL_LM:
        mask = F.pad(mask[:, 1:], (0, 1), value=False)
    return mask


def count_items(head: Head, batch: Mapping[str, Any]) -> torch.Tensor:
    """How many items [`logits_loss`] sums over in a batch; reads the inputs alone."""
    if head in (Head.TOKEN, Head.LM, Head.CAUSAL_LM):
        mask = token_mask(head, batch)
        if mask is not None:
            return mask.sum()
        ids = batch.get("decoder_input_ids", batch.get("input_ids"))
        return torch.tensor(ids.shape[0] * (ids.shape[1] - (head is Head.CAUSAL_LM)))
    return torch.tensor(batch_size(batch))


def batch_size(batch: Mapping[str, Any]) -> int:
    """Samples in a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim() > 0)


def soft_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, reverse: bool = False
) -> torch.Tensor:
    """`temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature))`, summed over rows.

    Args:
        student: Logits, `[rows, classes]`.
        teacher: Logits, `[rows, classes]`.
        temperature: Softens both.
        reverse: The other direction, `KL(student || teacher)`.
    """
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    if reverse:
        student, teacher = teacher, student
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def logits_loss(
    head: Head,
    student: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Any],
    problem_type: str | None,
    temperature: float,
    reverse: bool = False,
) -> torch.Tensor:
    """The logits term of design section 6.1, summed over the items of the batch.

    Args:
        head: The kind of head.
        student: The student's outputs.
        teacher: The teacher's outputs.
        inputs: The batch, labels included.
        problem_type: `single_label_classification`, `multi_label_classification` or `regression`, for sequence heads.
        temperature: Softens both distributions.
        reverse: Has the KL divergences run from the student to the teacher.

    Raises:
        FlexCompressError: The two models returned logits of different shapes.
    """
    if head is Head.QUESTION_ANSWERING:
        valid = inputs.get("attention_mask")
        terms = []
        for name in ("start_logits", "end_logits"):
            logits = _same_shape(student[name], teacher[name])
            if valid is not None:
                # Not -inf: 0 * inf would be NaN.
                logits = [value.float().masked_fill(valid == 0, -1e9) for value in logits]
            terms.append(soft_cross_entropy(*logits, temperature, reverse))
        return (terms[0] + terms[1]) / 2
    student_logits, teacher_logits = _same_shape(student["logits"], teacher["logits"])
    if head is Head.SEQUENCE:
        if problem_type == "regression":
            return F.mse_loss(student_logits.float(), teacher_logits.float(), reduction="none").mean(-1).sum()
        if problem_type == "multi_label_classification":
            target = torch.sigmoid(teacher_logits.float())
            loss = F.binary_cross_entropy_with_logits(student_logits.float(), target, reduction="none")
            return loss.mean(-1).sum()
        return soft_cross_entropy(student_logits, teacher_logits, temperature, reverse)
    mask = token_mask(head, inputs)
    if mask is None:
        if head is Head.CAUSAL_LM:
            student_logits, teacher_logits = student_logits[:, :-1], teacher_logits[:, :-1]
        return soft_cross_entropy(student_logits.flatten(0, -2), teacher_logits.flatten(0, -2), temperature, reverse)
    # Selecting first: of a masked-LM batch some 15 % of the positions have a label, and rows are a vocabulary wide.
    return soft_cross_entropy(student_logits[mask], teacher_logits[mask], temperature, reverse)


def problem_type_of(model: PreTrainedModel, labels: torch.Tensor | None) -> str:
    """The problem type of a sequence head, by the rules that Transformers follows."""
    if model.config.problem_type is not None:
        return model.config.problem_type
    if model.config.num_labels == 1:
        return "regression"
    if labels is not None and labels.is_floating_point():
        return "multi_label_classification"
    return "single_label_classification"


def _same_shape(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if student.shape != teacher.shape:
        raise FlexCompressError(
            f"The student's logits have shape {list(student.shape)}, the teacher's {list(teacher.shape)}: use two "
            "models with the same labels, vocabulary and input size."
        )
    return student, teacher
