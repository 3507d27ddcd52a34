"""What a compression method is to the trainer."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import Projection
from ..configuration import MethodConfig
from ..errors import FlexCompressError


if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainingArguments


@dataclass
class ParameterGroup:
    """Parameters of a method, trained by the trainer's optimizer next to the weights of the model.

    Their gradients are clipped apart from those of the model, and as a rule they have no weight decay.

    Attributes:
        name: Unique within the method.
        parameters: The parameters; they are not part of the model.
        learning_rate: Learning rate; the trainer's when `None`.
        schedule: `None` follows the trainer's schedule; a function of (step, total steps) gives a factor of the
            learning rate of its own. [`constant`] is one.
        max_grad_norm: Bound of the gradient norm over the group; the trainer's when `None`.
        maximize: Gradient ascent, for the multipliers of a constraint.
        decays: Whether the trainer's weight decay holds for it too, as it should for weights of a model.
    """

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float | None = None
    schedule: Callable[[int, int], float] | None = None
    max_grad_norm: float | None = None
    maximize: bool = False
    decays: bool = False


def constant(step: int, total_steps: int) -> float:
    """The schedule that keeps the learning rate as it is."""
    return 1.0


@dataclass
class LossTerm:
    """One term of the loss of one batch.

    Attributes:
        value: For a term over items (samples, tokens), its *sum* over the items of the batch: the trainer divides by
            what [`CompressionMethod.count_items`] found in all batches of the optimizer step, on all processes. For a
            term of the step as a whole, its value.
        weight: Factor of the term in the loss; logs show the term without it.
        per_item: Whether the term runs over items.
    """

    value: torch.Tensor
    weight: float = 1.0
    per_item: bool = True


@dataclass
class Needs:
    """What a method reads from a forward pass of the student and of the teacher, apart from the student's outputs.

    Attributes:
        teacher: Whether there has to be a teacher.
        teacher_logits: The teacher's head has to run.
        hidden_states: Hidden states of every layer, of both models, in the full pass.
        attentions: Attention maps, of both models, in the full pass: they attend eagerly there.
        student_projections: Projections whose outputs are captured, by keys that start with the method's name.
        teacher_projections: The same in the teacher.
        undropped_attentions: Attention modules of the student whose maps are compared: dropout on the maps is off
            there, because a dropped entry has probability 0.
    """

    teacher: bool = False
    teacher_logits: bool = False
    hidden_states: bool = False
    attentions: bool = False
    student_projections: dict[Any, Projection] = field(default_factory=dict)
    teacher_projections: dict[Any, Projection] = field(default_factory=dict)
    undropped_attentions: list[nn.Module] = field(default_factory=list)


FULL_PASS = "full"
"""Name of the pass that runs the whole model on the task."""

EXISTING_LAYERS = "existing_layers"
"""Key in [`Step.shared`] of a function that a method sets in `before_forward` where layers come and go: once the
student has run it returns, by stack, Booleans `[layers]`."""


@dataclass
class Step:
    """One forward pass in training, as methods see it.

    Attributes:
        model: The student, unwrapped. Calling it inside a method (say, as its own teacher) runs it without methods.
        inputs: The batch, labels included, on the device.
        global_step: Optimizer steps done so far.
        max_steps: Optimizer steps of the run.
        micro_step: Index of the batch among those accumulated for this optimizer step.
        micro_steps: How many those are.
        pass_name: Which of [`CompressionMethod.passes`] this is.
        seed: Seed of the run.
        shared: Lives as long as the batch: carries results from one pass to the next.
        outputs: What the student returned.
        captured: Outputs of the student's projections, by key.
        teacher_outputs: What the teacher returned, if any method asked.
        teacher_captured: Outputs of the teacher's projections, by key.
        loss_scale: What the loss is multiplied by before its backward pass (mixed precision in fp16).
    """

    model: PreTrainedModel
    inputs: dict[str, Any]
    global_step: int
    max_steps: int
    micro_step: int
    pass_name: str
    seed: int
    shared: dict[str, Any]
    outputs: Any = None
    captured: dict[Any, torch.Tensor] = field(default_factory=dict)
    teacher_outputs: Any = None
    teacher_captured: dict[Any, torch.Tensor] = field(default_factory=dict)
    micro_steps: int = 1
    loss_scale: float = 1.0

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator seeded by (seed, step, batch, name): what it draws is the same on all processes, and in a
        run that was killed and resumed.
        """
        key = f"{self.seed}/{self.global_step}/{self.micro_step}/{name}".encode()
        return torch.Generator().manual_seed(zlib.crc32(key))


