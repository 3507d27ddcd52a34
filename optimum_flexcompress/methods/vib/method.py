"""VIB pruning as a compression method (VTrans, arXiv 2406.05276)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from ...architectures import describe
from ...errors import FlexCompressError
from ...masking import fold
from ...surgery import hidden_sides, select, with_weights
from ...vib_config import VIBPruningConfig
from ..base import (
    EXISTING_LAYERS,
    FULL_PASS,
    CompressionMethod,
    LossTerm,
    ParameterGroup,
    PrepareContext,
    Step,
    constant,
)
from ..teacher import unwrap_peft
from .constraint import SizeConstraint, movable
from .hooks import MaskHooks
from .latency import LatencyTable
from .layout import FFN
from .masks import SMALLEST_FOLDED, VIBMasks, as_masks
from .recovery import LoRARecovery, require_peft
from .schedule import Schedule
from .sizes import Selection
from .target import Target


logger = logging.getLogger(__name__)

WORRYING_GAP, LARGEST_GAP = 0.02, 0.1
"""How far the masks may be from the target, in sparsity: beyond the first at the end of the hold the user is told, and
beyond the second throughout the hold the final sizes would be a guess."""

MEAN_RATE, VARIANCE_RATE = 0.1, 4.0
"""Factors of the learning rate for means and log variances. The latter have nine nats to go. Means have little: they
adjust the scale of what stays, and their gradients are mostly noise, which Adam would turn into a random walk."""


class VIBPruningMethod(CompressionMethod):
    """Terms `vib_kl` and `vib_constraint`; see [`VIBPruningConfig`]."""

    restructures = True

    config: VIBPruningConfig

    def __init__(self, config: VIBPruningConfig):
        super().__init__(config)
        self._folded = False
        self._step = 0
        self._schedule: Schedule | None = None

    # Before training

    def validate(self, context: PrepareContext) -> None:
        model = context.model
        if unwrap_peft(model) is not model:
            raise FlexCompressError(
                "VIB pruning removes parts of the weights, which adapters sit on: merge them first "
                "(model.merge_and_unload()), and add new ones afterwards to recover."
            )
        if self.config.recovery is not None:
            require_peft()
        view = describe(model)
        objection = view.architecture.objection(model.config)
        if objection is not None:
            raise FlexCompressError(f"This model cannot be pruned: {objection}.")
        if "hidden" in self.config.prune:
            hidden_sides(view)
        # Costs are counted, or timed, by running the model.
        Target(self.config, with_weights(model), context.args.device).check_reachable()

    def prepare(self, context: PrepareContext) -> None:
        self._model = context.model
        self._target = Target(self.config, context.model, context.args.device)
        layout = self._target.layout
        masks = VIBMasks(layout)
        self.modules["masks"] = masks
        self.modules["constraint"] = SizeConstraint(self.config.multiplier_bound)
        self._use_cost()
        self.modules["with_embeddings"] = self._target.with_embeddings.differentiable()
        self._hooks = MaskHooks(masks, self.config.beta, self.config.noise == "token")
        self._frozen_weights: list[torch.nn.Parameter] = []
        self._recovery: LoRARecovery | None = None
        if self.config.recovery is not None:
            self._recovery = LoRARecovery(context.model, self.config.lora)
            self.modules["adapters"] = self._recovery.adapters
        self._folded, self._step, self._schedule = False, 0, None

    def data_share(self) -> float:
        return 1.0 if self.config.mode == "vtrans" else self.config.data_fraction

    def least_steps(self) -> int:
        return self.config.min_steps if self.config.mode == "fast" else 0

    def start(self, max_steps: int) -> None:
        self._schedule = Schedule.of(self.config, self._target.sparsity, self._target.levels, max_steps)

    def attach(self, model: PreTrainedModel) -> None:
        self._hooks.attach(model)
        if self.config.mode == "faster":
            self._frozen_weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in self._frozen_weights:
                parameter.requires_grad_(False)
        if self._recovery is not None and self._folded:
            self._recovery.attach()

    def detach(self) -> None:
        self._hooks.detach()
        if self._recovery is not None:
            self._recovery.detach()
        for parameter in self._frozen_weights:
            parameter.requires_grad_(True)
        self._frozen_weights = []

    def parameter_groups(self) -> list[ParameterGroup]:
        masks, constraint, config = self.modules["masks"], self.modules["constraint"], self.config
        groups = [
            ParameterGroup(
                "means",
                [masks.mu],
                learning_rate=MEAN_RATE * config.mask_learning_rate,
                schedule=self._rate,
            ),
            ParameterGroup(
                "variances",
                [masks.log_variance],
                learning_rate=VARIANCE_RATE * config.mask_learning_rate,
                schedule=self._rate,
            ),
            ParameterGroup(
                "multiplier",
                [constraint.raw],
                learning_rate=config.multiplier_learning_rate,
                schedule=constant,
                maximize=True,
            ),
        ]
        if self._recovery is not None:
            adapters = list(self._recovery.adapters.parameters())
            groups.append(ParameterGroup("adapters", adapters, schedule=self._recovery_rate))
        return groups

    def _recovery_rate(self, step: int, max_steps: int) -> float:
        return self._recovery.rate(step, self._schedule.fold, max_steps)

    def _rate(self, step: int, max_steps: int) -> float:
        return self._schedule.learning_rate(step)

    # In a step

    def before_forward(self, step: Step) -> None:
        step.shared[EXISTING_LAYERS] = self._existing_layers
        self._hooks.batches, self._hooks.loss_scale = step.micro_steps, step.loss_scale

    @torch.no_grad()
    def _existing_layers(self) -> dict[str, torch.Tensor]:
        """Which layers have a sub-layer that is on, Booleans `[layers]` by stack."""
        layout, on = self._target.layout, self._hooks.applied.counts.on
        existing = {name: on.new_zeros(depth) for name, depth in layout.depths.items()}
        for index, part in enumerate(layout.sublayers):
            existing[part.stack][part.layer] += on[index]
        return {name: counts > 0 for name, counts in existing.items()}

    def loss_terms(self, step: Step) -> dict[str, LossTerm]:
        if step.pass_name != FULL_PASS:
            return {}
        masks = self.modules["masks"]
        if self._folded:
            zero = masks.mu.new_zeros(())
            return {"vib_kl": LossTerm(zero, per_item=False), "vib_constraint": LossTerm(zero, per_item=False)}
        return {
            "vib_kl": LossTerm(masks.kl(masks.kl_weights), self.config.kl_weight, per_item=False),
            "vib_constraint": LossTerm(self._constraint(step.global_step), per_item=False),
        }

    def _constraint(self, step: int) -> torch.Tensor:
        masks, keep = self.modules["masks"], self._hooks.applied.keep
        target = self._schedule.pressure(step)
        hard = keep.detach().requires_grad_()
        sparsity = self._sparsity(hard)
        (marginal,) = torch.autograd.grad(sparsity, hard)
        hard = hard.detach()
        if self._schedule.holds(step):
            self.modules["constraint"].note(sparsity, target)
        chosen = movable(masks.scores(), hard, -marginal, target - sparsity.detach())
        moved = self._sparsity(hard + chosen * (keep - hard))
        due = (self._schedule.sparsity(step) + target) / 2
        return self.modules["constraint"](moved, target, due)

    def _sparsity(self, keep: torch.Tensor) -> torch.Tensor:
        """What a keep vector leaves out of what the request counts, a scalar."""
        return (1.0 - self.modules["cost"](self.modules["masks"].counts(keep)) / self._target.cost.dense).float()

    def _use_cost(self) -> None:
        masks = self.modules["masks"]
        self.modules["cost"] = self._target.cost.differentiable().to(masks.mu.device)
        weights = self._relative_costs() * self._target.layout.factors(self.config.kl_multipliers)
        masks.register_buffer("kl_weights", weights.to(masks.mu.device), persistent=False)

    def _relative_costs(self) -> torch.Tensor:
        """What every entry costs in the whole model, in units of what an FFN dim does on average, `[size]`.

        The KL term weighs entries by that, so that scores, which rise until the task resists the noise as much as the
        KL term asks for it, tell importance per cost, and one threshold fits all.
        """
        layout = self._target.layout
        keep = torch.ones(layout.size, requires_grad=True, device=self.modules["masks"].mu.device)
        (amounts,) = torch.autograd.grad(-self._sparsity(keep), keep)
        dims = [amounts[part.start : part.stop] for part in layout.sublayers if part.kind == FFN]
        return amounts / (torch.cat(dims) if dims else amounts).mean()

    def on_step(self, step: int, max_steps: int) -> None:
        self._step = step
        if self._folded:
            return
        self.modules["masks"].clamp()
        self.modules["constraint"].clamp()
        if step == self._schedule.fold:
            self._fold()

    def checkpoint_due(self, step: int, max_steps: int) -> str | None:
        level = self._schedule.level_due(step)
        if level is None and self._target.save_final and step == max_steps:
            level = self._target.sparsity
        return None if level is None else f"sparsity-{level:.4g}"

    def log_values(self) -> dict[str, float]:
        masks = self.modules["masks"]
        self._check_finite(masks)
        with torch.no_grad():
            counts = masks.counts((masks.scores() > 0).to(masks.mu.dtype))
            figures = {
                name: 1.0 - self.modules[module](counts) / cost.dense
                for name, module, cost in (
                    ("sparsity", "cost", self._target.cost),
                    ("sparsity_with_embeddings", "with_embeddings", self._target.with_embeddings),
                )
            }
            figures |= {f"kept_{kind}": share for kind, share in masks.kept_shares(counts).items()}
            figures["multiplier"] = self.modules["constraint"].multiplier
            # In one transfer: each would wait for the device.
            values = torch.stack([value.float() for value in figures.values()]).tolist()
        logs = {f"vib_{name}": value for name, value in zip(figures, values, strict=True)}
        logs["vib_target"] = self._schedule.sparsity(self._step)
        return logs

    @staticmethod
    def _check_finite(masks: VIBMasks) -> None:
        if not bool(torch.isfinite(masks.mu).all() & torch.isfinite(masks.log_variance).all()):
            raise FlexCompressError(
                "A mask has become NaN, so the loss has been infinite or NaN: resume from an earlier checkpoint with "
                "a lower learning rate, or without fp16."
            )

    def check(self) -> None:
        if not self._folded:
            self._check_finite(self.modules["masks"])

    # The end

    def is_ready(self) -> bool:
        return self._folded

    def _fold(self) -> None:
        """Ends the training of masks: final sizes, means into the weights, masks of zeros and ones."""
        masks, target = self.modules["masks"], self._target
        self._check_finite(masks)
        reached = self._hard_sparsity()
        far = f"The masks have reached a sparsity of {reached:.3f} at the end of the hold, {target.sparsity:.3f} is "
        far += "wanted"
        if min(float(self.modules["constraint"].closest), abs(reached - target.sparsity)) > LARGEST_GAP:
            raise FlexCompressError(
                f"{far}: train for more steps, or raise hold_fraction or mask_learning_rate; checkpoints are kept."
            )
        if abs(reached - target.sparsity) > WORRYING_GAP:
            logger.warning(f"{far}; the final sizes make up for the difference. A longer hold would do it better.")
        selection = self._selection(target.sparsity)
        values = selection.values(target.layout).to(masks.mu)
        fold(self._model, as_masks(target.layout, self._means() * values))
        masks.harden(values)
        self._folded = self._hooks.frozen = True
        if self._recovery is not None:
            self._recovery.attach()

    def _hard_sparsity(self) -> float:
        masks = self.modules["masks"]
        with torch.no_grad():
            return float(self._sparsity((masks.scores() > 0).to(masks.mu.dtype)))

    def _means(self) -> torch.Tensor:
        """Means, away from 0, for what the final sizes keep against its mask."""
        masks = self.modules["masks"]
        means = masks.mu.detach()
        smallest = torch.where(means < 0, -SMALLEST_FOLDED, SMALLEST_FOLDED)
        means = torch.where(means.abs() < SMALLEST_FOLDED, smallest, means)
        return torch.where(masks.active, means, 1.0)

    def _selection(self, sparsity: float | None) -> Selection:
        target = self._target
        selection = target.select(self.modules["masks"].scores(), sparsity)
        if sparsity is not None and not target.meets(selection, sparsity):
            raise FlexCompressError(target.cannot_be_reached(sparsity, selection))
        return selection

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        layout, masks = self._target.layout, self.modules["masks"]
        if self._folded:
            if self._recovery is not None:
                self._recovery.merge_into(model)
            return select(model, as_masks(layout, masks.evaluation_values()).kept())
        if model is self._model:
            reached = self._hard_sparsity()
            raise FlexCompressError(
                f"Training ended after {self._step} steps, before the masks were folded: they have reached a sparsity "
                f"of {reached:.3f}, {self._target.sparsity:.3f} is wanted; resume from the last checkpoint."
            )
        # A checkpoint on the way: at a level exactly that size, else what the masks say.
        selection = self._selection(None if self._schedule is None else self._schedule.level_due(self._step))
        values = as_masks(layout, self._means() * selection.values(layout).to(masks.mu))
        return select(fold(model, values), values.kept())

    def final_values(self, model: PreTrainedModel) -> dict[str, float]:
        if self._target.table is None:
            return {}
        values = self._target.milliseconds(self.modules["masks"].evaluation_values(), model)
        return {f"vib_{name}": value for name, value in values.items()}

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "folded": self._folded, "step": self._step}
        table = self._target.table
        return state if table is None else {**state, "latencies": asdict(table)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if "latencies" in state and state["latencies"] != asdict(self._target.table):
            # Measured anew, times differ a little, and the run would go on to another target.
            self._target.table = LatencyTable.from_dict(state["latencies"])
            self._use_cost()
        self._folded = self._hooks.frozen = bool(state["folded"])
        self._step = int(state["step"])
