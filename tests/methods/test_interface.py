"""The method interface, with a toy method that uses all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from optimum_flexcompress import DistillationConfig, FlexCompressConfig, FlexCompressError, FlexCompressTrainer
from optimum_flexcompress.configuration import METHOD_CONFIGS, MethodConfig
from optimum_flexcompress.methods import (
    FULL_PASS,
    CompressionMethod,
    LossTerm,
    ParameterGroup,
    constant,
    register_method,
)
from optimum_flexcompress.methods.base import METHODS
from optimum_flexcompress.methods.distillation import make_student
from tests.methods.toys import arguments, assert_same, data_of, model_of, twin, weights


@pytest.fixture
def toy():
    """A method with a multiplier, a second pass that learns from the first, its own model as teacher, and surgery."""

    @dataclass(kw_only=True)
    class ToyConfig(MethodConfig):
        method_type: ClassVar[str] = "toy"
        sub_pass: bool = True
        optimizer_needs_ascent: bool = True

    class ToyMethod(CompressionMethod):
        restructures = True

        def prepare(self, context):
            self.modules["multiplier"] = nn.ParameterList([nn.Parameter(torch.zeros(()))])
            self.modules["mask"] = nn.ParameterList([nn.Parameter(torch.ones(3))])
            self.trace = []
            self.drawn = []
            self.steps = 0

        def parameter_groups(self):
            return [
                ParameterGroup(
                    "multiplier",
                    list(self.modules["multiplier"]),
                    learning_rate=0.1,
                    schedule=constant,
                    maximize=self.config.optimizer_needs_ascent,
                ),
                ParameterGroup("mask", list(self.modules["mask"]), learning_rate=0.05, max_grad_norm=0.25),
            ]

        def passes(self, step, max_steps):
            return (FULL_PASS, "sub") if self.config.sub_pass else (FULL_PASS,)

        def before_forward(self, step):
            self.trace.append((step.global_step, step.micro_step, step.pass_name))
            self.drawn.append(torch.rand(1, generator=step.generator("noise")).item())
            if step.pass_name == FULL_PASS:
                with torch.no_grad():
                    inputs = {name: value for name, value in step.inputs.items() if name != "labels"}
                    step.shared["own"] = step.model(**inputs).logits

        def count_items(self, batch):
            return {"imitation": torch.tensor(len(batch["labels"]))}

        def task_loss_weight(self, step):
            return 1.0 if step.pass_name == FULL_PASS else 0.0

        def loss_terms(self, step):
            if step.pass_name != FULL_PASS:
                error = (step.outputs["logits"] - step.shared["own"]).square().sum()
                return {"imitation": LossTerm(error, 0.5)}
            gap = 2.0 - self.modules["mask"][0].sum()
            return {"constraint": LossTerm(self.modules["multiplier"][0] * gap + gap, per_item=False)}

        def on_step(self, step, max_steps):
            self.steps = step

        def log_values(self):
            return {"toy_size": self.modules["mask"][0].sum().item()}

        def finalize(self, model):
            model.finalized = getattr(model, "finalized", 0) + 1
            return model

        def state_dict(self):
            return {**super().state_dict(), "steps": self.steps}

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.steps = state["steps"]

    register_method(ToyConfig, ToyMethod)
    yield ToyConfig
    del METHOD_CONFIGS["toy"], METHODS[ToyConfig]


def build(folder, method, model=None, extra=(), **kwargs):
    trainer_arguments = {name: kwargs.pop(name) for name in ("optimizers", "teacher_model") if name in kwargs}
    return FlexCompressTrainer(
        model=model if model is not None else model_of("bert"),
        args=arguments(folder, **kwargs),
        train_dataset=data_of("bert"),
        compression_config=FlexCompressConfig(methods=[method, *extra]),
        **trainer_arguments,
    )


def test_passes_terms_and_logs(tmp_path, toy):
    trainer = build(tmp_path, toy(), max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    method = trainer._runner.methods[0]
    expected = [(step, micro, name) for step in (0, 1) for micro in (0, 1) for name in (FULL_PASS, "sub")]
    assert method.trace == expected
    assert method.steps == 2
    first = trainer.state.log_history[0]
    assert {"loss_task", "loss_constraint", "loss_imitation", "toy_size"} <= set(first)
    # The constraint is one of the step, however many batches it has: 2 - 3 = -1.
    assert first["loss_constraint"] == pytest.approx(-1.0, abs=1e-5)
    total = first["loss_task"] + first["loss_constraint"] + 0.5 * first["loss_imitation"]
    assert first["loss"] == pytest.approx(total, abs=2e-4)


def test_ascent_own_schedule_and_own_clipping(tmp_path, toy):
    trainer = build(tmp_path, toy(), max_steps=1, optim="sgd", learning_rate=1.0, warmup_steps=10, max_grad_norm=9.0)
    trainer.train()
    method = trainer._runner.methods[0]
    # Gradient ascent on multiplier * gap, gap = -1, at a constant 0.1 although the trainer is still warming up.
    assert method.modules["multiplier"][0].item() == pytest.approx(-0.1)
    # Descent at 0.05, still 0 in warm-up: this group follows the trainer's schedule.
    assert torch.equal(method.modules["mask"][0].detach(), torch.ones(3))
    trainer = build(tmp_path, toy(), max_steps=1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=9.0)
    trainer.train()
    # The gradient is (-1, -1, -1), clipped to the norm 0.25.
    moved = trainer._runner.methods[0].modules["mask"][0].detach() - 1
    assert moved.norm().item() == pytest.approx(0.05 * 0.25, rel=1e-4)


def test_draws_depend_on_seed_and_step_alone(tmp_path, toy):
    runs = []
    for seed, model in ((3, model_of("bert")), (3, model_of("bert", dropout=0.5, seed=4)), (4, model_of("bert"))):
        trainer = build(tmp_path, toy(), model=model, seed=seed)
        trainer.train()
        runs.append(trainer._runner.methods[0].drawn)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(set(runs[0])) == 2, "new numbers in each step, the same in both passes"


def test_state_of_a_method_survives_a_kill(tmp_path, toy):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = build(tmp_path / "whole", toy(), **settings)
    whole.train()
    state = torch.load(tmp_path / "whole" / "checkpoint-2" / "flexcompress_state.pt")["toy"]
    assert state["steps"] == 2
    resumed = build(tmp_path / "resumed", toy(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(weights(whole.model), weights(resumed.model))
    ours, theirs = (run._runner.methods[0].modules.state_dict() for run in (whole, resumed))
    assert_same(dict(ours), dict(theirs))


def test_only_the_end_and_the_users_save_finalize(tmp_path, toy):
    seen = []

    class Trainer(FlexCompressTrainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            self.save_model(str(tmp_path / "asked"))
            seen.append(getattr(self.model, "finalized", 0))

    trainer = Trainer(
        model=model_of("bert"),
        args=arguments(tmp_path / "run", save_strategy="steps", save_steps=1),
        train_dataset=data_of("bert"),
        compression_config=FlexCompressConfig(methods=[toy()]),
    )
    trainer.train()
    assert seen == [0, 0], "training goes on with the model as it was"
    assert trainer.model.finalized == 1
    trainer.save_model(str(tmp_path / "out"))
    assert trainer.model.finalized == 1
    assert trainer.evaluate(data_of("bert"))["eval_loss"] > 0


def test_refusals(tmp_path, toy):
    with pytest.raises(FlexCompressError, match="cannot ascend"):
        build(tmp_path, toy(), optim="adafactor").train()
    model = model_of("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(FlexCompressError, match=r"optimizers=\(optimizer, None\)"):
        build(tmp_path, toy(), model=model, optimizers=(optimizer, scheduler)).train()
    build(tmp_path, toy(), model=model, optimizers=(optimizer, None)).train()
    assert len(optimizer.param_groups) == 3


def test_methods_stack(tmp_path, toy):
    teacher = model_of("bert", layers=4)
    trainer = build(
        tmp_path, toy(), model=make_student(teacher, layers=2), extra=[DistillationConfig()], teacher_model=teacher
    )
    trainer.train()
    assert {"loss_logits", "loss_imitation", "loss_constraint", "loss_task"} <= set(trainer.state.log_history[0])


def test_accumulation_with_several_passes(tmp_path, toy):
    model = model_of("bert")
    runs = []
    for steps in (1, 4):
        trainer = build(
            tmp_path,
            toy(),
            model=twin(model),
            per_device_train_batch_size=16 // steps,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        runs.append(trainer)
    assert_same(*(weights(run.model) for run in runs), rtol=1e-4, atol=1e-6)
    assert_same(*(dict(run._runner.methods[0].modules.state_dict()) for run in runs), rtol=1e-4, atol=1e-6)
