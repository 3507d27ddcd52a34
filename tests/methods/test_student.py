"""Students made from their teacher."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from optimum_flexcompress import FlexCompressError, ModelStructure
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.methods.distillation import make_student
from optimum_flexcompress.methods.distillation.student import evenly_spread
from tests.methods.toys import FAMILIES, assert_same, data_of, model_of, weights


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(3, 6, [0, 2, 5]), (1, 6, [0]), (6, 12, [0, 2, 4, 7, 9, 11]), (4, 4, [0, 1, 2, 3]), (2, 12, [0, 11])],
)
def test_evenly_spread(count, total, expected):
    assert evenly_spread(count, total) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_are_the_teachers_in_every_family(family):
    teacher = model_of(family, layers=4)
    before = weights(teacher)
    student = make_student(teacher, layers=2)
    assert_same(before, weights(teacher))
    for name, stack in describe(student).stacks.items():
        sources = [describe(teacher).stacks[name].layers[index] for index in (0, 3)]
        assert len(stack.layers) == 2
        for layer, source in zip(stack.layers, sources):
            torch.testing.assert_close(layer.attention.v.module.weight, source.attention.v.module.weight)
            torch.testing.assert_close(layer.ffn.down.weight, source.ffn.down.weight)
    batch = {name: value[:] for name, value in data_of(family, rows=2)[:].items()}
    with torch.no_grad():
        assert torch.isfinite(student(**batch).loss)


def test_stacks_of_an_encoder_decoder():
    teacher = model_of("bart", layers=4)
    stacks = describe(make_student(teacher, layers={"encoder": 3, "decoder": [2]})).stacks
    assert {name: len(stack.layers) for name, stack in stacks.items()} == {"encoder": 3, "decoder": 1}
    stacks = describe(make_student(teacher, layers={"decoder": 1})).stacks
    assert {name: len(stack.layers) for name, stack in stacks.items()} == {"encoder": 4, "decoder": 1}
    with pytest.raises(FlexCompressError, match="say which layers stay in each"):
        make_student(teacher, layers=[0, 1])
    with pytest.raises(FlexCompressError, match='"middle"'):
        make_student(teacher, layers={"middle": 1})


def test_a_student_of_fewer_layers_needs_no_plugin(tmp_path):
    student = make_student(model_of("bert", layers=4), layers=[0, 3])
    student.save_pretrained(tmp_path)
    batch = data_of("bert", rows=2)[:]
    with torch.no_grad():
        expected = student(**batch).logits
    torch.save((batch, expected), tmp_path / "expected.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForSequenceClassification as A\n"
        "model = A.from_pretrained(sys.argv[1]).eval(); batch, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert 'optimum_flexcompress' not in sys.modules\n"
        "torch.testing.assert_close(model(**batch).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)


def test_explicit_structure(tmp_path):
    teacher = model_of("bert", layers=4)
    data = ModelStructure.of(make_student(teacher, layers=2)).to_dict()
    for layer in data["stacks"]["encoder"]["layers"]:
        layer["ffn"] = 8
        layer["attention"] = {**layer["attention"], "heads": 1, "kv_heads": 1}
    for structure in (data, ModelStructure.from_dict(data)):
        student = make_student(teacher, layers=2, structure=structure)
        sizes = ModelStructure.of(student).stacks["encoder"].layers
        assert [(layer.attention.heads, layer.ffn) for layer in sizes] == [(1, 8), (1, 8)]
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same(weights(student), weights(reloaded))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Say what the student keeps"),
        ({"layers": 0}, "between 1 and 4"),
        ({"layers": 5}, "between 1 and 4"),
        ({"layers": [0, 9]}, "9"),
    ],
)
def test_impossible_students(arguments, message):
    with pytest.raises(FlexCompressError, match=message):
        make_student(model_of("bert", layers=4), **arguments)
