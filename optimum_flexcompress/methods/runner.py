"""Runs the methods inside the student's forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..configuration import FlexCompressConfig
from ..errors import FlexCompressError
from ..token_dropping import lengths_of
from .base import FULL_PASS, LossTerm, Needs, PrepareContext, Step, create_method
from .capture import Capture, eager_attention
from .teacher import Teacher, check_teacher, unwrap_peft


logger = logging.getLogger(__name__)

STATE_NAME = "flexcompress_state.pt"
"""File in the trainer's checkpoints with what the methods have learned so far."""


@dataclasses.dataclass
class LossScale:
    """How the loss that leaves the wrapped forward reaches the gradient.

    Attributes:
        divided: What the trainer divides the loss by afterwards.
        multiplied: What it multiplies it with.
        processes: Over how many processes gradients are averaged.
        micro_steps: Batches of this optimizer step.
        task_outside: Whether the trainer computes the model's own loss itself, from the outputs.
    """

    divided: int = 1
    multiplied: int = 1
    processes: int = 1
    micro_steps: int = 1
    task_outside: bool = False


class MethodRunner:
    """The methods of a run, their teacher, and the hooks through which they act.

    The hooks sit on the unwrapped student, so that its wrapper (DDP, autocast) sees the methods' losses as part of
    the forward pass. They do nothing outside [`step`].

    Args:
        config: The methods.
        teacher: The teacher, or `None`.
    """

    def __init__(self, config: FlexCompressConfig, teacher: PreTrainedModel | None):
        self.methods = [create_method(method) for method in config.methods]
        self.teacher_model = teacher
        self.prepared_for: PreTrainedModel | None = None
        self._needs = Needs()
        self._teacher: Teacher | None = None
        self._handles: list[Any] = []
        self._step: Step | None = None
        self._scale = LossScale()
        self._depth = 0
        self.task_weight = 1.0
        self._item_counts: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}

    # Before training

    def validate(self, context: PrepareContext, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
        """Raises [`FlexCompressError`] for what can be known to fail before training starts."""
        if context.teacher is not None:
            check_teacher(context.model, context.teacher, student_tokenizer, teacher_tokenizer)
        for method in self.methods:
            method.validate(context)
        self._check_tokens(context)

    def _check_tokens(self, context: PrepareContext) -> None:
        comparing = [method.config.method_type for method in self.methods if method.compares_tokens]
        answers = [method.drops_tokens for method in self.methods if method.drops_tokens is not None]
        if comparing and (any(answers) if answers else lengths_of(unwrap_peft(context.model)) is not None):
            raise FlexCompressError(
                f"{comparing[0]} compares the student's layers with the teacher's token by token, and a fixed length "
                "configuration drops tokens on the way: distil first and set the lengths afterwards, or distil logits "
                "alone."
            )

    def prepare(self, context: PrepareContext, label_names: list[str]) -> None:
        """Prepares the methods for a model; does nothing where they already are."""
        if self.prepared_for is context.model:
            return
        self._device = device = context.args.device
        devices = [device] if device.type == "cuda" else []
        # What the methods draw must not move the dropout of the run, and has to agree between processes.
        with torch.random.fork_rng(devices):
            torch.manual_seed(context.args.seed)
            for method in self.methods:
                method.prepare(context)
                method.modules.to(device)
        self._needs = _merge([method.needs for method in self.methods])
        if self._needs.attentions:
            logger.warning(
                "Attention maps are compared: student and teacher attend eagerly in training steps, which is slower, "
                "and dropout on the compared maps is off. Evaluation and the saved model keep their attention."
            )
        self._capture = Capture(self._needs.student_projections)
        self._accepts = set(inspect.signature(context.model.forward).parameters)
        if self._needs.teacher:
            self._teacher = Teacher(context.teacher.to(device), self._needs, label_names)
        self.prepared_for = context.model

    def attach(self) -> None:
        """Puts the hooks in place."""
        self.detach()
        model = self.prepared_for
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        for method in self.methods:
            method.attach(model)
        self._capture.attach()
        if self._teacher is not None:
            self._teacher.attach()

    def detach(self) -> None:
        """Takes all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.prepared_for is not None:
            for method in self.methods:
                method.detach()
            self._capture.detach()
            if self._teacher is not None:
                self._teacher.detach()

    def data_share(self) -> float:
        return min((method.data_share() for method in self.methods), default=1.0)

    def least_steps(self) -> int:
        return max((method.least_steps() for method in self.methods), default=0)

    def start(self, max_steps: int) -> None:
        for method in self.methods:
            method.start(max_steps)

    # In a step

    def passes(self, step: int, max_steps: int) -> Sequence[str]:
        """The passes of a batch.

        Raises:
            FlexCompressError: Two methods want several passes.
        """
        wanted = [passes for passes in (method.passes(step, max_steps) for method in self.methods) if len(passes) > 1]
        if len(wanted) > 1:
            raise FlexCompressError("Two methods run several passes per step: give them to two trainers, in turn.")
        return wanted[0] if wanted else (FULL_PASS,)

    def count(self, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> None:
        """Counts the items of each term over the batches of one optimizer step, on all processes."""
        counts: dict[str, torch.Tensor] = {}
        for batch in batches:
            for method in self.methods:
                for name, value in method.count_items(batch).items():
                    value = torch.as_tensor(value, device=accelerator.device, dtype=torch.float32)
                    counts[name] = counts[name] + value if name in counts else value
        if counts:
            total = torch.stack(list(counts.values()))
            if accelerator.num_processes > 1:
                total = accelerator.reduce(total, "sum")
            counts = dict(zip(counts, total.clamp_min(1).unbind(), strict=True))
        self._item_counts = counts

    @contextlib.contextmanager
    def step(self, step: Step, scale: LossScale) -> Iterator[None]:
        """Has the methods act on the student's forward pass while the block runs, which includes its backward."""
        self._step, self._scale, self._depth = step, scale, 0
        maps = self._needs.attentions and step.pass_name == FULL_PASS
        attention = eager_attention(step.model) if maps else contextlib.nullcontext()
        try:
            with attention:
                yield
        finally:
            self._step = None
            for method in self.methods:
                method.after_pass(step)

    @property
    def current(self) -> Step | None:
        """The pass that is running, if any."""
        return self._step

    @property
    def scale(self) -> LossScale:
        return self._scale

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        step = self._step
        if step is None:
            return None
        self._depth += 1
        if self._depth > 1:
            return None
        for method in self.methods:
            method.before_forward(step)
        for module in self._needs.undropped_attentions:
            module.eval()
        kwargs = {**kwargs, "return_dict": True}
        # Other passes are not compared with the teacher.
        if self._needs.hidden_states and step.pass_name == FULL_PASS:
            kwargs["output_hidden_states"] = True
        if self._needs.attentions and step.pass_name == FULL_PASS:
            kwargs["output_attentions"] = True
        if "use_cache" in self._accepts:
            kwargs["use_cache"] = False
        self._capture.start()
        return args, kwargs

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, outputs: ModelOutput) -> Any:
        step = self._step
        if step is None:
            return None
        self._depth -= 1
        if self._depth > 0:
            return None
        # Depth stays above zero while the methods run: a model they call themselves passes through.
        self._depth = 1
        step.outputs, step.captured = outputs, self._capture.stop()
        if self._teacher is not None and step.pass_name == FULL_PASS:
            self._teacher.run(step)
        # Terms are computed in float32 even where the forward pass is not.
        with torch.autocast(self._device.type, enabled=False):
            total, self.task_weight = self._total_loss(step)
        self._depth = 0
        return self._training_outputs(outputs, total)

    def _total_loss(self, step: Step) -> tuple[torch.Tensor, float]:
        task_weight = 1.0
        total = None
        for method in self.methods:
            task_weight *= method.task_loss_weight(step)
            for name, term in method.loss_terms(step).items():
                value = self._normalised(name, term)
                self._record(name, value)
                # Undo what the trainer will do to the loss, which suits the model's own loss only.
                share = term.weight * value * (self._scale.divided / self._scale.multiplied)
                total = share if total is None else total + share
        if task_weight and not self._scale.task_outside:
            loss = step.outputs.get("loss")
            if loss is None:
                raise FlexCompressError(
                    f"{type(step.model).__name__} returned no loss of its own: give it a head and labels, or set "
                    "task_loss_weight=0 to train on the distillation terms alone."
                )
            self.record_task_loss(loss * self._scale.multiplied)
            total = task_weight * loss if total is None else total + task_weight * loss
        if total is None and self._scale.task_outside and task_weight:
            # The trainer adds the only loss there is.
            total = torch.zeros((), device=self._device)
        if total is None:
            raise FlexCompressError(
                f'The pass "{step.pass_name}" has no loss: give a method a weight above 0, or task_loss_weight.'
            )
        pass_weight = math.prod(method.pass_weight(step) for method in self.methods)
        return total * pass_weight, task_weight * pass_weight

    def _normalised(self, name: str, term: LossTerm) -> torch.Tensor:
        if not term.per_item:
            return term.value / self._scale.micro_steps
        if name not in self._item_counts:
            raise FlexCompressError(f'The term "{name}" is summed over items that count_items does not count.')
        # Gradients are averaged over processes, while the count is that of all of them.
        return term.value * (self._scale.processes / self._item_counts[name])

    def _training_outputs(self, outputs: ModelOutput, total: torch.Tensor) -> Any:
        """The outputs that leave the wrapped forward.

        DDP takes every tensor among them for part of the loss, and then waits for gradients that never come; hence
        only the loss keeps its graph, and the outputs from which the trainer computes the model's own loss.
        """
        keep_graph = self._scale.task_outside and self.task_weight > 0
        requested = {"past_key_values"}
        if self._needs.hidden_states:
            requested |= {"hidden_states", "encoder_hidden_states", "decoder_hidden_states"}
        if self._needs.attentions:
            requested |= {"attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"}
        values = {name: value for name, value in outputs.items() if name != "loss" and name not in requested}
        if not keep_graph:
            values = {name: _detach(value) for name, value in values.items()}
        if any(field.name == "loss" for field in dataclasses.fields(outputs)):
            return type(outputs)(**{"loss": total, **values})
        return {"loss": total, **values}

    # Logs

    def record_task_loss(self, loss: torch.Tensor) -> None:
        """Notes the model's own loss of a batch, as the trainer will use it but for what it divides by later."""
        if self._step.pass_name == FULL_PASS:
            self._record("task", loss / self._scale.divided)

    def _record(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reset_logs(self) -> None:
        self._sums = {}

    def pop_logs(self, steps: int, gather) -> dict[str, float]:
        """Mean of each term over the optimizer steps since the last call, on all processes, and the methods' values.

        Args:
            steps: How many steps that were.
            gather: Collects a tensor from all processes.
        """
        logs = {}
        if self._sums and steps:
            values = torch.stack(list(self._sums.values())).view(1, -1)
            means = (gather(values).view(-1, len(self._sums)).mean(0) / steps).tolist()
            logs = {f"loss_{name}": mean for name, mean in zip(self._sums, means, strict=True)}
        self._sums = {}
        for method in self.methods:
            logs.update(method.log_values())
        return logs

    # After a step, and at the end

    def on_step(self, step: int, max_steps: int) -> None:
        for method in self.methods:
            method.on_step(step, max_steps)

    def checkpoints_due(self, step: int, max_steps: int) -> list[str]:
        names = (method.checkpoint_due(step, max_steps) for method in self.methods)
        return [name for name in names if name is not None]

    def check(self) -> None:
        for method in self.methods:
            method.check()

    def is_ready(self) -> bool:
        return all(method.is_ready() for method in self.methods)

    @property
    def restructures(self) -> bool:
        return any(method.restructures for method in self.methods)

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        """Makes the compression of all methods physical, in their order."""
        for method in self.methods:
            model = method.finalize(model)
        return model

    def final_values(self, model: PreTrainedModel) -> dict[str, float]:
        """The methods' values to log once the model is finalised."""
        return {name: value for method in self.methods for name, value in method.final_values(model).items()}

    # Checkpoints

    def save(self, folder: str | Path) -> None:
        """Writes the methods' state into a checkpoint."""
        state = {method.config.method_type: method.state_dict() for method in self.methods}
        torch.save(state, Path(folder) / STATE_NAME)

    def load(self, folder: str | Path) -> None:
        """Reads the methods' state from a checkpoint.

        Raises:
            FlexCompressError: The checkpoint has none, or that of other methods.
        """
        path = Path(folder) / STATE_NAME
        if not path.is_file():
            raise FlexCompressError(
                f"{folder} has no {STATE_NAME}: it was written without compression methods; resume from a checkpoint "
                "of a run with the same methods, or start anew."
            )
        state = read_state(path)
        wanted = [method.config.method_type for method in self.methods]
        if sorted(state) != sorted(wanted):
            raise FlexCompressError(
                f"{folder} holds the methods {', '.join(state)}, this run has {', '.join(wanted)}: resume with the "
                "same methods, or start anew."
            )
        for method in self.methods:
            method.load_state_dict(state[method.config.method_type])


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint keeps of the methods, by their type.

    Raises:
        FlexCompressError: The file is damaged.
    """
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise FlexCompressError(f"{path} is damaged: take another checkpoint, or start anew.") from error


def _merge(needs: list[Needs]) -> Needs:
    return Needs(
        teacher=any(need.teacher for need in needs),
        teacher_logits=any(need.teacher_logits for need in needs),
        hidden_states=any(need.hidden_states for need in needs),
        attentions=any(need.attentions for need in needs),
        student_projections={key: value for need in needs for key, value in need.student_projections.items()},
        teacher_projections={key: value for need in needs for key, value in need.teacher_projections.items()},
        undropped_attentions=[module for need in needs for module in need.undropped_attentions],
    )


def _detach(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        return type(value)(_detach(item) for item in value)
    return value