@dataclass
class PrepareContext:
    """What a method is given at the start of training.

    Attributes:
        model: The student, unwrapped.
        teacher: The teacher, or `None`.
        args: The training arguments.
        methods: The configs of all methods of the run.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    args: TrainingArguments
    methods: Sequence[MethodConfig] = ()


class CompressionMethod:
    """A compression method, driven by the trainer.

    The order of calls: `validate` when the trainer is built; `prepare` when training starts, then `load_state_dict`
    where it resumes, `attach` and `start`; in each step, for each of `passes`, `before_forward` and `loss_terms`, both
    inside the wrapped forward of the model, and `after_pass` when its backward is done; `on_step` and `checkpoint_due`
    after the optimizer; `detach` and `finalize` at the end.

    Parameters of a method live in `modules`, outside the model: they are trained, synchronised between processes and
    kept in the trainer's checkpoints, and are no part of the saved model.

    Attributes:
        config: The config.
        needs: What it reads from a forward pass; to be set by `prepare`.
        modules: Modules with the method's own parameters and buffers; to be filled by `prepare`.
        restructures: Whether `finalize` changes the model.
    """

    restructures: ClassVar[bool] = False

    def __init__(self, config: MethodConfig):
        self.config = config
        self.needs = Needs()
        self.modules = nn.ModuleDict()

    def validate(self, context: PrepareContext) -> None:
        """Raises [`FlexCompressError`] for what can be known to fail before training starts."""

    @property
    def compares_tokens(self) -> bool:
        """Whether it compares student and teacher token by token inside their layers, where none may be missing."""
        return False

    @property
    def drops_tokens(self) -> bool | None:
        """Whether layers drop tokens in the full pass; `None` where the method leaves that to the model."""
        return None

    def prepare(self, context: PrepareContext) -> None:
        """Sets `needs` and `modules`, and changes the model where the method asks for it.

        Random numbers drawn here come from the run's seed and leave the global generators as they were.
        """

    def parameter_groups(self) -> list[ParameterGroup]:
        """The optimizer's groups for the parameters in `modules`; each parameter is in exactly one."""
        return []

    def data_share(self) -> float:
        """The share of the training data to use, chosen by the run's seed; the least of all methods counts."""
        return 1.0

    def least_steps(self) -> int:
        """Fewest optimizer steps where the length of the run is given in epochs."""
        return 0

    def start(self, max_steps: int) -> None:
        """Called when the number of optimizer steps is known, before the first one, also of a run that is resumed.

        Raises:
            FlexCompressError: They are too few.
        """

    def attach(self, model: PreTrainedModel) -> None:
        """Puts the method's own hooks on the model, for as long as training lasts, evaluations included.

        They are taken away from a model that is copied or finalised.
        """

    def detach(self) -> None:
        """Takes away what `attach` put in place."""

    def passes(self, step: int, max_steps: int) -> Sequence[str]:
        """Forward and backward passes of one batch, in order. At most one method of a run asks for more than one."""
        return (FULL_PASS,)

    def before_forward(self, step: Step) -> None:
        """Called before the student's forward pass: choose routes, lengths or noise, run a pass as own teacher."""

    def count_items(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """How many items each term over items has in a batch, by the names of `loss_terms`; read from inputs alone."""
        return {}

    def loss_terms(self, step: Step) -> dict[str, LossTerm]:
        """The terms of this pass, by name (logged as `loss_<name>`). The same names in every step of a pass."""
        return {}

    def task_loss_weight(self, step: Step) -> float:
        """Factor of the model's own loss in this pass; the factors of all methods are multiplied."""
        return 1.0

    def pass_weight(self, step: Step) -> float:
        """Factor of the whole loss of this pass, other methods' terms included; the factors of all are multiplied."""
        return 1.0

    def after_pass(self, step: Step) -> None:
        """Called after the backward of a pass, also where it failed: undo what `before_forward` did to the model."""

    def on_step(self, step: int, max_steps: int) -> None:
        """Called after each optimizer step, with the steps done so far: bound multipliers, move schedules."""

    def checkpoint_due(self, step: int, max_steps: int) -> str | None:
        """The name of a folder below the output folder where the model, finalised, is to be saved after this step."""
        return None

    def log_values(self) -> dict[str, float]:
        """Values to log next to the loss terms, such as the sparsity reached. Called when the trainer logs."""
        return {}

    def check(self) -> None:
        """Called before a checkpoint or a model is written.

        Raises:
            FlexCompressError: What would be written is of no use, and might push a good checkpoint out.
        """

    def is_ready(self) -> bool:
        """Whether the model meets the method's target now; only then can a checkpoint become the best model."""
        return True

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        """Makes the compression physical. Called on the model, or on a copy to save in the middle of training.

        Returns:
            The model to go on with: the same object, or a new one.
        """
        return model

    def save_beside(self, folder: str | os.PathLike) -> None:
        """Writes what belongs to the saved model into its folder. Called where the user saves; see `state_dict`."""

    def card_lines(self) -> list[str]:
        """What the model card of the saved model says about the method, as Markdown lines with a heading."""
        return []

    def final_values(self, model: PreTrainedModel) -> dict[str, float]:
        """Values to log once the model is finalised, such as what it was measured to take."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain values only. Extend it for state outside `modules`."""
        return {"modules": self.modules.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.modules.load_state_dict(state["modules"])


METHODS: dict[type[MethodConfig], type[CompressionMethod]] = {}


def register_method(config_class: type[MethodConfig], method_class: type[CompressionMethod]) -> None:
    """Makes `method_class` act for configs of `config_class`."""
    METHODS[config_class] = method_class


def create_method(config: MethodConfig) -> CompressionMethod:
    """The method for a config.

    Raises:
        FlexCompressError: No method is registered for the config's class.
    """
    if type(config) not in METHODS:
        raise FlexCompressError(
            f"No method is registered for {type(config).__name__}: call register_method({type(config).__name__}, ...) "
            "before training."
        )
    return METHODS[type(config)](config)
