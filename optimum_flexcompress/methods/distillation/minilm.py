"""MiniLM, versions 1 (arXiv 2002.10957) and 2 (arXiv 2012.15828)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ...architectures import AttentionView, ModelView, StackView, describe
from ...configuration import MiniLMConfig
from ...errors import FlexCompressError
from ..base import FULL_PASS, CompressionMethod, LossTerm, Needs, PrepareContext, Step
from ..teacher import require_teacher, unwrap_peft
from .hidden_states import attention_loss, check_same_length, stack_outputs, valid_positions
from .logits import batch_size
from .relations import relation_loss


logger = logging.getLogger(__name__)

RELATION_HEADS = (64, 48, 32, 24, 16, 12, 8, 4)
"""Tried in this order when the config names no number."""

_PARTS = {"query": "q", "key": "k", "value": "v"}


def choose_relation_heads(widths: list[int], wanted: int | None = None) -> int:
    """How many relation heads the vectors are split into.

    Args:
        widths: Query and key widths of student and teacher.
        wanted: What the config says.

    Raises:
        FlexCompressError: The wanted number does not divide every width, or no known one does.
    """
    fitting = [heads for heads in RELATION_HEADS if all(width % heads == 0 for width in widths)]
    sizes = ", ".join(str(width) for width in sorted(set(widths)))
    if wanted is None:
        if not fitting:
            raise FlexCompressError(
                f"No default number of relation heads divides the widths {sizes} of queries and keys: set "
                "minilm.relation_heads to a common divisor, or give the student another width."
            )
        return fitting[0]
    if any(width % wanted for width in widths):
        others = f" such as {', '.join(map(str, fitting))}" if fitting else ""
        raise FlexCompressError(
            f"{wanted} relation heads do not divide the widths {sizes} of queries and keys: choose a common "
            f"divisor{others}, or leave relation_heads out."
        )
    return wanted


class MiniLMMethod(CompressionMethod):
    """Terms `minilm_<relation>`, each the mean over the stacks of the models; see [`MiniLMConfig`]."""

    config: MiniLMConfig

    def validate(self, context: PrepareContext) -> None:
        teacher = require_teacher(context.teacher, self.config.method_type)
        student, teacher = (describe(unwrap_peft(model)) for model in (context.model, teacher))
        if student.stacks.keys() != teacher.stacks.keys():
            raise FlexCompressError(
                f"The student has the stacks {', '.join(student.stacks)}, the teacher {', '.join(teacher.stacks)}: "
                "MiniLM needs models of the same kind."
            )
        self._match(student, teacher)
        self._advise_assistant(student, teacher)

    @property
    def compares_tokens(self) -> bool:
        return True

    def prepare(self, context: PrepareContext) -> None:
        student, teacher = (describe(unwrap_peft(model)) for model in (context.model, context.teacher))
        self._single = len(student.stacks) == 1
        self._causal = {name: stack.is_causal for name, stack in student.stacks.items()}
        self._matched = self._match(student, teacher)
        self._relations = [name for name, weight in self.config.relation_weights.items() if weight]
        self.needs = Needs(teacher=True, attentions="attention" in self._relations)
        for stack, (own, other, _) in self._matched.items():
            for relation in self._relations:
                if relation in _PARTS:
                    key = (self.config.method_type, stack, relation)
                    self.needs.student_projections[key] = getattr(own, _PARTS[relation])
                    self.needs.teacher_projections[key] = getattr(other, _PARTS[relation])
            if self.needs.attentions:
                self.needs.undropped_attentions.append(own.module)
        self._teacher_layers = {name: self._teacher_layer(stack) for name, stack in teacher.stacks.items()}

    def _teacher_layer(self, stack: StackView) -> int:
        """Index of the teacher's layer in a stack.

        Raises:
            FlexCompressError: There is no such layer.
        """
        wanted, count = self.config.teacher_layer, len(stack.layers)
        index = wanted - 1 if wanted > 0 else count + wanted
        if not 0 <= index < count:
            raise FlexCompressError(
                f"minilm.teacher_layer is {wanted}, but the teacher's {stack.name} has {count} layers: give 1 to "
                f"{count}, or -1 to -{count}."
            )
        return index

    def _match(self, student: ModelView, teacher: ModelView) -> dict[str, tuple[AttentionView, AttentionView, int]]:
        """By stack the attention of the student's last layer, that of the teacher's layer, and the relation heads."""
        matched = {}
        for name, stack in student.stacks.items():
            other = teacher.stacks[name]
            layers = (stack.layers[-1], other.layers[self._teacher_layer(other)])
            for who, layer in zip(("student", "teacher"), layers):
                if layer.attention is None:
                    raise FlexCompressError(
                        f"Layer {layer.index + 1} of the {who}'s {name} has no attention any more: choose another "
                        "teacher_layer, or a student whose last layer kept its attention."
                    )
            ours, theirs = (layer.attention for layer in layers)
            if self.config.version == 1:
                heads = (ours.num_heads, ours.num_kv_heads)
                if heads != (theirs.num_heads, theirs.num_kv_heads):
                    raise FlexCompressError(
                        f"MiniLM version 1 needs equal head counts, but the last layer of the student's {name} has "
                        f"{ours.num_heads} heads ({ours.num_kv_heads} for values) and the teacher's layer "
                        f"{theirs.num_heads} ({theirs.num_kv_heads}): use version=2, or a student with as many heads."
                    )
                matched[name] = (ours, theirs, ours.num_kv_heads)
            else:
                widths = [part.size for view in (ours, theirs) for part in (view.q, view.k, view.v)]
                matched[name] = (ours, theirs, choose_relation_heads(widths, self.config.relation_heads))
        return matched

    def _advise_assistant(self, student: ModelView, teacher: ModelView) -> None:
        """Warns where the gap is one for which the papers put a teacher assistant in between."""
        narrow = 2 * student.hidden_size <= teacher.hidden_size
        shallow = all(
            2 * len(student.stacks[name].layers) <= len(stack.layers) for name, stack in teacher.stacks.items()
        )
        if narrow and shallow:
            layers = {name: len(stack.layers) for name, stack in student.stacks.items()}
            logger.warning(
                "The student has at most half the layers and half the width of its teacher. MiniLM then does better "
                "with a teacher assistant: first distil a model with the student's layers (%s) and the teacher's "
                "width, make_student(teacher, layers=%s), and pass that one as teacher_model here.",
                ", ".join(f"{name} {count}" for name, count in layers.items()),
                layers,
            )

    def task_loss_weight(self, step: Step) -> float:
        return self.config.task_loss_weight if step.pass_name == FULL_PASS else 1.0

    def count_items(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        samples = torch.tensor(batch_size(batch))
        return {f"minilm_{relation}": samples for relation in self._relations}

    def loss_terms(self, step: Step) -> dict[str, LossTerm]:
        if step.pass_name != FULL_PASS:
            return {}
        terms = {}
        for relation in self._relations:
            value = sum(self._relation(step, stack, relation) for stack in self._matched) / len(self._matched)
            terms[f"minilm_{relation}"] = LossTerm(value, self.config.relation_weights[relation])
        return terms

    def _relation(self, step: Step, stack: str, relation: str) -> torch.Tensor:
        valid = valid_positions(step.inputs, stack, self._single)
        if relation == "attention":
            student, teacher = (
                stack_outputs(outputs, "attentions", stack, self._single)
                for outputs in (step.outputs, step.teacher_outputs)
            )
            return attention_loss(student[-1], teacher[self._teacher_layers[stack]], valid)
        key = (self.config.method_type, stack, relation)
        student, teacher = step.captured[key], step.teacher_captured[key]
        check_same_length(student, teacher)
        return relation_loss(student, teacher, self._matched[stack][2], valid, self._causal[stack])
