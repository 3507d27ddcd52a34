"""The planner's rules: which methods are stacked for a budget, and with what settings.

The rules are those of `RULES`, each with the benchmark of this project that it rests on (scripts under
examples/benchmarks, which write the JSON files below examples/benchmarks/results).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.environment import BUSY
from .budget import Budget
from .forecast import STEP_ROWS, Facts
from .stages import stage_class
from .stages.training import SMALL_WIDTH, usual_learning_rate


_INT8 = {"layers": ("int8-distill",), "width": ("int8-prune",), "tokens": ("int8-adapt", "int8")}
STAGES = {
    "layers": ("modular", "half", "distill", "depth", *_INT8["layers"]),
    "width": ("prune", "width", *_INT8["width"]),
    "tokens": ("adapt", "search", "pick", *_INT8["tokens"]),
}
# The stages that train, and their types.
_TRAINING = {
    "finetune": "finetune",
    "modular": "modular",
    "distill": "distill",
    "prune": "prune",
    "adapt": "length-adaptive",
}

FEWEST_LAYERS = 4
LONG_INPUT = 64
LONG_BATCH = 16
MASK_STEPS = 1000
# Tokens in a batch from which dropping some of them pays: full_stack.json has 256, where it does not, and 8,192.
LARGE_BATCH = 1024
# Over dense int8: what VIB pruning of 70 % comes to (1.8x to 2.7x in vib_text.json, 2.0x in full_stack.json), and half of
# the layers pruned by half (3.0x in compress_budget.json).
PRUNED_SPEEDUP, HALVED_SPEEDUP = 2.0, 3.0
# Of the parameters of the layers: in decoders, in others, and where half of the layers went first, up to a speed-up of
# HALVED_SPEEDUP and beyond.
DECODER_SPARSITY, SPARSITY, HALVED_SPARSITY, MOST_SPARSITY = 0.3, 0.7, 0.75, 0.85


@dataclass(frozen=True)
class Rule:
    """One rule of the planner.

    Attributes:
        name: In a word.
        when: When it applies.
        then: What the plan does then.
        evidence: The results that it rests on, below examples/benchmarks/results.
    """

    name: str
    when: str
    then: str
    evidence: tuple[str, ...]


RULES = (
    Rule(
        "int8",
        "always",
        "the last step; int8 of the fine-tuned model is measured before anything is trained, and is always a choice",
        ("ort_int8.json",),
    ),
    Rule(
        "enough",
        "int8 alone takes no longer than the target latency",
        "nothing is compressed any further",
        ("ort_int8.json",),
    ),
    Rule(
        "layers",
        f"every stack has {FEWEST_LAYERS} layers or more (an even number in encoder-decoders), the task has labels, and "
        f"the model is no decoder; in encoders with a largest loss whose inputs are long (half of them {LONG_INPUT} tokens or "
        f"more), only for a target more than {PRUNED_SPEEDUP:g} times as fast as int8 alone",
        "half of the layers: an encoder by MiniLM and logits, an encoder-decoder by modules",
        ("quickstart.json", "compress_budget.json", "modular_cmudict.json", "vib_text.json"),
    ),
    Rule(
        "width",
        "the task has labels",
        f"VIB pruning, until {100 * SPARSITY:g} % of the parameters of all layers are gone, {100 * DECODER_SPARSITY:g} % in "
        f"decoders; with half of the layers first {100 * HALVED_SPARSITY:g} %, and {100 * MOST_SPARSITY:g} % for a target more "
        f"than {HALVED_SPEEDUP:g} times as fast as int8 alone",
        ("vib_text.json", "vib_lm.json", "full_stack.json", "compress_budget.json"),
    ),
    Rule(
        "tokens",
        f"the model is an encoder, the task has labels, half of the inputs have {LONG_INPUT} tokens or more, and a batch "
        f"that latencies are of has {LARGE_BATCH:,} or more",
        "length-adaptive training, taught by the fine-tuned model, and a search of lengths",
        ("length_imdb.json", "quala_squad.json", "full_stack.json"),
    ),
    Rule(
        "worth it",
        "there is a largest loss, and more than one step",
        "what is trained next goes on without a step that loses more than that on held-out examples",
        ("full_stack.json", "compress_budget.json"),
    ),
    Rule(
        "training",
        "always",
        f"learning rate 2e-4 up to {SMALL_WIDTH} dims and 5e-5 beyond; 5e-5, {LONG_BATCH} rows and two epochs of "
        f"fine-tuning where inputs are as long as dropping tokens asks for, whether or not any are; masks for {MASK_STEPS:,} steps or more, no dropout on attention maps, "
        "bfloat16 where the processor computes in it",
        ("quickstart.json", "vib_text.json", "length_imdb.json", "quala_squad.json"),
    ),
)


@dataclass(frozen=True)
class Decision:
    """What a rule comes to.

    Attributes:
        rule: Its name.
        applies: Whether it does.
        why: In a few words.
        overrides: Settings of the recipe, as `key=value`.
    """

    rule: str
    applies: bool
    why: str
    overrides: tuple[str, ...] = ()


@dataclass
class Plan:
    """A plan.

    Attributes:
        decisions: One for each rule, in their order.
        facts: What it went by.
    """

    decisions: list[Decision]
    facts: Facts

    @property
    def overrides(self) -> list[str]:
        """All settings."""
        return [override for decision in self.decisions for override in decision.overrides]

    def to_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        return {
            "decisions": [dataclasses.asdict(decision) for decision in self.decisions],
            "facts": dataclasses.asdict(self.facts),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Plan:
        """The plan that [`Plan.to_dict`] was called on."""
        decisions = [
            Decision(**{**decision, "overrides": tuple(decision["overrides"])}) for decision in content["decisions"]
        ]
        return cls(decisions, Facts(**content["facts"]))

    def __str__(self) -> str:
        """What was decided and why, a line for each rule."""
        busy = (
            f"\n  Other processes keep {self.facts.busy_cores:.1f} cores busy: latencies and times are not to be relied on."
            if (self.facts.busy_cores or 0.0) > BUSY
            else ""
        )
        evidence = {rule.name: ", ".join(rule.evidence) for rule in RULES}
        return (
            "\n".join(
                f"  {'+' if decision.applies else '-'} {decision.rule:<9} {decision.why} [{evidence[decision.rule]}]"
                for decision in self.decisions
            )
            + busy
        )


def decide(facts: Facts, budget: Budget, refused: Mapping[str, str] | None = None) -> Plan:
    """Applies the rules.

    Args:
        facts: About the model, the data and this machine.
        budget: What was asked for.
        refused: Rules whose stages have said that they cannot work with the model, and what they said.
    """
    target = budget.target_latency
    int8 = f"int8 alone takes {facts.int8_milliseconds:.3g} ms for {facts.shape} here"
    enough = target is not None and facts.int8_milliseconds <= target
    asked = "no latency is asked for" if target is None else f"{target:g} ms are asked for"
    speedup = 1.0 if target is None else facts.int8_milliseconds / target
    decisions = [
        Decision("int8", True, f"always; {int8}"),
        Decision("enough", enough, f"{int8}, {asked}"),
    ]
    refused = refused or {}

    def settled(step: Decision) -> Decision:
        if enough:
            return Decision(step.rule, False, "int8 alone is enough")
        return Decision(step.rule, False, refused[step.rule]) if step.rule in refused else step

    layers = settled(_layers(facts, speedup, budget))
    steps = [layers, settled(_width(facts, speedup, layers.applies)), settled(_tokens(facts))]
    for position, step in enumerate(steps):
        if not step.applies:
            skips = tuple(f"stages.{stage}.skip=true" for stage in STAGES[step.rule])
            steps[position] = dataclasses.replace(step, overrides=skips)
    taken = [step.rule for step in steps if step.applies]
    return Plan([*decisions, *steps, _worth_it(taken, budget), _training(facts, steps)], facts)


def _long(facts: Facts) -> bool:
    """Whether there are tokens that could be dropped: then everything is trained as in the benchmarks with such inputs."""
    return facts.kind == "encoder" and facts.labels and (facts.tokens or 0) >= LONG_INPUT


def _layers(facts: Facts, speedup: float, budget: Budget) -> Decision:
    if not facts.labels:
        return Decision("layers", False, f"{facts.task} has no labels to train on")
    if facts.kind == "decoder":
        return Decision("layers", False, "the model is a decoder, of which there is no such benchmark")
    if facts.layers < FEWEST_LAYERS or (facts.kind == "encoder-decoder" and not facts.even):
        return Decision("layers", False, f"the model has {facts.layers} layers")
    if facts.kind == "encoder":
        if budget.max_drop is not None and _long(facts) and speedup <= PRUNED_SPEEDUP:
            return Decision(
                "layers", False, "of long inputs; at the same size, VIB pruning loses less than whole layers"
            )
        settings = ("modular.skip=true", "half.skip=true", "distill.layers=0.5")
        why = f"MiniLM and logits, into half of {facts.layers} layers"
    else:
        settings = ("distill.skip=true",)
        why = f"modules, for half of {facts.layers} layers in each stack"
    return Decision("layers", True, why, tuple(f"stages.{setting}" for setting in settings))


def _width(facts: Facts, speedup: float, after_layers: bool) -> Decision:
    if not facts.labels:
        return Decision("width", False, f"{facts.task} has no labels to train on")
    sparsity = DECODER_SPARSITY if facts.kind == "decoder" else SPARSITY
    if after_layers:
        sparsity = HALVED_SPARSITY if speedup <= HALVED_SPEEDUP else MOST_SPARSITY
    epochs, per_epoch = (
        (3, facts.steps_per_epoch * STEP_ROWS / LONG_BATCH) if _long(facts) else (4, facts.steps_per_epoch)
    )
    steps = max(epochs * per_epoch, MASK_STEPS)
    # Epochs, which are what users set to train longer.
    settings = [f"target_sparsity={sparsity}", f"epochs={round(steps / per_epoch, 2)}"]
    # So that as much goes where the half turns out to lose too much, and the whole model is pruned instead.
    settings += ["sparsity_of=finetune"] if after_layers else []
    if _long(facts):
        settings += ["methods.distillation.temperature=4.0", "methods.distillation.task_loss_weight=0.0"]
    return Decision(
        "width",
        True,
        f"VIB pruning of {100 * sparsity:g} % of the layers{', with what went before' if after_layers else ''}, in "
        f"{steps:,.0f} steps",
        tuple(f"stages.prune.{setting}" for setting in settings),
    )


def _tokens(facts: Facts) -> Decision:
    if facts.kind != "encoder" or not facts.labels:
        return Decision("tokens", False, f"for encoders with labels, not for {facts.task} by the {facts.kind}")
    if not _long(facts):
        length = (
            "inputs have one length" if facts.tokens is None else f"half of the inputs have {facts.tokens} or fewer"
        )
        return Decision("tokens", False, length)
    rows, _, length = facts.shape.partition("x")
    if int(rows) * int(length) < LARGE_BATCH:
        return Decision(
            "tokens",
            False,
            f"of {facts.shape} tokens, a batch is too small to gain (larger ones: --set stages.benchmark.batch_sizes=[32])",
        )
    settings = (
        "adapt.teacher=finetune",
        "adapt.methods.length_adaptive={num_sandwich: 1, length_drop: 0.25, layer_drop: 0.0, unit: fractions, "
        "temperature: 4.0}",
        "adapt.methods.distillation={temperature: 4.0, task_loss_weight: 0.0}",
        "adapt.epochs=1",
        "search.trials=60",
        f"search.bf16={str(facts.bf16).lower()}",
    )
    return Decision(
        "tokens",
        True,
        f"half of the inputs have {facts.tokens} tokens or more",
        tuple(f"stages.{setting}" for setting in settings),
    )


def _worth_it(taken: Sequence[str], budget: Budget) -> Decision:
    if budget.max_drop is None:
        return Decision("worth it", False, "no largest loss is asked for: every step goes on from the one before")
    gates = [(rule, stage) for rule, stage in (("layers", "depth"), ("width", "width")) if rule in taken]
    # The last step has nothing after it that could go on without it.
    gates = [(rule, stage) for rule, stage in gates if rule != taken[-1]]
    if not gates:
        return Decision("worth it", False, "there is no step after another")
    return Decision(
        "worth it",
        True,
        f"{' and '.join(rule for rule, _ in gates)} only where no more than {100 * budget.max_drop:.3g} % is lost",
        tuple(
            f"stages.{stage}.{setting}"
            for _, stage in gates
            for setting in ("skip=false", f"max_drop={budget.max_drop!r}")
        ),
    )


def _training(facts: Facts, steps: Sequence[Decision]) -> Decision:
    rate = 5e-5 if _long(facts) else usual_learning_rate(facts.width)
    skipped = {override for step in steps for override in step.overrides if override.endswith(".skip=true")}
    settings = ["stages.finetune.epochs=2"] if _long(facts) else []
    for stage, kind in _TRAINING.items():
        if f"stages.{stage}.skip=true" not in skipped:
            factor = stage_class(kind).rate_factor
            settings += [f"stages.{stage}.attention_dropout=0.0", f"stages.{stage}.learning_rate={factor * rate}"]
            settings += [f"stages.{stage}.batch_size={LONG_BATCH}"] if _long(facts) else []
            settings += [f"stages.{stage}.arguments={{bf16: true}}"] if facts.bf16 else []
    # Each of these is what is served; what lies between them is PyTorch.
    int8 = ["int8-dense", *(stage for step in steps if step.applies for stage in _INT8[step.rule])]
    settings.append(f"stages.benchmark.models=[{', '.join(int8)}]")
    return Decision(
        "training",
        True,
        f"learning rate {rate:g} for {facts.width} dims, {'bfloat16' if facts.bf16 else 'single precision'}",
        tuple(settings),
    )
