"""The distillation method: logits, hidden states, attention maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...architectures import describe
from ...configuration import DistillationConfig
from ...errors import FlexCompressError
from ..base import (
    EXISTING_LAYERS,
    FULL_PASS,
    CompressionMethod,
    LossTerm,
    Needs,
    ParameterGroup,
    PrepareContext,
    Step,
)
from ..teacher import check_labels, require_teacher, unwrap_peft
from .hidden_states import attention_loss, hidden_state_loss, stack_outputs, valid_positions
from .layer_map import layer_pairs
from .logits import batch_size, count_items, head_of, logits_loss, problem_type_of
from .ordered import identity_projection, ordered_loss, spread_layers


class DistillationMethod(CompressionMethod):
    """Terms `logits`, `hidden_states` and `attention`; see [`DistillationConfig`]."""

    config: DistillationConfig

    def validate(self, context: PrepareContext) -> None:
        require_teacher(context.teacher, self.config.method_type)
        if self.config.logits_weight:
            student, teacher = unwrap_peft(context.model), unwrap_peft(context.teacher)
            heads = [head_of(model) for model in (student, teacher)]
            if heads[0] is not heads[1]:
                raise FlexCompressError(
                    f"The student has a {heads[0].value} head and the teacher a {heads[1].value} head: load both "
                    "with the same Auto class, or set logits_weight=0."
                )
            if heads[0].has_labels:
                check_labels(student, teacher)
        if self._maps_layers:
            self._map_layers(context)

    def prepare(self, context: PrepareContext) -> None:
        config = self.config
        self.needs = Needs(
            teacher=True,
            teacher_logits=bool(config.logits_weight),
            hidden_states=bool(config.hidden_states_weight),
            attentions=bool(config.attention_weight),
        )
        if config.logits_weight:
            self._head = head_of(unwrap_peft(context.model))
        if not self._maps_layers:
            return
        student, teacher = self._map_layers(context)
        self._single = len(student.stacks) == 1
        if config.attention_weight:
            for name, pairs in self._pairs.items():
                layers = student.stacks[name].layers
                self.needs.undropped_attentions += [
                    layers[index - 1].attention.module
                    for index, _ in pairs
                    if index and layers[index - 1].attention is not None
                ]
        sizes = (student.hidden_size, teacher.hidden_size)
        if self._ordered:
            for name in self._teacher_layers:
                self.modules[f"{name}_ordered"] = identity_projection(*sizes)
        elif config.hidden_states_weight and sizes[0] != sizes[1]:
            for name, pairs in self._pairs.items():
                for index, other in pairs:
                    self.modules[f"{name}_{index}_{other}"] = nn.Linear(*sizes, bias=False)

    @property
    def compares_tokens(self) -> bool:
        return self._maps_layers

    @property
    def _maps_layers(self) -> bool:
        return bool(self.config.hidden_states_weight or self.config.attention_weight)

    @property
    def _ordered(self) -> bool:
        return self.config.layer_map == "ordered"

    def _map_layers(self, context: PrepareContext):
        views = [describe(unwrap_peft(model)) for model in (context.model, context.teacher)]
        counts = [{name: len(stack.layers) for name, stack in view.stacks.items()} for view in views]
        # Pairs that are matched anew in every step are not known here, only which stacks there are.
        self._pairs = layer_pairs("uniform" if self._ordered else self.config.layer_map, *counts)
        self._teacher_layers = {name: spread_layers(count) for name, count in counts[1].items()}
        if self.config.attention_weight:
            for name, pairs in self._pairs.items():
                for pair in pairs:
                    self._check_heads([view.stacks[name].layers for view in views], name, pair)
            if not any(pair[0] and pair[1] for pairs in self._pairs.values() for pair in pairs):
                raise FlexCompressError(
                    "layer_map has embeddings only, which have no attention map: add a pair of layers, or set "
                    "attention_weight=0."
                )
        return views

    def _check_heads(self, layers: list, name: str, pair: list[int]) -> None:
        if not (pair[0] and pair[1]):
            return
        attentions = [stack[index - 1].attention for stack, index in zip(layers, pair, strict=True)]
        if any(attention is None for attention in attentions):
            raise FlexCompressError(
                f"layer_map pairs {name} layers {pair}, of which one has no attention any more: give a layer_map "
                "without it, or set attention_weight=0."
            )
        if attentions[0].num_heads != attentions[1].num_heads:
            raise FlexCompressError(
                f"{name} layers {pair} have {attentions[0].num_heads} and {attentions[1].num_heads} heads: attention "
                "maps need equal head counts; set attention_weight=0, or use MiniLM version 2, which does not."
            )

    def parameter_groups(self) -> list[ParameterGroup]:
        if not len(self.modules):
            return []
        parameters = list(self.modules.parameters())
        return [ParameterGroup("projections", parameters, learning_rate=self.config.projection_learning_rate)]

    def task_loss_weight(self, step: Step) -> float:
        return self.config.task_loss_weight if step.pass_name == FULL_PASS else 1.0

    def count_items(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        counts = {}
        if self.config.logits_weight:
            counts["logits"] = count_items(self._head, batch)
        if self.config.hidden_states_weight:
            for name in self._pairs:
                valid = valid_positions(batch, name, self._single)
                counts[self._hidden_name(name)] = torch.tensor(batch_size(batch)) if valid is None else valid.sum()
        if self.config.attention_weight:
            counts["attention"] = torch.tensor(batch_size(batch))
        return counts

    def _hidden_name(self, stack: str) -> str:
        return "hidden_states" if self._single else f"hidden_states_{stack}"

    def loss_terms(self, step: Step) -> dict[str, LossTerm]:
        if step.pass_name != FULL_PASS:
            return {}
        config = self.config
        terms = {}
        if config.logits_weight:
            kind = problem_type_of(unwrap_peft(step.model), step.inputs.get("labels"))
            value = logits_loss(self._head, step.outputs, step.teacher_outputs, step.inputs, kind, config.temperature)
            terms["logits"] = LossTerm(value, config.logits_weight)
        if config.hidden_states_weight:
            # A term per stack: the two stacks have different numbers of valid positions to average over.
            for name in self._pairs:
                terms[self._hidden_name(name)] = LossTerm(self._hidden_states(step, name), config.hidden_states_weight)
        if config.attention_weight:
            terms["attention"] = LossTerm(self._attention(step), config.attention_weight)
        return terms

    def _hidden_states(self, step: Step, name: str) -> torch.Tensor:
        pairs = self._pairs[name]
        valid = valid_positions(step.inputs, name, self._single)
        student, teacher = (
            stack_outputs(outputs, "hidden_states", name, self._single)
            for outputs in (step.outputs, step.teacher_outputs)
        )
        if self._ordered:
            existing = step.shared[EXISTING_LAYERS]()[name] if EXISTING_LAYERS in step.shared else None
            wanted = [teacher[layer] for layer in self._teacher_layers[name]]
            return ordered_loss(student[1:], wanted, valid, self.modules[f"{name}_ordered"], existing)
        total = 0.0
        for index, other in pairs:
            hidden = student[index]
            key = f"{name}_{index}_{other}"
            if key in self.modules:
                hidden = self.modules[key](hidden.float())
            total = total + hidden_state_loss(hidden, teacher[other], valid)
        return total / len(pairs)

    def _attention(self, step: Step) -> torch.Tensor:
        total, count = 0.0, 0
        for name, pairs in self._pairs.items():
            valid = valid_positions(step.inputs, name, self._single)
            student, teacher = (
                stack_outputs(outputs, "attentions", name, self._single)
                for outputs in (step.outputs, step.teacher_outputs)
            )
            for index, other in pairs:
                if index and other:
                    total = total + attention_loss(student[index - 1], teacher[other - 1], valid)
                    count += 1
        return total / count
