"""Length-adaptive training as a method of the trainer."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...architectures import describe
from ...errors import FlexCompressError
from ...length_config import LengthAdaptiveConfig
from ...token_dropping import LengthConfig, check_lengths, dropping_stack, lengths_of, set_lengths
from ...token_dropping.model import install, write_lengths
from ..base import FULL_PASS, CompressionMethod, LossTerm, PrepareContext, Step
from ..distillation.logits import Head, count_items, head_of, logits_loss, problem_type_of
from ..means import Means
from ..teacher import unwrap_peft
from .draws import SubModel, draw_sub_model, skipped, smallest_sub_model


logger = logging.getLogger(__name__)

SMALLEST_PASS = "smallest"
RANDOM_PASS = "random"

_KEPT_OUTPUTS = ("logits", "start_logits", "end_logits")
_SHARED = "length_adaptive.full_outputs"


class LengthAdaptiveMethod(CompressionMethod):
    """The sandwich rule: full model, smallest sub-model, random sub-models; see [`LengthAdaptiveConfig`].

    Sub-models learn from nothing but the outputs of the full model, in terms `smallest` and `random`. Each pass has
    its own backward, so that the activations of one pass at a time are in memory. Lengths and skipped layers are
    drawn from the seed and the optimizer step: they agree between processes and between the batches of a step.

    Logs, as means over the random sub-models since the last log: `length_kept`, the share of the input's tokens that
    their layers hand on; `length_kept_last`, that of the last of these layers; and `length_layers`, how many run.
    """

    config: LengthAdaptiveConfig

    def validate(self, context: PrepareContext) -> None:
        model = unwrap_peft(context.model)
        dropping_stack(describe(model))
        if self._fixed is not None:
            check_lengths(model, self._fixed)
            return
        self._find_head(model)
        if getattr(model.config, "encoder_layerdrop", 0.0):
            raise FlexCompressError(
                f"The configuration of the model has encoder_layerdrop={model.config.encoder_layerdrop}, which skips "
                "layers of the full model too: set it to 0 and use layer_drop of LengthAdaptiveConfig."
            )

    @property
    def drops_tokens(self) -> bool:
        return self._fixed is not None

    @property
    def _fixed(self) -> LengthConfig | None:
        return LengthConfig.parse(self.config.lengths, self.config.max_length)

    @staticmethod
    def _find_head(model: Any) -> Head:
        try:
            return head_of(model)
        except FlexCompressError as error:
            raise FlexCompressError(
                f"{type(model).__name__} has no head whose output sub-models could learn: load the model with a head, "
                "as AutoModelForSequenceClassification does, or train with a fixed configuration (lengths=[...])."
            ) from error

    def prepare(self, context: PrepareContext) -> None:
        model = unwrap_peft(context.model)
        self._means, self._kept = Means(), []
        if self._fixed is not None:
            set_lengths(model, self._fixed)
            return
        if lengths_of(model) is not None:
            logger.info("Length-adaptive training starts from full lengths, not from those the model had.")
            set_lengths(model, None)
        # What is saved from now on takes length_config= when it is loaded.
        write_lengths(model, None)
        self._head = self._find_head(model)

    def start(self, max_steps: int) -> None:
        self._means.take()

    # Passes

    def passes(self, step: int, max_steps: int) -> Sequence[str]:
        if self.config.lengths is not None:
            return (FULL_PASS,)
        randoms = [f"{RANDOM_PASS}_{index}" for index in range(self.config.num_sandwich)]
        return (FULL_PASS, SMALLEST_PASS, *randoms)

    def _is_sub_pass(self, step: Step) -> bool:
        return self.config.lengths is None and step.pass_name != FULL_PASS

    def sub_model(self, step: Step) -> SubModel:
        """The sub-model of a pass other than the full one."""
        stack = dropping_stack(describe(unwrap_peft(step.model)))
        if step.pass_name == SMALLEST_PASS:
            return smallest_sub_model(stack, self.config.length_drop)
        key = f"{step.seed}/{step.global_step}/{step.pass_name}".encode()
        generator = torch.Generator().manual_seed(zlib.crc32(key))
        return draw_sub_model(stack, self.config.length_drop, self.config.layer_drop, generator)

    def before_forward(self, step: Step) -> None:
        if not self._is_sub_pass(step):
            return
        model = unwrap_peft(step.model)
        count = len(dropping_stack(describe(model)).layers)
        sub_model = self.sub_model(step)
        if self.config.unit == "fractions":
            lengths = sub_model.fractions(count)
            self._kept = [lengths.values[layer] for layer in sub_model.layers]
        else:
            longest = self.config.max_length

            def lengths(total: int) -> list[int]:
                counts = sub_model.counts(total if longest is None else longest)
                self._kept = [min(left / total, 1.0) for left in counts]
                return counts

        install(model, lengths, skipped(sub_model, count))

    def after_pass(self, step: Step) -> None:
        if not self._is_sub_pass(step):
            return
        install(unwrap_peft(step.model), None)
        if step.pass_name != SMALLEST_PASS and self._kept:
            kept = self._kept
            figures = {"kept": sum(kept) / len(kept), "kept_last": kept[-1], "layers": float(len(kept))}
            self._means.add({f"length_{name}": value for name, value in figures.items()})
        self._kept = []

    def log_values(self) -> dict[str, float]:
        return self._means.take()

    # Losses

    def task_loss_weight(self, step: Step) -> float:
        return 0.0 if self._is_sub_pass(step) else 1.0

    def pass_weight(self, step: Step) -> float:
        return 1.0 if self.config.lengths is not None else 1 / (self.config.num_sandwich + 2)

    def count_items(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if self.config.lengths is not None:
            return {}
        items = count_items(self._head, batch)
        return {SMALLEST_PASS: items, RANDOM_PASS: items}

    def loss_terms(self, step: Step) -> dict[str, LossTerm]:
        if self.config.lengths is not None:
            return {}
        if step.pass_name == FULL_PASS:
            outputs = {name: step.outputs.get(name) for name in _KEPT_OUTPUTS}
            step.shared[_SHARED] = {name: value.detach() for name, value in outputs.items() if value is not None}
            return {}
        kind = problem_type_of(unwrap_peft(step.model), step.inputs.get("labels"))
        value = logits_loss(
            self._head,
            step.outputs,
            step.shared[_SHARED],
            step.inputs,
            kind,
            self.config.temperature,
            reverse=self.config.divergence == "reverse",
        )
        if step.pass_name == SMALLEST_PASS:
            return {SMALLEST_PASS: LossTerm(value)}
        # Logs add up what the passes of a step record: this makes them a mean.
        count = self.config.num_sandwich
        return {RANDOM_PASS: LossTerm(value / count, weight=count)}
