"""MiniLM in the trainer: the right vectors of the right layers."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from optimum_flexcompress import FlexCompressConfig, FlexCompressError, FlexCompressTrainer, MiniLMConfig
from optimum_flexcompress.methods.distillation.minilm import choose_relation_heads
from tests.methods.test_relations import reference
from tests.methods.toys import FAMILIES, arguments, data_of, model_of, twin


def first_log(folder, student, teacher, method, data):
    trainer = FlexCompressTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(folder, max_steps=1),
        train_dataset=data,
        compression_config=FlexCompressConfig(methods=[method]),
    )
    trainer.train()
    return trainer.state.log_history[0]


def vectors_of(model, modules, batch, slices=None):
    """Outputs of projections, read with hooks of this test's own; `slices` for a fused projection."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, output))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    if slices:
        (fused,) = seen.values()
        return dict(zip(("query", "key", "value"), fused.chunk(3, -1)))
    return seen


@pytest.mark.parametrize("teacher_layer", [-1, 2])
def test_version_2_compares_the_last_layer_with_the_chosen_one(tmp_path, teacher_layer):
    teacher, student = model_of("bert", layers=3, hidden=24, heads=4), model_of("bert", layers=2, seed=1)
    data = data_of("bert", rows=4)
    batch = {name: data[:][name] for name in ("input_ids", "attention_mask")}
    log = first_log(tmp_path, twin(student), teacher, MiniLMConfig(teacher_layer=teacher_layer), data)
    attention = {
        "student": student.bert.encoder.layer[-1].attention.self,
        "teacher": teacher.bert.encoder.layer[2 if teacher_layer == -1 else 1].attention.self,
    }
    both = [
        vectors_of(model, {name: getattr(attention[who], name) for name in ("query", "key", "value")}, batch)
        for who, model in (("student", student), ("teacher", teacher))
    ]
    valid = batch["attention_mask"].bool()
    for name in ("query", "key", "value"):
        # 8 is the largest of the usual numbers that divides 16 and 24.
        expected = reference(both[0][name], both[1][name], 8, valid) / 4
        assert log[f"loss_minilm_{name}"] == pytest.approx(expected.item(), rel=1e-4, abs=2e-6)


def test_fused_projections_and_causal_relations(tmp_path):
    teacher, student = model_of("gpt2", layers=3, hidden=24, heads=4), model_of("gpt2", layers=2, seed=1)
    data = data_of("gpt2", rows=4)
    batch = {name: data[:][name] for name in ("input_ids", "attention_mask")}
    log = first_log(tmp_path, twin(student), teacher, MiniLMConfig(relation_heads=4), data)
    both = [
        vectors_of(model, {"fused": model.transformer.h[-1].attn.c_attn}, batch, slices=True)
        for model in (student, teacher)
    ]
    for name in ("query", "key", "value"):
        expected = reference(both[0][name], both[1][name], 4, batch["attention_mask"].bool(), causal=True) / 4
        assert log[f"loss_minilm_{name}"] == pytest.approx(expected.item(), rel=1e-4, abs=2e-6)


