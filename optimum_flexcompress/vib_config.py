"""The config of VIB pruning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import FlexCompressError, nearest
from .method_config import MethodConfig, check_number


MODES = ("vtrans", "fast", "faster")
LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "use_rslora")
KINDS = ("hidden", "heads", "ffn", "sublayers")
"""What masks are on: dims of the residual stream, heads (or groups of heads that share a key), inner dims of the FFN,
whole attention and FFN sub-layers."""


@dataclass(kw_only=True)
class VIBPruningConfig(MethodConfig):
    """VTrans: masks learned under an information bottleneck say which parts of a model go (arXiv 2406.05276).

    A run has four phases, as shares of its steps: a warm-up without pressure, a ramp on which the wanted sparsity
    rises from 0, a hold at the target, and fine-tuning of what is left with the rest. Between hold and fine-tuning
    the masks are folded into the weights, and the final sizes are chosen so that the request is met.

    Attributes:
        target_sparsity: Share of the parameters of the layers that goes, above 0 and below 1. Give this,
            `target_macs` or `target_latency`.
        target_macs: Multiply-accumulates of one sample of `sequence_length` tokens that are left, heads and poolers
            included; below 1 as a share of those of the dense model.
        target_latency: Milliseconds of a forward pass in PyTorch, without a cache, by a table of latencies that is
            measured once, on the device that trains, with the number of threads that PyTorch has then. It is kept
            in the cache of Hugging Face (`HF_HOME`). The time of the model that comes out is measured too, and logged
            next to that of the table.
        latency_batch_size: Samples of that forward pass; `sequence_length` says how many tokens each has.
        latency_device: Where to measure, such as `cpu`; `None` takes the device that trains.
        latency_table: A file for the table instead of the one in the cache; one that exists is used, also where it was
            measured on another machine.
        include_embeddings: Whether sparsity also counts the parameters of the embeddings.
        sequence_length: Tokens of a sample (of source and target each in encoder-decoders) for counting MACs or
            for timing; `None` takes 128, or what the model can take where that is less. Images have the length that
            they have.
        mode: `vtrans` trains weights and masks on all data; `fast` the same on `data_fraction` of the data, repeated
            for at least `min_steps` steps; `faster` trains masks only, with the weights frozen, also on
            `data_fraction` of the data, and without fine-tuning unless there is a `recovery`.
        recovery: `lora`: after mode `faster`, the steps that are left for fine-tuning train LoRA adapters on the
            projections of the pruned model, through PEFT and at the trainer's learning rate; the adapters are merged
            at the end.
        lora: Options of `peft.LoraConfig` for the recovery: `r` (16), `lora_alpha` (32), `lora_dropout` (0),
            `use_rslora`.
        align: Final sizes of the residual stream, of all heads of an attention and of FFNs are multiples of this, or
            what they were.
        uniform: Every layer gets the same sizes and keeps all its sub-layers, such that a stock configuration can
            express the result, which then loads without this package.
        prune: Which structures have masks: `hidden`, `heads`, `ffn`, `sublayers`. `None` takes `heads` and `ffn`, and
            with `include_embeddings` also `hidden`, the only one that embeddings have. A dim of the residual stream
            goes out of every layer at once, whether it needs it or not, which costs more accuracy than the same
            number of parameters in heads and FFN dims. A sub-layer of which all heads or dims go is gone without the
            last, too. A mask on the whole of it takes what it has of worth with the rest, which costs accuracy; it is
            for targets where being there has a price of its own, such as latency.
        warmup_fraction: Share of the steps of the warm-up.
        ramp_fraction: Share of the steps of the ramp.
        hold_fraction: Share of the steps of the hold; in mode `faster` the hold has all the rest.
        save_at_sparsities: On its way the run halts at each of these and writes the pruned, not fine-tuned model to
            `sparsity-<value>` below the output folder. They lie below the target, and count what it counts.
        mask_learning_rate: Learning rate of the masks, constant up to the end of the ramp, then falling to a tenth;
            the log variances learn at four times that, the means at a tenth.
        multiplier_learning_rate: Learning rate of the ascent of the constraint's multiplier, on the scale of its
            `arsinh`.
        multiplier_bound: Bound of the multiplier.
        kl_weight: Weight of the KL term.
        kl_multipliers: Factors in the KL term by structure, 1 where none is given, on top of what an entry costs in
            the request: an FFN dim weighs 1 on average.
        beta: Slope of the sigmoid through which the counts of what is kept pass their gradient.
        noise: Whether training draws the masks' noise once per `sequence` or for every `token`.
        data_fraction: Share of the data in modes `fast` and `faster`.
        min_steps: Fewest steps of mode `fast` where the run's length is given in epochs.
    """

    method_type: ClassVar[str] = "vib_pruning"

    target_sparsity: float | None = None
    target_macs: float | None = None
    target_latency: float | None = None
    latency_batch_size: int = 1
    latency_device: str | None = None
    latency_table: str | None = None
    include_embeddings: bool = False
    sequence_length: int | None = None
    mode: str = "vtrans"
    recovery: str | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    align: int = 8
    uniform: bool = False
    prune: list[str] | None = None
    warmup_fraction: float = 0.05
    ramp_fraction: float = 0.4
    hold_fraction: float = 0.15
    save_at_sparsities: list[float] = field(default_factory=list)
    mask_learning_rate: float = 0.05
    multiplier_learning_rate: float = 0.1
    multiplier_bound: float = 10000.0
    kl_weight: float = 1e-6
    kl_multipliers: dict[str, float] = field(default_factory=dict)
    beta: float = 0.4
    noise: str = "sequence"
    data_fraction: float = 0.03
    min_steps: int = 1000

    def __post_init__(self):
        self._check_target()
        for name, choices in (("mode", MODES), ("noise", ("sequence", "token"))):
            value = getattr(self, name)
            if value not in choices:
                raise FlexCompressError(f"vib_pruning.{name} is {value!r}.{nearest(str(value), choices)}")
        self._check_recovery()
        if self.prune is None:
            self.prune = ["hidden", "heads", "ffn"] if self.include_embeddings else ["heads", "ffn"]
        if isinstance(self.prune, str) or not isinstance(self.prune, Sequence) or not self.prune:
            raise FlexCompressError(f"vib_pruning.prune is {self.prune!r}: give a list of {', '.join(KINDS)}.")
        for kind in self.prune:
            if kind not in KINDS:
                raise FlexCompressError(f"vib_pruning.prune names {kind!r}.{nearest(str(kind), KINDS)}")
        self.prune = list(self.prune)
        for name in ("align", "min_steps"):
            check_number(f"vib_pruning.{name}", getattr(self, name), minimum=1, integer=True)
        if self.sequence_length is not None:
            check_number("vib_pruning.sequence_length", self.sequence_length, minimum=1, integer=True)
        for name in ("mask_learning_rate", "multiplier_learning_rate", "multiplier_bound", "beta"):
            check_number(f"vib_pruning.{name}", getattr(self, name), above=0.0)
        self._check_weights("kl_weight", "warmup_fraction", "hold_fraction")
        self._check_phases()
        self._check_share("data_fraction", self.data_fraction, closed=True)
        if not isinstance(self.kl_multipliers, Mapping):
            raise FlexCompressError(
                f'vib_pruning.kl_multipliers is {self.kl_multipliers!r}: give factors by name, such as {{"ffn": 1.0}}.'
            )
        for name, value in self.kl_multipliers.items():
            if name not in KINDS:
                raise FlexCompressError(f'vib_pruning.kl_multipliers names "{name}".{nearest(str(name), KINDS)}')
            check_number(f"vib_pruning.kl_multipliers.{name}", value, minimum=0.0)
        self.kl_multipliers = dict(self.kl_multipliers)

    def _check_target(self) -> None:
        targets = ("target_sparsity", "target_macs", "target_latency")
        given = [name for name in targets if getattr(self, name) is not None]
        if len(given) != 1:
            raise FlexCompressError(
                f"vib_pruning needs one target, and has {' and '.join(given) or 'none'}: give one of "
                f"{', '.join(targets)}."
            )
        if self.target_sparsity is not None:
            self._check_share("target_sparsity", self.target_sparsity)
        else:
            check_number(f"vib_pruning.{given[0]}", getattr(self, given[0]), above=0.0)
            if self.target_macs == 1:
                raise FlexCompressError(
                    "vib_pruning.target_macs is 1, which is the whole model: give a share below 1, or a number of "
                    "multiply-accumulates."
                )
            if self.include_embeddings:
                raise FlexCompressError(
                    "vib_pruning.include_embeddings goes with target_sparsity: other targets count what is computed, "
                    "and embeddings are looked up; leave it out."
                )
        check_number("vib_pruning.latency_batch_size", self.latency_batch_size, minimum=1, integer=True)
        for name in ("latency_device", "latency_table"):
            if getattr(self, name) is not None and self.target_latency is None:
                raise FlexCompressError(f"vib_pruning.{name} goes with target_latency: leave it out.")
        for name, kind, what in (
            ("latency_device", str, "the name of a device, such as cpu"),
            ("latency_table", (str, os.PathLike), "the path of a file"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise FlexCompressError(f"vib_pruning.{name} is {value!r}: give {what}, or leave it out.")
        levels = self.save_at_sparsities
        if isinstance(levels, str) or not isinstance(levels, Sequence):
            raise FlexCompressError(
                f"vib_pruning.save_at_sparsities is {levels!r}: give a list of numbers, such as [0.5, 0.7]."
            )
        for level in levels:
            self._check_share("save_at_sparsities", level)
            if self.target_sparsity is not None and level > self.target_sparsity:
                raise FlexCompressError(
                    f"vib_pruning.save_at_sparsities has {level:g}, beyond the target of {self.target_sparsity:g}: "
                    "make the largest of them the target."
                )
        self.save_at_sparsities = sorted({float(level) for level in levels})

    def _check_recovery(self) -> None:
        if self.recovery not in (None, "lora"):
            raise FlexCompressError(f'vib_pruning.recovery is {self.recovery!r}: give "lora", or leave it out.')
        if self.recovery is not None and self.mode != "faster":
            raise FlexCompressError(
                f'vib_pruning.recovery goes with mode="faster": the weights are fine-tuned anyway in mode '
                f'"{self.mode}"; leave it out.'
            )
        if not isinstance(self.lora, Mapping):
            raise FlexCompressError(f'vib_pruning.lora is {self.lora!r}: give options, such as {{"r": 16}}.')
        if self.lora and self.recovery is None:
            raise FlexCompressError('vib_pruning.lora has options for recovery="lora": set that too.')
        for name, value in self.lora.items():
            if name not in LORA_OPTIONS:
                raise FlexCompressError(f'vib_pruning.lora has "{name}".{nearest(str(name), LORA_OPTIONS)}')
            if name == "r":
                check_number("vib_pruning.lora.r", value, minimum=1, integer=True)
            elif name == "lora_alpha":
                check_number("vib_pruning.lora.lora_alpha", value, above=0.0)
            elif name == "lora_dropout":
                check_number("vib_pruning.lora.lora_dropout", value, minimum=0.0)
                if value >= 1:
                    raise FlexCompressError(f"vib_pruning.lora.lora_dropout is {value:g}: give a share below 1.")
        self.lora = dict(self.lora)

    def _check_share(self, name: str, value: float, closed: bool = False) -> None:
        check_number(f"vib_pruning.{name}", value)
        if not (0 < value < 1 or (closed and value == 1)):
            raise FlexCompressError(f"vib_pruning.{name} is {value:g}: give a share between 0 and 1, such as 0.6.")

    def _check_phases(self) -> None:
        check_number("vib_pruning.ramp_fraction", self.ramp_fraction, above=0.0)
        total = self.warmup_fraction + self.ramp_fraction + self.hold_fraction
        if total > 1 + 1e-9:
            raise FlexCompressError(
                f"warmup_fraction, ramp_fraction and hold_fraction of vib_pruning make {total:g}: together they are "
                "at most 1, and what is left is fine-tuning."
            )
        if self.recovery is not None and total > 1 - 1e-9:
            raise FlexCompressError(
                "warmup_fraction, ramp_fraction and hold_fraction of vib_pruning make 1, which leaves no steps for the "
                "recovery: lower one of them."
            )
