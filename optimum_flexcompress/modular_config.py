"""The config of modular training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from .errors import FlexCompressError, nearest
from .method_config import MethodConfig, check_number


INITIALIZATIONS = ("first", "middle", "last", "mean")
STACKS = ("encoder", "decoder")
STRATEGIES = SIZE_FIRST, SPEED_FIRST = "size-first", "speed-first"


@dataclass(kw_only=True)
class ModularConfig(MethodConfig):
    """Modular Transformers (arXiv 2306.02379): one training, many depths.

    Beside the layers of a stack stand modules. The module of granularity `g` and block `j` has the architecture of one
    layer and learns to do what the layers `g * j` to `g * j + g - 1` do. Each step replaces a random choice of blocks
    by their modules, which learn from the task and from the original layers of the same model. Afterwards any tiling
    of the stacks by layers and modules is a model: [`ModularModel`] assembles it. The saved folder is the full model,
    with the modules in a file beside it.

    Attributes:
        granularities: How many layers a module stands for. Those that divide the depth of a stack are used in it.
        stacks: Stacks that get modules, `encoder` and `decoder`; all of the model when `None`.
        initialization: The layer of its block that a module starts as: `first`, `middle`, `last`, or the `mean` of
            them.
        freeze_originals: Whether the original model stays as it is: its layers, embeddings and head. Where it does
            not, it is also the teacher while it changes.
        replacing_rate: Probability with which a block is replaced at the start. It rises linearly to 1.
        replacing_fraction: Share of the steps in which it rises.
        uniform_fraction: Share of the steps, all through the run, that draw the rate of each stack uniformly from
            [0, 1] instead: without them assemblies of few modules would go untrained.
        curriculum_fraction: Share of the steps in which granularities join, from fine to coarse, evenly spaced.
        logits_weight: Weight of the logits of the original model, as in [`DistillationConfig`].
        temperature: Softens both distributions of the logits term.
        hidden_states_weight: Weight of the error in hidden states at the end of replaced blocks: squared, relative to
            the squared length of the original's, since the residual stream grows from layer to layer. Taken before
            the final norm of the stack.
        blocks_weight: Weight of the same error of every module in every step, on its own: it is given the hidden states
            that the original model has at the start of its block. A route trains a few modules in a step; this trains
            all of them, at the price of one more pass through each.
        attention_weight: Weight of the KL divergence between the attention maps of a module and those of the last
            layer that it stands for; in decoders of cross-attention too. Both attend eagerly in training steps.
        task_loss_weight: Weight of the model's own loss on the labels.
        ratios: Ratios of the assemblies that are wanted in the end, each above 1, where they are known. The last steps
            then run these alone, one of them in each, which makes them better and others worse: any other assembly is
            among the routes of the earlier steps only.
        ratios_strategy: How they are assembled: `size-first`, or `speed-first`.
        ratios_fraction: Share of the steps that the last ones are, in (0, 1]; without `ratios` it has no meaning.
        evaluated_ratio: What evaluations during training run: the size-first assembly of this ratio, or the one of
            the fewest layers when `None`.
    """

    method_type: ClassVar[str] = "modular"

    granularities: list[int] = field(default_factory=lambda: [2, 3, 4, 6])
    stacks: list[str] | None = None
    initialization: str = "first"
    freeze_originals: bool = True
    replacing_rate: float = 0.3
    replacing_fraction: float = 0.6
    uniform_fraction: float = 0.3
    curriculum_fraction: float = 0.4
    logits_weight: float = 1.0
    temperature: float = 2.0
    hidden_states_weight: float = 1.0
    blocks_weight: float = 1.0
    attention_weight: float = 0.1
    task_loss_weight: float = 1.0
    ratios: list[float] | None = None
    ratios_strategy: str = SIZE_FIRST
    ratios_fraction: float = 0.7
    evaluated_ratio: float | None = None

    def __post_init__(self):
        self._check_granularities()
        if self.stacks is not None:
            if isinstance(self.stacks, str) or not isinstance(self.stacks, Sequence) or not self.stacks:
                raise FlexCompressError(f"modular.stacks is {self.stacks!r}: give a list of {' and '.join(STACKS)}.")
            for name in self.stacks:
                if name not in STACKS:
                    raise FlexCompressError(f'modular.stacks names "{name}".{nearest(str(name), STACKS)}')
            self.stacks = list(dict.fromkeys(self.stacks))
        if self.initialization not in INITIALIZATIONS:
            hint = nearest(str(self.initialization), INITIALIZATIONS)
            raise FlexCompressError(f"modular.initialization is {self.initialization!r}.{hint}")
        for name in ("replacing_rate", "replacing_fraction", "uniform_fraction", "curriculum_fraction"):
            value = getattr(self, name)
            check_number(f"modular.{name}", value, minimum=0.0)
            if value > 1:
                raise FlexCompressError(f"modular.{name} is {value:g}: give a share between 0 and 1.")
        names = ("logits_weight", "hidden_states_weight", "blocks_weight", "attention_weight", "task_loss_weight")
        self._check_weights(*names)
        if not any(getattr(self, name) for name in names):
            raise FlexCompressError(f"modular has no loss: set one of {', '.join(names)} above 0.")
        check_number("modular.temperature", self.temperature, above=0.0)
        self._check_ratios()
        if self.evaluated_ratio is not None:
            check_number("modular.evaluated_ratio", self.evaluated_ratio, minimum=1.0)

    def _check_granularities(self) -> None:
        given = self.granularities
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise FlexCompressError(f"modular.granularities is {given!r}: give a list such as [2, 3, 4, 6].")
        for granularity in given:
            check_number("modular.granularities", granularity, minimum=2, integer=True)
        self.granularities = sorted(set(given))

    def _check_ratios(self) -> None:
        if self.ratios is not None:
            if isinstance(self.ratios, str) or not isinstance(self.ratios, Sequence) or not self.ratios:
                raise FlexCompressError(f"modular.ratios is {self.ratios!r}: give a list such as [1.5, 3, 6].")
            for ratio in self.ratios:
                check_number("modular.ratios", ratio, above=1.0)
            self.ratios = sorted(set(map(float, self.ratios)))
        if self.ratios_strategy not in STRATEGIES:
            hint = nearest(str(self.ratios_strategy), STRATEGIES)
            raise FlexCompressError(f"modular.ratios_strategy is {self.ratios_strategy!r}.{hint}")
        check_number("modular.ratios_fraction", self.ratios_fraction, above=0.0)
        if self.ratios_fraction > 1:
            raise FlexCompressError(f"modular.ratios_fraction is {self.ratios_fraction:g}: give a share of up to 1.")

    @classmethod
    def theseus(cls, granularity: int = 2, **settings) -> ModularConfig:
        """BERT-of-Theseus (arXiv 2002.02925): one granularity, the task loss alone, a rate that rises to 1.

        Two things differ from the paper: modules start as the first layer of what they stand for, not as the first layers
        of the model, and every route has a module, since one without any would teach nothing.

        Args:
            granularity: How many layers a successor stands for.
            **settings: Other fields, such as `replacing_rate`.
        """
        alone = {
            "logits_weight": 0.0,
            "hidden_states_weight": 0.0,
            "blocks_weight": 0.0,
            "attention_weight": 0.0,
            "uniform_fraction": 0.0,
            "curriculum_fraction": 0.0,
        }
        return cls(granularities=[granularity], **{**alone, **settings})

    @property
    def has_teacher(self) -> bool:
        """Whether the original layers run too, to be learned from."""
        return bool(self.logits_weight or self.hidden_states_weight or self.blocks_weight or self.attention_weight)
