"""Trainers that compress while they train."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils.data
from accelerate.utils import DynamoBackend
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainerCallback

from .configuration import FlexCompressConfig
from .errors import FlexCompressError
from .methods.base import PrepareContext, Step
from .methods.groups import GROUP_KEY, MethodGroups
from .methods.runner import LossScale, MethodRunner
from .methods.teacher import unwrap_peft
from .trainer_saving import SavingMixin


logger = logging.getLogger(__name__)


class _MethodCallback(TrainerCallback):
    """Calls the methods at the moments for which the trainer has no method to override."""

    def __init__(self, trainer: FlexCompressMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._groups.zero_grad()
        self._trainer._runner.reset_logs()
        self._trainer._logged_step = state.global_step
        self._trainer._runner.start(state.max_steps)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self._trainer
        bounds = [group.max_grad_norm for group in trainer._groups.groups.values()]
        if not args.max_grad_norm and any(bounds):
            # The trainer unscales fp16 gradients only where it clips, and unscaling twice is an error.
            trainer.accelerator.unscale_gradients()
        trainer._groups.before_step(trainer.optimizer, state.global_step, state.max_steps, args.max_grad_norm)

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer._groups.zero_grad()
        runner = self._trainer._runner
        runner.on_step(state.global_step, state.max_steps)
        for name in runner.checkpoints_due(state.global_step, state.max_steps):
            self._trainer.save_model(os.path.join(args.output_dir, name))


class FlexCompressMixin(SavingMixin):
    """Adds compression to a Transformers trainer, through its hooks alone.

    Args:
        teacher_model: The model that distillation learns from. It is moved to the training device, runs in evaluation
            mode without gradients, is not called in evaluation, and is not saved.
        compression_config: The methods. With `None` (or no methods) this is the stock trainer.
        teacher_processing_class: The teacher's tokenizer, to make sure that it is the student's too; where it is
            `None` and the teacher was loaded from a local folder, the tokenizer is taken from there.
        *args, **kwargs: Those of the stock trainer.

    Raises:
        FlexCompressError: The methods and models do not fit together.
    """

    def __init__(
        self,
        *args,
        teacher_model: PreTrainedModel | None = None,
        compression_config: FlexCompressConfig | None = None,
        teacher_processing_class: Any = None,
        **kwargs,
    ):
        self._runner: MethodRunner | None = None
        self.compression_config = compression_config
        # Makes the repository, where the training arguments ask for a push.
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model
        if compression_config is None or not compression_config.methods:
            if teacher_model is not None:
                raise FlexCompressError(
                    "teacher_model is given, but no method uses it: pass compression_config=FlexCompressConfig("
                    "methods=[DistillationConfig()]), or leave the teacher out."
                )
            return
        self._runner = MethodRunner(compression_config, teacher_model)
        self._check_environment()
        self._runner.validate(self._prepare_context(), self.processing_class, teacher_processing_class)
        self.add_callback(_MethodCallback(self))

    def _prepare_context(self) -> PrepareContext:
        return PrepareContext(self.model, self.teacher_model, self.args, self.compression_config.methods)

    def _check_environment(self) -> None:
        if self.args.n_gpu > 1:
            raise FlexCompressError(
                "Several GPUs in one process (DataParallel) cannot run compression methods: start one process per GPU "
                "with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise FlexCompressError(
                "Compression methods do not run under DeepSpeed or FSDP, which shard the modules they look into: use "
                "`accelerate launch` with plain data parallelism."
            )
        # The launcher can ask for compilation too, past the training arguments.
        if self.args.torch_compile or self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise FlexCompressError(
                "Compression methods act through hooks, which a compiled model does not call: leave torch_compile out "
                "(and --dynamo_backend, where `accelerate launch` sets it)."
            )
        if self.args.gradient_checkpointing:
            self._use_non_reentrant(self.args.gradient_checkpointing_kwargs or {})

    def _use_non_reentrant(self, kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("use_reentrant"):
            raise FlexCompressError(
                "Reentrant gradient checkpointing cuts captured activations off their gradient: leave "
                'gradient_checkpointing_kwargs out, or set {"use_reentrant": False}.'
            )
        self.args.gradient_checkpointing_kwargs = {**kwargs, "use_reentrant": False}

    # Start and end of training

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        arguments = {
            "batch_size": batch_size,
            "args": args,
            "resume_from_checkpoint": resume_from_checkpoint,
            "trial": trial,
            "ignore_keys_for_eval": ignore_keys_for_eval,
        }
        runner = self._runner
        if runner is None:
            return super()._inner_training_loop(**arguments)
        context = self._prepare_context()
        if runner.prepared_for is not self.model:
            # A model from model_init, or one that has changed since the last training.
            runner.validate(context, self.processing_class, None)
            if runner.prepared_for is not None:
                self.optimizer, self.lr_scheduler = None, None
        if getattr(unwrap_peft(self.model), "is_gradient_checkpointing", False):
            self._make_checkpointing_non_reentrant()
        runner.prepare(context, self.label_names)
        if resume_from_checkpoint is not None:
            runner.load(resume_from_checkpoint)
        self._groups = MethodGroups(runner.methods)
        runner.attach()
        try:
            with self._frozen_models_unwrapped():
                result = super()._inner_training_loop(**arguments)
        finally:
            runner.detach()
        self._finalize()
        return result

    @contextlib.contextmanager
    def _frozen_models_unwrapped(self) -> Iterator[None]:
        """On CPUs Accelerate wraps models in DDP even where nothing in them is trained, which DDP refuses.

        The methods' parameters, all that is trained then, are averaged between processes without it.
        """
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            yield
            return
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        try:
            yield
        finally:
            del self.accelerator.prepare_model

    def _make_checkpointing_non_reentrant(self) -> None:
        """For a model on which the user called `gradient_checkpointing_enable`."""
        if self.args.gradient_checkpointing:
            return
        model = unwrap_peft(self.model)
        logger.info("Gradient checkpointing continues with use_reentrant=False, which captured activations need.")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _finalize(self) -> None:
        model = self._runner.finalize(self.model)
        values = self._runner.final_values(model)
        if values:
            self.log(values)
        if self._runner.restructures:
            # Wrappers and optimizer know the old parameters.
            self.model = self.model_wrapped = self.callback_handler.model = model
            self.accelerator._models.clear()
            self._runner.prepared_for = None
            self.optimizer, self.lr_scheduler = None, None

    def get_train_dataloader(self):
        share = 1.0 if self._runner is None else self._runner.data_share()
        if share == 1.0 or self.train_dataset is None:
            return super().get_train_dataloader()
        whole = self.train_dataset
        self.train_dataset = _some_of(whole, share, self.args.data_seed or self.args.seed)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = whole

    def set_initial_training_values(self, args, dataloader, total_train_batch_size):
        values = super().set_initial_training_values(args, dataloader, total_train_batch_size)
        max_steps = values[-1]
        if self._runner is None or args.max_steps > 0 or max_steps >= self._runner.least_steps():
            return values
        args = copy.copy(args)
        args.max_steps = self._runner.least_steps()
        return super().set_initial_training_values(args, dataloader, total_train_batch_size)

    def create_optimizer(self):
        given = self.optimizer is not None
        optimizer = super().create_optimizer()
        if self._runner is None or not self._groups.groups:
            return optimizer
        if not any(GROUP_KEY in options for options in self.optimizer.param_groups):
            if given and self.lr_scheduler is not None:
                raise FlexCompressError(
                    "The methods add parameters to the optimizer, which the given scheduler does not know: pass "
                    "optimizers=(optimizer, None), or neither."
                )
            self._groups.add_to(self.optimizer, self.args)
        return self.optimizer

    def _wrap_model(self, model, training=True, dataloader=None):
        wrapped = super()._wrap_model(model, training=training, dataloader=dataloader)
        handler = self.accelerator.ddp_handler
        if self._runner is not None and handler is not None and self.args.ddp_find_unused_parameters is None:
            # A pass need not reach every weight: with MiniLM alone the top of the last layer has no gradient. Safe
            # with gradient checkpointing too, where it is not reentrant.
            handler.find_unused_parameters = True
        return wrapped

    # Steps

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._runner is not None:
            self._runner.count(batches, self.accelerator)
            self._micro_step = 0
        return batches, num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        runner = self._runner
        if runner is None:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        scale = self._loss_scale(inputs, num_items_in_batch)
        passes = runner.passes(self.state.global_step, self.state.max_steps)
        shared: dict[str, Any] = {}
        scaler = self.accelerator.scaler
        total = None
        for index, pass_name in enumerate(passes):
            step = Step(
                model=self.model,
                inputs=dict(inputs),
                global_step=self.state.global_step,
                max_steps=self.state.max_steps,
                micro_step=self._micro_step,
                pass_name=pass_name,
                seed=self.args.seed,
                shared=shared,
                micro_steps=scale.micro_steps,
                loss_scale=1.0 if scaler is None else scaler.get_scale(),
            )
            last = index == len(passes) - 1
            # Gradients travel between processes once per step, with the last pass of the last batch.
            sync = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
            with sync, runner.step(step, scale):
                loss = super().training_step(model, dict(inputs), num_items_in_batch)
            total = loss if total is None else total + loss
        self._micro_step += 1
        if self.accelerator.sync_gradients:
            self._groups.average_gradients(self.accelerator.num_processes)
        return total

    def _loss_scale(self, inputs: Mapping[str, Any], num_items_in_batch: Any) -> LossScale:
        """What the trainer will do to the loss, by the conditions of its `compute_loss` and `training_step`."""
        counted = num_items_in_batch is not None
        custom = self.compute_loss_func is not None
        multiplied = self.args.average_tokens_across_devices and counted and (self.model_accepts_loss_kwargs or custom)
        divided = not custom and not (self.model_accepts_loss_kwargs and counted)
        micro_steps = self.current_gradient_accumulation_steps
        processes = self.accelerator.num_processes
        return LossScale(
            divided=micro_steps if divided else 1,
            multiplied=processes if multiplied else 1,
            processes=processes,
            micro_steps=micro_steps,
            task_outside=custom or (self.label_smoother is not None and "labels" in inputs),
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        runner = self._runner
        if runner is None or runner.current is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if runner.scale.task_outside:
            runner.record_task_loss(loss)
            loss = runner.task_weight * loss + outputs["loss"] * runner.scale.multiplied
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        # The trainer's own step log is the one with a learning rate; it is made on all processes at once.
        if self._runner is not None and "loss" in logs and "learning_rate" in logs:
            steps = self.state.global_step - self._logged_step
            self._logged_step = self.state.global_step
            terms = self._runner.pop_logs(steps, self._nested_gather)
            logs.update({name: round(value, 6) for name, value in terms.items()})
            if "grad_norm" in logs:
                # The trainer knows the model's own weights alone, which a method may have frozen.
                logs["grad_norm"] = math.hypot(logs["grad_norm"], self._groups.gradient_norm())
        super().log(logs, start_time)

    # Checkpoints

    def _determine_best_metric(self, metrics, trial):
        if self._runner is not None and not self._runner.is_ready():
            return False
        return super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self._runner is not None:
            self.compression_config.save_pretrained(output_dir if output_dir is not None else self.args.output_dir)

    def _load_best_model(self):
        super()._load_best_model()
        if self._runner is not None:
            self._runner.load(self.state.best_model_checkpoint)


def _some_of(dataset: Any, share: float, seed: int) -> Any:
    """A share of a data set, chosen by a seed.

    Raises:
        FlexCompressError: The data set has no length.
    """
    if not hasattr(dataset, "__len__"):
        raise FlexCompressError(
            f"{type(dataset).__name__} has no length, so no share of it can be taken: pass a data set that is not "
            "streamed, or take the share yourself, as dataset.take(1000) does, and set data_fraction=1."
        )
    count = max(round(share * len(dataset)), 1)
    indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    if hasattr(dataset, "select"):
        return dataset.select(indices.tolist())
    return torch.utils.data.Subset(dataset, indices.tolist())


class FlexCompressTrainer(FlexCompressMixin, Trainer):
    """[`transformers.Trainer`] with compression; see [`FlexCompressMixin`] for what it takes in addition."""


class FlexCompressSeq2SeqTrainer(FlexCompressMixin, Seq2SeqTrainer):
    """[`transformers.Seq2SeqTrainer`] with compression; see [`FlexCompressMixin`] for what it takes in addition."""