def test_version_1_compares_attention_maps_and_value_relations(tmp_path):
    teacher, student = model_of("bert", layers=3, hidden=24), model_of("bert", layers=2, seed=1)
    data = data_of("bert", rows=4)
    batch = {name: data[:][name] for name in ("input_ids", "attention_mask")}
    log = first_log(tmp_path, twin(student), teacher, MiniLMConfig(version=1), data)
    valid = batch["attention_mask"].bool()
    values = [
        vectors_of(model, {"value": model.bert.encoder.layer[-1].attention.self.value}, batch)["value"]
        for model in (student, teacher)
    ]
    assert log["loss_minilm_value"] == pytest.approx(reference(*values, 2, valid).item() / 4, rel=1e-4, abs=2e-6)
    with torch.no_grad():
        maps = [model(**batch, output_attentions=True).attentions[-1] for model in (student, teacher)]
    expected = 0.0
    for row in range(4):
        length = int(valid[row].sum())
        for head in range(2):
            for query in range(length):
                q, p = (part[row, head, query, :length].tolist() for part in maps)
                expected += sum(a * math.log(a / b) for a, b in zip(p, q)) / (2 * length * 4)
    assert log["loss_minilm_attention"] == pytest.approx(expected, rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_when_the_student_is_its_teacher(tmp_path, family, version):
    teacher = model_of(family)
    log = first_log(tmp_path, twin(teacher), teacher, MiniLMConfig(version=version), data_of(family))
    terms = {name: value for name, value in log.items() if name.startswith("loss_minilm")}
    assert len(terms) == (2 if version == 1 else 3)
    for name, value in terms.items():
        assert value == pytest.approx(0.0, abs=2e-6), name


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_pads_change_nothing(tmp_path, family, version):
    teacher, student = model_of(family, layers=3), model_of(family, layers=2, seed=1)
    data = data_of(family, rows=4)
    longer = {name: value.tolist() for name, value in data[:].items()}
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    for name, rows in longer.items():
        if isinstance(rows[0], list):
            longer[name] = [[*row, *[fill[name]] * 3] for row in rows]
    wider = type(data).from_dict(longer).with_format("torch")
    logs = [
        first_log(tmp_path, twin(student), teacher, MiniLMConfig(version=version, task_loss_weight=0), rows)
        for rows in (data, wider)
    ]
    for name in [name for name in logs[0] if name.startswith("loss")]:
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4, abs=1e-4), name


def test_relations_without_weight_are_left_out(tmp_path):
    teacher, student = model_of("bert"), model_of("bert", layers=1)
    log = first_log(tmp_path, student, teacher, MiniLMConfig(relation_weights={"query": 0, "key": 0}), data_of("bert"))
    assert [name for name in log if name.startswith("loss_minilm")] == ["loss_minilm_value"]


@pytest.mark.parametrize(
    ("widths", "wanted", "expected"),
    [
        ([768, 768], None, 64),
        ([768, 336], None, 48),
        ([1024, 384], None, 64),
        ([384, 384], None, 64),
        ([312, 768], None, 24),
        ([96, 60], None, 12),
        ([96, 60], 6, 6),
    ],
)
def test_number_of_relation_heads(widths, wanted, expected):
    assert choose_relation_heads(widths, wanted) == expected


def test_relation_heads_that_do_not_divide(tmp_path):
    with pytest.raises(FlexCompressError, match="5 relation heads do not divide"):
        first_log(tmp_path, model_of("bert", layers=1), model_of("bert"), MiniLMConfig(relation_heads=5), None)
    with pytest.raises(FlexCompressError, match="No default number"):
        choose_relation_heads([50, 70])


def test_layers_that_do_not_exist_and_heads_that_differ(tmp_path):
    teacher = model_of("bert", layers=2)
    for layer in (3, -3):
        with pytest.raises(FlexCompressError, match="has 2 layers"):
            first_log(tmp_path, model_of("bert", layers=1), teacher, MiniLMConfig(teacher_layer=layer), None)
    with pytest.raises(FlexCompressError, match="needs equal head counts"):
        first_log(tmp_path, model_of("bert", layers=1, heads=4), teacher, MiniLMConfig(version=1), None)


@pytest.mark.parametrize(("layers", "hidden", "warned"), [(2, 12, True), (2, 24, False), (3, 12, False)])
def test_a_teacher_assistant_is_advised_where_both_shrink_by_half(tmp_path, caplog, layers, hidden, warned):
    teacher, student = model_of("bert", layers=4, hidden=24), model_of("bert", layers=layers, hidden=hidden)
    with caplog.at_level(logging.WARNING, logger="optimum_flexcompress"):
        FlexCompressTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments(tmp_path),
            compression_config=FlexCompressConfig(methods=[MiniLMConfig()]),
        )
    assert ("teacher assistant" in caplog.text) == warned
