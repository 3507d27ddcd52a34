"""FlexCompressTrainer: stock without methods, and right with them."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    AutoModel,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressConfig,
    FlexCompressError,
    FlexCompressSeq2SeqTrainer,
    FlexCompressTrainer,
    MiniLMConfig,
)
from optimum_flexcompress.methods.distillation import make_student
from tests.methods.toys import (
    EVERY_TERM,
    FAMILIES,
    arguments,
    assert_same,
    data_of,
    logs_of,
    model_of,
    train,
    twin,
    weights,
)


@pytest.mark.parametrize("config", [None, FlexCompressConfig()])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_without_methods_it_is_the_stock_trainer(tmp_path, config, accumulation):
    data, model = data_of("bert"), model_of("bert", dropout=0.1)
    trainers = []
    for trainer_class, extra in ((Trainer, {}), (FlexCompressTrainer, {"compression_config": config})):
        args = arguments(
            tmp_path / trainer_class.__name__,
            max_steps=4,
            gradient_accumulation_steps=accumulation,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
        )
        trainer = trainer_class(model=twin(model), args=args, train_dataset=data, eval_dataset=data, **extra)
        trainer.train()
        trainers.append(trainer)
    stock, ours = trainers
    assert_same(weights(stock.model), weights(ours.model))
    assert logs_of(stock) == logs_of(ours)
    folders = [tmp_path / name / "checkpoint-4" for name in ("Trainer", "FlexCompressTrainer")]
    files = [{path.name for path in folder.iterdir()} for folder in folders]
    assert files[1] - files[0] == set()
    assert files[0] == files[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_term_trains_and_is_logged_in_every_family(tmp_path, family):
    teacher = model_of(family, layers=4)
    student = make_student(teacher, layers=2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    before = weights(student)
    seq2seq = family in ("t5", "bart")
    trainer = train(
        tmp_path, student, teacher, data_of(family), EVERY_TERM, max_steps=12, per_device_train_batch_size=16
    )
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    hidden = {"loss_hidden_states_encoder", "loss_hidden_states_decoder"} if seq2seq else {"loss_hidden_states"}
    terms = {"loss_task", "loss_logits", "loss_attention", *hidden} | {
        f"loss_minilm_{name}" for name in ("query", "key", "value")
    }
    assert {name for name in first if name.startswith("loss_")} == terms
    value = (
        first["loss_task"]
        + 0.9 * first["loss_logits"]
        + 0.3 * first["loss_attention"]
        + 0.7 * sum(first[name] for name in hidden)
        + sum(first[name] for name in terms if "minilm" in name)
    )
    assert first["loss"] == pytest.approx(value, rel=1e-3, abs=2e-4)
    assert last["loss"] < first["loss"]
    changed = [name for name, value in weights(student).items() if not torch.equal(value, before[name])]
    assert len(changed) > len(before) / 2


def test_evaluation_outputs_are_stock(tmp_path):
    teacher, data = model_of("bert", layers=4), data_of("bert")
    student = make_student(teacher, layers=2)
    outputs = []
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            batch = {name: value[:] for name, value in data[:4].items()}
            before = len(calls)
            with torch.no_grad():
                outputs.append((model(**batch), twin(model)(**batch)))
            assert len(calls) == before

    trainer = train(
        tmp_path,
        student,
        teacher,
        data,
        EVERY_TERM,
        callbacks=[Look()],
        eval_dataset=data,
        eval_strategy="steps",
        eval_steps=1,
    )
    assert len(calls) == 2, "one teacher pass for each training step, none in evaluation"
    for ours, stock in outputs:
        assert list(ours.keys()) == list(stock.keys()) == ["loss", "logits"]
        assert torch.equal(ours.logits, stock.logits)
    assert student.config._attn_implementation == "sdpa"
    plain = Trainer(model=twin(student), args=arguments(tmp_path), eval_dataset=data)
    assert plain.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert not student._forward_hooks
    assert not student._forward_pre_hooks
    assert all(not module._forward_hooks for module in student.modules())


def test_projections_have_a_group_and_a_clipping_of_their_own(tmp_path):
    """The gradient of the weights is clipped to the same norm whether or not there are projections."""
    teacher = model_of("bert", layers=2, hidden=24)
    student = model_of("bert", layers=2, hidden=16, seed=1)
    seen = {}

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen["groups"] = [
                {key: group[key] for key in ("lr", "weight_decay")} | {"size": len(group["params"])}
                for group in optimizer.param_groups
            ]
            own = optimizer.param_groups[-1]["params"]
            norms = [torch.stack([p.grad.norm() for p in part]).norm() for part in (list(model.parameters()), own)]
            seen["norms"] = [norm.item() for norm in norms]
            seen["apart"] = not {id(p) for p in own} & {id(p) for p in model.parameters()}

    methods = [DistillationConfig(logits_weight=0, hidden_states_weight=100.0, projection_learning_rate=0.02)]
    train(
        tmp_path,
        student,
        teacher,
        data_of("bert"),
        methods,
        callbacks=[Look()],
        max_steps=1,
        weight_decay=0.1,
        max_grad_norm=0.5,
    )
    assert seen["apart"]
    assert seen["groups"][-1] == {"lr": 0.02, "weight_decay": 0.0, "size": 3}
    assert seen["groups"][0]["weight_decay"] == 0.1
    assert seen["norms"] == pytest.approx([0.5, 0.5], rel=1e-4)


def test_terms_are_averaged_between_logs(tmp_path):
    teacher = model_of("bert", layers=4)
    student = make_student(teacher, layers=2)
    runs = [
        train(tmp_path, twin(student), teacher, data_of("bert"), EVERY_TERM, max_steps=4, logging_steps=every)
        for every in (1, 4)
    ]
    single, together = ([entry for entry in run.state.log_history if "loss" in entry] for run in runs)
    assert len(single) == 4
    assert len(together) == 1
    for name in [name for name in single[0] if name.startswith("loss_")]:
        mean = sum(entry[name] for entry in single) / 4
        assert together[0][name] == pytest.approx(mean, abs=1e-5), name


def test_logs_reach_the_reporters(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    teacher = model_of("bert", layers=4)
    train(
        tmp_path,
        make_student(teacher, layers=2),
        teacher,
        data_of("bert"),
        [DistillationConfig()],
        report_to=["tensorboard"],
        logging_dir=str(tmp_path / "logs"),
    )
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert {"train/loss_task", "train/loss_logits"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("outside", ["label_smoothing", "compute_loss_func"])
def test_a_task_loss_that_the_trainer_computes(tmp_path, outside):
    teacher = model_of("bert", layers=4)
    student = make_student(teacher, layers=2)
    if outside == "label_smoothing":
        extra = {"label_smoothing_factor": 0.1}
    else:

        def task_loss(outputs, labels, num_items_in_batch=None):
            loss = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
            return 2 * loss / num_items_in_batch

        extra = {"compute_loss_func": task_loss}
    log = {}
    for weight in (0.0, 0.5):
        run = train(
            tmp_path,
            twin(student),
            teacher,
            data_of("bert"),
            [DistillationConfig(temperature=1.0, task_loss_weight=weight)],
            max_steps=1,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=0.1,
            **extra,
        )
        log[weight] = run.state.log_history[0]
        log[weight]["weights"] = weights(run.model)
    assert log[0.5]["loss"] == pytest.approx(log[0.5]["loss_logits"] + 0.5 * log[0.5]["loss_task"], abs=1e-3)
    assert log[0.0]["loss"] == pytest.approx(log[0.0]["loss_logits"], abs=1e-3)
    assert not torch.equal(log[0.0]["weights"]["classifier.weight"], log[0.5]["weights"]["classifier.weight"])


def test_headless_student_learns_relations_without_a_task(tmp_path):
    teacher = model_of("bert", layers=4, auto_class=AutoModel)
    student = model_of("bert", layers=2, seed=1, auto_class=AutoModel)
    data = data_of("bert").remove_columns("labels")
    run = train(tmp_path, student, teacher, data, [MiniLMConfig(task_loss_weight=0)], max_steps=20, learning_rate=5e-3)
    first, last = run.state.log_history[0], run.state.log_history[-2]
    assert "loss_task" not in first
    assert last["loss"] < 0.8 * first["loss"]
    with pytest.raises(FlexCompressError, match="task_loss_weight=0"):
        train(tmp_path, student, teacher, data, [MiniLMConfig()])


def test_seq2seq_trainer_generates_in_evaluation(tmp_path):
    teacher = model_of("bart", layers=2)
    student = make_student(teacher, layers=1)
    data = data_of("bart")
    args = Seq2SeqTrainingArguments(
        **{
            **arguments(tmp_path).to_dict(),
            "predict_with_generate": True,
            "generation_max_length": 8,
            "eval_strategy": "steps",
            "eval_steps": 1,
        }
    )
    trainer = FlexCompressSeq2SeqTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda prediction: {"width": prediction.predictions.shape[1]},
        compression_config=FlexCompressConfig(methods=EVERY_TERM),
    )
    trainer.train()
    widths = [entry["eval_width"] for entry in trainer.state.log_history if "eval_width" in entry]
    assert widths
    assert trainer.state.log_history[0]["loss_hidden_states_decoder"] > 0


def test_the_teacher_is_left_as_it_was(tmp_path):
    teacher = model_of("bert", layers=4, dropout=0.3).train()
    before = weights(teacher)
    run = train(tmp_path, make_student(teacher, layers=2), teacher, data_of("bert"), EVERY_TERM)
    assert_same(before, weights(teacher))
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert not any("teacher" in name for name, _ in run.model.named_modules())


def test_attention_is_eager_only_while_training(tmp_path, caplog):
    teacher = model_of("llama", layers=4)
    student = make_student(teacher, layers=2)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((model.config._attn_implementation, teacher.config._attn_implementation))

    with caplog.at_level(logging.WARNING, logger="optimum_flexcompress"):
        train(tmp_path, student, teacher, data_of("llama"), EVERY_TERM, callbacks=[Look()])
    assert seen == [("sdpa", "sdpa")] * 2
    assert caplog.text.count("attend eagerly") == 1
