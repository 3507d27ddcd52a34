"""Modular training as a method of the trainer."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_labels

from ...configuration import DistillationConfig
from ...errors import FlexCompressError
from ...modular_config import ModularConfig
from ..base import FULL_PASS, CompressionMethod, LossTerm, Needs, ParameterGroup, PrepareContext, Step
from ..distillation.hidden_states import attention_loss, valid_positions
from ..distillation.logits import batch_size, count_items, head_of, logits_loss, problem_type_of
from ..means import Means
from ..teacher import Teacher, unwrap_peft
from .assembly import Assembly, Piece
from .curriculum import draw_route
from .model import ModularModel
from .modules import (
    describe_whole,
    follow,
    generates_with_deeper_decoder,
    module_name,
    pieces_of,
    template_of,
    usable_granularities,
)
from .observer import Observation, Observer
from .routing import Router
from .strategies import SIZE_FIRST, choose, reachable_counts


_TARGETS, _LOGITS = "modular.targets", "modular.logits"


class ModularMethod(CompressionMethod):
    """Terms `modular_logits`, `modular_hidden_states_<stack>`, `modular_attention_<stack>`,
    `modular_cross_attention` and `modular_blocks_<stack>`; see [`ModularConfig`].

    A step runs the original layers first, without gradients, and then a route through layers and modules, which is
    drawn from the seed and the optimizer step: it is the same on all processes and for all batches of a step. Last,
    each module runs by itself on what the first layer of its block was given.
    Logs, as means over the routes since the last log: `modular_layers`, the layers and modules that run;
    `modular_granularity`, how many layers a module of the route stands for; `modular_rate`, the replacing rate, which is
    1 in steps that run an assembly of `ratios`.
    Evaluations run `evaluated_ratio`; what is saved, and what the trainer's model is, is the full model.
    """

    config: ModularConfig

    # Before training

    def validate(self, context: PrepareContext) -> None:
        model = context.model
        if unwrap_peft(model) is not model:
            raise FlexCompressError(
                "Modules are copies of whole layers, which adapters sit on: merge them first "
                "(model.merge_and_unload())."
            )
        view = describe_whole(model)
        granularities = usable_granularities(view, self.config)
        depths = {name: len(stack.layers) for name, stack in view.stacks.items()}
        deeper_decoder = generates_with_deeper_decoder(view)
        reachable = reachable_counts(depths, granularities, deeper_decoder)
        # The full model alone: a training in full, and nothing to assemble at its end.
        if len(reachable) == 1:
            depth, family = depths["decoder"], view.family
            raise FlexCompressError(
                f"A {family} model cannot generate with a decoder deeper than its encoder, so modules for the encoder "
                f"alone give no model: give the decoder modules too (granularities that divide {depth})."
                if "decoder" not in granularities
                else f"A {family} model cannot generate with a decoder deeper than its encoder, and these modules give "
                f"no other model: give the decoder modules that stand for more of its {depth} layers."
            )
        for ratio in self.config.ratios or ():
            chosen = choose(self.config.ratios_strategy, ratio, depths, granularities, deeper_decoder=deeper_decoder)
            if chosen.ratio == 1:
                total = sum(depths.values())
                least = total / max(layers for layers in map(sum, reachable) if layers < total)
                raise FlexCompressError(
                    f"A ratio of {ratio:g} in modular.ratios is the full model itself: give at least {least:.4g}."
                )
        if self.config.evaluated_ratio is not None:
            choose(SIZE_FIRST, self.config.evaluated_ratio, depths, granularities, deeper_decoder=deeper_decoder)
        if self.config.logits_weight:
            head_of(model)
        others = [other for other in context.methods if other is not self.config]
        for other in others:
            layered = isinstance(other, DistillationConfig) and (other.hidden_states_weight or other.attention_weight)
            if layered or not isinstance(other, DistillationConfig):
                raise FlexCompressError(
                    f"Modular training runs other layers in each step, which {other.method_type} cannot follow: give "
                    "each a training of its own; only distillation of logits goes with it."
                )
        if context.teacher is not None and not others:
            raise FlexCompressError(
                "Modules learn from the original layers of the same model: leave teacher_model out, or add "
                "DistillationConfig() to learn from its logits too."
            )

    def prepare(self, context: PrepareContext) -> None:
        config = self.config
        self._modular = ModularModel(context.model, config)
        self._view = self._modular.view
        self._single = len(self._view.stacks) == 1
        self.modules = self._modular.modules
        maps = bool(config.attention_weight)
        self.needs = Needs(attentions=maps)
        if maps:
            self.needs.undropped_attentions = [
                module.get_submodule(table.module)
                for name in self._modular.granularities
                for table in self._attention_tables(name)
                for module in self._modules_of(name)
            ]
        if config.logits_weight:
            self._head = head_of(context.model)
        self._teacher = None
        if config.has_teacher:
            needs = Needs(teacher_logits=bool(config.logits_weight), attentions=maps)
            self._teacher = Teacher(context.model, needs, find_labels(type(context.model)))
        self._router = Router(self._view)
        self._observer = Observer()
        self._frozen: list[nn.Parameter] = []
        self._route: Assembly | None = None
        self._means = Means()
        modular = self._modular
        evaluated = (
            modular.smallest()
            if config.evaluated_ratio is None
            else modular.choose(SIZE_FIRST, config.evaluated_ratio)
        )
        self._evaluated = modular.layers(evaluated)
        self._wanted = modular.wanted()

    def _attention_tables(self, stack: str) -> list:
        table = self._view.stacks[stack].table
        return [part for part in (table.attention, table.cross_attention) if part is not None]

    def _modules_of(self, stack: str) -> list[nn.Module]:
        return [module for name, module in self.modules.items() if name.startswith(f"{stack}_")]

    def parameter_groups(self) -> list[ParameterGroup]:
        parameters = list(self.modules.parameters())
        return [
            ParameterGroup("weights", [p for p in parameters if p.dim() > 1], decays=True),
            ParameterGroup("scales_and_biases", [p for p in parameters if p.dim() <= 1]),
        ]

    def start(self, max_steps: int) -> None:
        self._means.take()

    def attach(self, model: PreTrainedModel) -> None:
        self._router.attach()
        self._router.route = self._evaluated
        if self.config.freeze_originals:
            self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def detach(self) -> None:
        self._router.detach()
        self._observer.stop()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    # In a step

    def route(self, step: Step) -> Assembly:
        """What a step runs."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{step.seed}/{step.global_step}/modular".encode()))
        progress = step.global_step / step.max_steps
        modular = self._modular
        route, rates = draw_route(
            self.config, modular.depths, modular.granularities, progress, generator, self._wanted
        )
        sizes = [piece.granularity for pieces in route.stacks.values() for piece in pieces if piece.is_module]
        figures = {"layers": route.layers, "granularity": sum(sizes) / len(sizes), "rate": max(rates.values())}
        self._means.add({f"modular_{name}": float(value) for name, value in figures.items()})
        return route

    def before_forward(self, step: Step) -> None:
        if step.pass_name != FULL_PASS:
            return
        self._route = self.route(step)
        if self._teacher is not None:
            self._run_teacher(step)
        self.modules.train(step.model.training)
        self._follow_checkpointing()
        layers = self._modular.layers(self._route)
        self._router.route = layers
        if self._matches_layers:
            self._observe({key: self.modules[module_name(*key)] for key in self._replaced()})

    @property
    def _matches_layers(self) -> bool:
        return bool(self.config.hidden_states_weight or self.config.attention_weight)

    def _all_modules(self, stack: str | None = None) -> list[tuple[str, Piece]]:
        """Every module, by the name of its stack and what it stands for."""
        return [
            (name, piece)
            for name, granularities in self._modular.granularities.items()
            for piece in pieces_of(self._modular.depths[name], granularities)
            if stack in (None, name)
        ]

    def _replaced(self, stack: str | None = None) -> list[tuple[str, Piece]]:
        """The modules of the step."""
        return [
            (name, piece)
            for name, pieces in self._route.stacks.items()
            for piece in pieces
            if piece.is_module and stack in (None, name)
        ]

    def _observe(self, layers: dict[tuple[str, Any], nn.Module]) -> None:
        tables = {name: stack.table for name, stack in self._view.stacks.items()}
        watched = {key: (tables[key[0]], layer) for key, layer in layers.items()}
        self._observer.start(watched, maps=bool(self.config.attention_weight))

    def _run_teacher(self, step: Step) -> None:
        """Runs the original layers, without dropout and gradients."""
        stacks = self._view.stacks
        self._router.route = {}
        places = {(name, piece.stop - 1) for name, piece in self._replaced()} if self._matches_layers else set()
        if self.config.blocks_weight:
            places |= {(name, place) for name, p in self._all_modules() for place in (p.start, p.stop - 1)}
        self._observe({(name, place): stacks[name].layers[place].module for name, place in places})
        training = step.model.training
        step.model.eval()
        try:
            self._teacher.run(step)
        finally:
            step.model.train(training)
        step.shared[_TARGETS] = self._observer.stop()
        step.shared[_LOGITS] = step.teacher_outputs

    def _follow_checkpointing(self) -> None:
        for name, piece in self._all_modules() if self.config.blocks_weight else self._replaced():
            original = self._view.stacks[name].layers[template_of(piece, self.config)].module
            follow(self.modules[module_name(name, piece)], original)

    def after_pass(self, step: Step) -> None:
        self._observer.stop()
        self._router.route = self._evaluated

    # Losses

    def task_loss_weight(self, step: Step) -> float:
        return self.config.task_loss_weight

    def count_items(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        config, counts = self.config, {}
        samples = torch.tensor(batch_size(batch))
        if config.logits_weight:
            counts["modular_logits"] = count_items(self._head, batch)
        for name in self._modular.granularities:
            if config.hidden_states_weight:
                valid = valid_positions(batch, name, self._single)
                counts[f"modular_hidden_states_{name}"] = samples if valid is None else valid.sum()
            if config.attention_weight:
                counts[f"modular_attention_{name}"] = samples
                if self._view.stacks[name].table.cross_attention is not None:
                    counts["modular_cross_attention"] = samples
            if config.blocks_weight:
                valid = valid_positions(batch, name, self._single)
                counts[f"modular_blocks_{name}"] = samples if valid is None else valid.sum()
        return counts

    def loss_terms(self, step: Step) -> dict[str, LossTerm]:
        if step.pass_name != FULL_PASS:
            return {}
        config, terms = self.config, {}
        if config.logits_weight:
            kind = problem_type_of(step.model, step.inputs.get("labels"))
            targets = step.shared[_LOGITS]
            value = logits_loss(self._head, step.outputs, targets, step.inputs, kind, config.temperature)
            terms["modular_logits"] = LossTerm(value, config.logits_weight)
        seen, targets = self._observer.stop(), step.shared.get(_TARGETS, {})
        for name in self._modular.granularities:
            valid = valid_positions(step.inputs, name, self._single)
            if config.blocks_weight:
                terms[f"modular_blocks_{name}"] = LossTerm(self._blocks(name, targets, valid), config.blocks_weight)
            if not self._matches_layers:
                continue
            pairs = [(seen[name, piece], targets[name, piece.stop - 1]) for _, piece in self._replaced(name)]
            if config.hidden_states_weight:
                value = _mean([relative_error(a.hidden, b.hidden, valid) for a, b in pairs], step)
                terms[f"modular_hidden_states_{name}"] = LossTerm(value, config.hidden_states_weight)
            if config.attention_weight:
                terms[f"modular_attention_{name}"] = self._maps_term("attention", pairs, valid, step)
                if self._view.stacks[name].table.cross_attention is not None:
                    terms["modular_cross_attention"] = self._maps_term("cross_attention", pairs, valid, step)
        return terms

    def _blocks(self, stack: str, targets: Mapping, valid: torch.Tensor | None) -> torch.Tensor:
        """The mean error of the modules of a stack, each fed with what its block is given in the original model."""
        place, errors = self._view.stacks[stack].table.hidden_output, []
        for name, piece in self._all_modules(stack):
            args, kwargs = targets[name, piece.start].arguments
            output = self.modules[module_name(name, piece)](*args, **kwargs)
            hidden = output[place] if isinstance(output, tuple) else output
            errors.append(relative_error(hidden, targets[name, piece.stop - 1].hidden, valid))
        return torch.stack(errors).mean()

    def _maps_term(
        self, kind: str, pairs: list[tuple[Observation, Observation]], valid: torch.Tensor | None, step: Step
    ) -> LossTerm:
        values = [attention_loss(getattr(a, kind), getattr(b, kind), valid) for a, b in pairs]
        return LossTerm(_mean(values, step), self.config.attention_weight)

    def log_values(self) -> dict[str, float]:
        return self._means.take()

    # Checkpoints and saved models

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See the base class."""
        found = {name.partition(".")[0] for name in state["modules"]}
        if found != set(self.modules):
            raise FlexCompressError(
                f"The checkpoint has modules of the granularities {_granularities(found)}, this run asks for "
                f"{_granularities(self.modules)}: resume with the same, or start anew."
            )
        super().load_state_dict(state)

    def save_beside(self, folder: str | os.PathLike) -> None:
        self._modular.save_modules(folder)

    def card_lines(self) -> list[str]:
        modular = self._modular
        lines = [
            f"- {name}: {modular.depths[name]} layers, granularities {', '.join(map(str, granularities))}"
            for name, granularities in modular.granularities.items()
        ]
        if modular.trained_for:
            lines.append(f"- {modular.trained_for}")
        return [
            "## Modules",
            "",
            "This folder is the full model. Beside its weights are modules, each of which can stand for several "
            "layers. Assemble a model of fewer layers from them:",
            "",
            "```bash",
            "optimum-cli flexcompress assemble --model THIS_FOLDER --strategy size-first --ratio 2 --output OUT",
            "```",
            "",
            *lines,
        ]


def relative_error(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Squared error relative to the squared length of the teacher's vector, summed over valid positions.

    Args:
        student: `[batch, length, size]`.
        teacher: `[batch, length, size]`.
        valid: Booleans `[batch, length]`; where `None` the error is averaged over positions and summed over samples.
    """
    teacher = teacher.float()
    scale = teacher.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    error = (student.float() - teacher).square().sum(-1) / scale
    return error.mean(-1).sum() if valid is None else (error * valid).sum()


def _mean(values: list[torch.Tensor], step: Step) -> torch.Tensor:
    """The mean over the modules of a stack; 0 in a step that replaces nothing there."""
    if not values:
        device = next(value.device for value in step.inputs.values() if isinstance(value, torch.Tensor))
        return torch.zeros((), device=device)
    return torch.stack(values).mean()


def _granularities(names: Iterable[str]) -> str:
    """Of modules with names like `encoder_2_0`: `2, 4 (encoder)`."""
    found: dict[str, set[int]] = {}
    for name in names:
        stack, granularity, _ = name.rsplit("_", 2)
        found.setdefault(stack, set()).add(int(granularity))
    return " and ".join(f"{', '.join(map(str, sorted(sizes)))} ({stack})" for stack, sizes in sorted(found.items()))
