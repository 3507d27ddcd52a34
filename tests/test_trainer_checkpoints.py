"""Checkpoints: killed and resumed, saved, reloaded, trained again."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    TrainerCallback,
)

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressConfig,
    FlexCompressError,
    FlexCompressTrainer,
    MiniLMConfig,
)
from optimum_flexcompress.methods import CompressionMethod
from optimum_flexcompress.methods.distillation import make_student
from optimum_flexcompress.methods.runner import STATE_NAME
from tests.methods.toys import (
    arguments,
    assert_same,
    data_of,
    logs_of,
    model_of,
    train,
    twin,
    weights,
)


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("accumulation", [1, 2])
def test_killed_and_resumed_equals_not_killed(tmp_path, accumulation):
    """Dropout on, learned projections, two learning rates: equal in every bit."""
    teacher = model_of("bert", layers=4, hidden=24)
    student = model_of("bert", layers=2, hidden=16, seed=1, dropout=0.1)
    methods = [
        DistillationConfig(hidden_states_weight=1.0, projection_learning_rate=3e-3),
        MiniLMConfig(),
    ]
    settings = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": accumulation,
        "warmup_steps": 2,
    }
    data = data_of("bert", rows=20)
    whole = train(tmp_path / "whole", twin(student), teacher, data, methods, **settings)
    with pytest.raises(Killed):
        train(tmp_path / "killed", twin(student), teacher, data, methods, callbacks=[KillAt(5)], **settings)
    # The initial weights of the second process are others: everything has to come from the checkpoint.
    stranger = model_of("bert", layers=2, hidden=16, seed=9, dropout=0.1)
    resumed = train(tmp_path / "killed", stranger, teacher, data, methods, resume=True, **settings)
    assert_same(weights(whole.model), weights(resumed.model))
    states = [torch.load(tmp_path / name / "checkpoint-7" / STATE_NAME) for name in ("whole", "killed")]
    assert_same(*(state["distillation"]["modules"] for state in states))
    assert logs_of(whole)[3:7] == logs_of(resumed)[3:7]


def test_resuming_with_other_methods_is_refused(tmp_path):
    teacher = model_of("bert", layers=4)
    settings = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path, make_student(teacher, layers=2), teacher, data_of("bert"), [DistillationConfig()], **settings)
    with pytest.raises(FlexCompressError, match="holds the methods distillation"):
        train(tmp_path, make_student(teacher, layers=2), teacher, data_of("bert"), [MiniLMConfig()], resume=True)
    (tmp_path / "checkpoint-2" / STATE_NAME).unlink()
    with pytest.raises(FlexCompressError, match="written without compression methods"):
        train(tmp_path, make_student(teacher, layers=2), teacher, data_of("bert"), [DistillationConfig()], resume=True)


def test_saved_model_is_the_student_alone(tmp_path):
    teacher = model_of("bert", layers=4, hidden=24)
    student = model_of("bert", layers=2, hidden=16, seed=1)
    methods = [DistillationConfig(hidden_states_weight=1.0)]
    trainer = train(tmp_path / "run", student, teacher, data_of("bert"), methods, save_strategy="steps", save_steps=1)
    trainer.save_model(str(tmp_path / "out"))
    assert FlexCompressConfig.from_pretrained(tmp_path / "out").methods == methods
    assert not (tmp_path / "out" / STATE_NAME).exists()
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_same(weights(student), weights(reloaded))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "flexcompress_config.json").is_file()
    modules = torch.load(checkpoint / STATE_NAME)["distillation"]["modules"]
    assert sorted(modules) == ["encoder_0_0.weight", "encoder_1_2.weight", "encoder_2_4.weight"]
    assert json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"] == 2


def test_model_init_and_a_second_training(tmp_path):
    teacher = model_of("bert", layers=4, hidden=24)
    trainer = FlexCompressTrainer(
        model_init=lambda: model_of("bert", layers=2, hidden=16, seed=1),
        teacher_model=teacher,
        args=arguments(tmp_path),
        train_dataset=data_of("bert"),
        compression_config=FlexCompressConfig(methods=[DistillationConfig(hidden_states_weight=1.0)]),
    )
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    assert_same(first, weights(trainer.model))


def test_batch_size_found_automatically(tmp_path):
    """The second attempt goes on with the parameters that the optimizer of the first one knows."""
    teacher = model_of("bert", layers=4, hidden=24)
    student = model_of("bert", layers=2, hidden=16, seed=1)
    sizes = []

    def out_of_memory(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")

    student.register_forward_pre_hook(out_of_memory, with_kwargs=True)
    trainer = train(
        tmp_path,
        student,
        teacher,
        data_of("bert"),
        [DistillationConfig(hidden_states_weight=1.0), MiniLMConfig()],
        per_device_train_batch_size=8,
        auto_find_batch_size=True,
    )
    assert sizes[0] == 8
    assert trainer.state.global_step == 2
    projections = trainer._runner.methods[0].modules.parameters()
    assert all(parameter in trainer.optimizer.state for parameter in projections)


def test_best_model_brings_its_method_state_and_waits_for_the_target(tmp_path, monkeypatch):
    teacher = model_of("bert", layers=4, hidden=24)
    student = model_of("bert", layers=2, hidden=16, seed=1)
    ready = []

    def is_ready(self):
        ready.append(1)
        return len(ready) >= 2

    monkeypatch.setattr(CompressionMethod, "is_ready", is_ready)
    data = data_of("bert")
    trainer = train(
        tmp_path,
        student,
        teacher,
        data,
        [DistillationConfig(hidden_states_weight=1.0)],
        eval_dataset=data,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_runtime",
        greater_is_better=True,
    )
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("checkpoint-1"), "that one had not met the target"
    state = torch.load(f"{best}/{STATE_NAME}")["distillation"]["modules"]
    assert_same(state, dict(trainer._runner.methods[0].modules.state_dict()))
