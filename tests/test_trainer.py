"""FlexCompressTrainer: stock without methods, and right with them."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
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
from optimum_flexcompress.methods import CompressionMethod
from optimum_flexcompress.methods.distillation import make_student
from optimum_flexcompress.methods.runner import STATE_NAME
from tests.methods.toys import FAMILIES, arguments, assert_same, data_of, model_of, twin, weights


EVERY_TERM = [
    DistillationConfig(hidden_states_weight=0.7, attention_weight=0.3, logits_weight=0.9),
    MiniLMConfig(relation_heads=4),
]


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


def train(folder, student, teacher, data, methods, trainer_class=FlexCompressTrainer, resume=None, **kwargs):
    extra = {name: kwargs.pop(name) for name in ("callbacks", "eval_dataset", "compute_loss_func") if name in kwargs}
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=arguments(folder, **kwargs),
        train_dataset=data,
        compression_config=FlexCompressConfig(methods=copy.deepcopy(methods)),
        **extra,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs_of(trainer, timing=("runtime", "per_second")):
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in timing)}
        for entry in trainer.state.log_history
    ]


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


def test_reentrant_checkpointing_is_refused_or_replaced(tmp_path):
    teacher = model_of("bert", layers=4)
    student = make_student(teacher, layers=2)
    with pytest.raises(FlexCompressError, match="use_reentrant"):
        train(
            tmp_path,
            student,
            teacher,
            data_of("bert"),
            [MiniLMConfig()],
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )
    by_hand = twin(student)
    by_hand.gradient_checkpointing_enable()
    settings = {"optim": "sgd", "learning_rate": 0.1}
    methods = [MiniLMConfig(task_loss_weight=0)]
    runs = [
        train(tmp_path, model, teacher, data_of("bert"), methods, **settings) for model in (twin(student), by_hand)
    ]
    before = weights(student)
    assert any(not torch.equal(before[name], value) for name, value in weights(by_hand).items())
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


def test_the_teacher_is_left_as_it_was(tmp_path):
    teacher = model_of("bert", layers=4, dropout=0.3).train()
    before = weights(teacher)
    run = train(tmp_path, make_student(teacher, layers=2), teacher, data_of("bert"), EVERY_TERM)
    assert_same(before, weights(teacher))
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert not any("teacher" in name for name, _ in run.model.named_modules())


class TestRefused:
    """One clear sentence, before anything is trained."""

    def build(self, tmp_path, student, teacher, method=None, **kwargs):
        return FlexCompressTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments(tmp_path, **kwargs.pop("args", {})),
            train_dataset=data_of("bert"),
            compression_config=FlexCompressConfig(methods=[method or DistillationConfig()]),
            **kwargs,
        )

    @pytest.mark.parametrize("method", [DistillationConfig(), MiniLMConfig()])
    def test_no_teacher(self, tmp_path, method):
        with pytest.raises(FlexCompressError, match="pass teacher_model"):
            self.build(tmp_path, model_of("bert"), None, method)

    def test_a_teacher_without_a_method(self, tmp_path):
        with pytest.raises(FlexCompressError, match="no method uses it"):
            FlexCompressTrainer(model=model_of("bert"), teacher_model=model_of("bert"), args=arguments(tmp_path))

    def test_the_student_as_its_own_teacher(self, tmp_path):
        model = model_of("bert")
        with pytest.raises(FlexCompressError, match="pass a copy"):
            self.build(tmp_path, model, model)

    def test_a_student_bigger_than_its_teacher(self, tmp_path):
        with pytest.raises(FlexCompressError, match="bigger than its teacher"):
            self.build(tmp_path, model_of("bert", layers=3), model_of("bert", layers=2))

    def test_other_labels(self, tmp_path):
        with pytest.raises(FlexCompressError, match="2 labels, the teacher 3"):
            self.build(tmp_path, model_of("bert", num_labels=2), model_of("bert"))
        student, teacher = model_of("bert"), model_of("bert")
        student.config.id2label = {0: "a", 1: "b", 2: "c"}
        teacher.config.id2label = {0: "a", 1: "c", 2: "b"}
        with pytest.raises(FlexCompressError, match='Label 1 is "b" in the student and "c"'):
            self.build(tmp_path, student, teacher)

    def test_another_vocabulary(self, tmp_path):
        student = model_of("bert")
        student.resize_token_embeddings(60, mean_resizing=False)
        with pytest.raises(FlexCompressError, match="vocabularies differ"):
            self.build(tmp_path, student, model_of("bert"))

    def test_another_head(self, tmp_path):
        teacher = model_of("bert", auto_class=AutoModelForTokenClassification)
        with pytest.raises(FlexCompressError, match="sequence head and the teacher a token classification head"):
            self.build(tmp_path, model_of("bert"), teacher)

    def test_other_labels_where_no_head_reads_them(self, tmp_path):
        student, teacher = model_of("gpt2", num_labels=2), model_of("gpt2", num_labels=3)
        self.build(tmp_path, student, teacher)

    def test_compiled_training(self, tmp_path):
        with pytest.raises(FlexCompressError, match="torch_compile"):
            self.build(tmp_path, model_of("bert"), model_of("bert"), args={"torch_compile": True})

    def test_no_head(self, tmp_path):
        models = [model_of("bert", auto_class=AutoModel) for _ in range(2)]
        with pytest.raises(FlexCompressError, match="no head"):
            self.build(tmp_path, *models)

    def test_another_tokenizer(self, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        def tokenizer(words):
            core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
            core.pre_tokenizer = pre_tokenizers.Whitespace()
            return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="?")

        ours, theirs = tokenizer(["?", "here", "tokenizers"]), tokenizer(["?", "tokenizers", "here"])
        teacher = model_of("bert")
        with pytest.raises(FlexCompressError, match="tokenizers of student and teacher differ"):
            self.build(tmp_path, twin(teacher), teacher, processing_class=ours, teacher_processing_class=theirs)
        # The same, found in the folder that the teacher was loaded from.
        folder = tmp_path / "teacher"
        teacher.save_pretrained(folder)
        theirs.save_pretrained(folder)
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        with pytest.raises(FlexCompressError, match="tokenizers of student and teacher differ"):
            self.build(tmp_path, twin(teacher), loaded, processing_class=ours)
        self.build(tmp_path, twin(teacher), loaded, processing_class=theirs)


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
