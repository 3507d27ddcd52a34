"""How a step is cut up changes nothing: accumulation, gradient checkpointing, autocast."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
)

from optimum_flexcompress import (
    DistillationConfig,
    MiniLMConfig,
)
from optimum_flexcompress.methods.distillation import make_student
from tests.methods.toys import (
    EVERY_TERM,
    assert_same,
    data_of,
    model_of,
    train,
    twin,
    weights,
)


def token_data(rows: int = 32, seed: int = 0):
    """Token classification with very uneven numbers of labels per row."""
    data = data_of("bert", rows=rows, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(3, data["input_ids"][:].shape, generator=generator)
    drop = torch.rand(rows, 1, generator=generator)
    hidden = (data["attention_mask"][:] == 0) | (torch.rand(labels.shape, generator=generator) < drop)
    hidden[:, 0] = False
    return (
        data.remove_columns("labels")
        .add_column("labels", labels.masked_fill(hidden, -100).tolist())
        .with_format("torch")
    )


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_changes_nothing_for_any_term(tmp_path, accumulation):
    """Gradients of the terms themselves; the task loss is the stock trainer's business."""
    teacher = model_of("bert", layers=4, hidden=24, auto_class=AutoModelForTokenClassification)
    student = model_of("bert", layers=2, hidden=16, seed=1, auto_class=AutoModelForTokenClassification)
    data = token_data()
    for method in (
        DistillationConfig(task_loss_weight=0),
        DistillationConfig(logits_weight=0, hidden_states_weight=1, task_loss_weight=0),
        DistillationConfig(logits_weight=0, attention_weight=1, task_loss_weight=0),
        MiniLMConfig(task_loss_weight=0),
        MiniLMConfig(version=1, task_loss_weight=0),
    ):
        runs = [
            train(
                tmp_path,
                twin(student),
                teacher,
                data,
                [method],
                per_device_train_batch_size=32 // steps,
                gradient_accumulation_steps=steps,
                optim="sgd",
                learning_rate=0.1,
                max_steps=1,
            )
            for steps in (1, accumulation)
        ]
        assert_same(*(weights(run.model) for run in runs), rtol=1e-4, atol=1e-6)
        one, many = (run.state.log_history[0] for run in runs)
        terms = {name: value for name, value in one.items() if name.startswith("loss")}
        assert len(terms) > 1
        for name, value in terms.items():
            assert many[name] == pytest.approx(value, rel=1e-4, abs=1.1e-4), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_accumulation_with_the_task_loss_of_a_language_model(tmp_path, family):
    """Here the trainer divides the task loss by the labels of the whole step, and so do all terms."""
    teacher = model_of(family, layers=2)
    student = make_student(teacher, layers=1)
    runs = [
        train(
            tmp_path,
            twin(student),
            teacher,
            data_of(family, rows=32),
            EVERY_TERM,
            per_device_train_batch_size=32 // steps,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_steps=2,
        )
        for steps in (1, 4)
    ]
    assert_same(*(weights(run.model) for run in runs), rtol=1e-4, atol=1e-6)
    assert runs[0].state.log_history[1]["loss"] == pytest.approx(runs[1].state.log_history[1]["loss"], abs=2e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, family):
    teacher = model_of(family, layers=4)
    student = make_student(teacher, layers=2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.2)
    methods = [DistillationConfig(hidden_states_weight=1.0), MiniLMConfig()]
    runs = [
        train(
            tmp_path,
            twin(student),
            teacher,
            data_of(family),
            methods,
            optim="sgd",
            learning_rate=0.1,
            gradient_checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    ]
    assert runs[1].model.is_gradient_checkpointing
    assert_same(*(weights(run.model) for run in runs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_bfloat16_autocast(tmp_path, family):
    teacher = model_of(family, layers=4)
    student = make_student(teacher, layers=2)
    runs = [
        train(tmp_path, twin(student), teacher, data_of(family), EVERY_TERM, max_steps=2, bf16=bf16)
        for bf16 in (False, True)
    ]
    full, half = (run.state.log_history[0] for run in runs)
    for name in [name for name in full if name.startswith("loss")]:
        assert half[name] == pytest.approx(full[name], rel=0.15, abs=0.02), name
    assert all(value.dtype is torch.float32 for value in runs[1].model.state_dict().values())
