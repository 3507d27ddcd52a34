"""Exported models drop the tokens that the PyTorch model drops, at any batch size and length."""

from __future__ import annotations

import functools
import json
from collections import Counter

import numpy as np
import optimum.onnxruntime as ort
import pytest
import torch

from optimum_flexcompress import FlexCompressError, FlexORTModelForSeq2SeqLM, FlexORTQuantizer
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.export.fusion import fuse_graph
from optimum_flexcompress.export.graph import load_model, save_model
from optimum_flexcompress.quantization import quantize_folder
from optimum_flexcompress.token_dropping import LengthConfig, lengths_of, set_lengths, using_lengths
from tests.export.dropping import clear_case
from tests.export.exported import KINDS, generate, make, relative_error, run
from tests.methods.length_adaptive.families import (
    FIRST_ALONE,
    MATRIX,
    counts_of,
    fractions_of,
    keeps_first,
    valid_only,
)
from tests.tiny import build, inputs_for, outputs_of


# What Optimum's table or ours exports; T5Model and BartModel are exported as encoder and decoder.
EXPORTED = [entry for entry in MATRIX if entry[1] not in ("T5Model", "BartModel", "ViTForMaskedImageModeling")]
SINGLE = [entry for entry in EXPORTED if not entry[1].endswith("ForConditionalGeneration")]
SEQ2SEQ = [entry for entry in EXPORTED if entry not in SINGLE]
SHAPES = ((1, 9), (4, 17), (2, 5))
UNITS = {"counts": counts_of, "fractions": fractions_of}
# Every head once, some in both units.
CASES = [(*entry, list(UNITS)[number % 2]) for number, entry in enumerate(SINGLE)]
CASES += [
    (family, name, unit)
    for family, name in SINGLE
    for unit in UNITS
    if name in ("BertForSequenceClassification", "BertForQuestionAnswering", "T5EncoderModel", "ViTModel")
    and (family, name, unit) not in CASES
]


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """`dropping(family, class name, kind, unit) -> (PyTorch model with lengths, folder)`."""
    root = tmp_path_factory.mktemp("dropping")

    @functools.cache
    def export(family: str, name: str, kind: str, unit: str):
        model = make(family, name, kind)
        folder = root / f"{family}-{name}-{kind}-{unit}"
        export_onnx(model, folder, length_config=UNITS[unit](family), validate=False)
        return set_lengths(model, UNITS[unit](family)), folder

    return export


def assert_same(model, file, shapes=SHAPES) -> None:
    for batch, length in shapes:
        inputs, expected = clear_case(model, batch, length)
        actual = run(file, inputs)
        actual = {key: torch.from_numpy(actual[key]) for key in expected if key in actual}
        expected = {key: expected[key] for key in actual}
        assert expected
        for key, value in valid_only(expected, inputs, "").items():
            torch.testing.assert_close(valid_only(actual, inputs, "")[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "name", "unit"), CASES)
def test_plain_and_fused_graphs_equal_pytorch(dropping, tmp_path, family, name, unit):
    model, folder = dropping(family, name, "stock", unit)
    assert_same(model, folder / "model.onnx")
    fused, report = fuse_graph(load_model(folder / "model.onnx"), model.config)
    save_model(fused, tmp_path / "fused.onnx")
    assert_same(model, tmp_path / "fused.onnx")
    kinds = Counter(node.op_type for node in fused.graph.node)
    # The maps are computed once; what a first-token head does not read is not even chosen.
    layers = 2 if report.first_token_only else 3
    assert kinds["Scan"] == report.choices == layers and kinds["Softmax"] == 0
    assert report.first_token_only == (keeps_first(family, name) and name.endswith(FIRST_ALONE))


def test_layers_that_drop_nothing_stay_fused(tmp_path):
    model = build("bert", "BertForTokenClassification")
    for lengths, scans in (([1.0, 1.0, 0.5], 1), ([0.7, 0.7, 0.7], 1), ([9, 4, 4], 2), ("full", 0)):
        export_onnx(model, tmp_path / "fused", length_config=lengths, fuse=True, validate=False, overwrite=True)
        kinds = Counter(node.op_type for node in load_model(tmp_path / "fused" / "model.onnx").graph.node)
        assert (kinds["Scan"], kinds["MultiHeadAttention"]) == (scans, 3 - scans)
        with using_lengths(model, lengths):
            assert_same(model, tmp_path / "fused" / "model.onnx", ((3, 12),))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("family", "name"), SEQ2SEQ)
def test_encoders_of_encoder_decoders(dropping, tmp_path, family, name, unit):
    model, folder = dropping(family, name, "stock", unit)
    fused, _ = fuse_graph(load_model(folder / "encoder_model.onnx"), model.config)
    save_model(fused, tmp_path / "fused.onnx")
    for batch, length in SHAPES:
        inputs, outputs = clear_case(model, batch, length)
        with torch.no_grad():
            expected = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        visible = inputs["attention_mask"].bool().numpy()
        for file in (folder / "encoder_model.onnx", tmp_path / "fused.onnx"):
            actual = run(file, inputs)["last_hidden_state"]
            np.testing.assert_allclose(actual[visible], expected.numpy()[visible], atol=1e-4, rtol=1e-4)
    onnx = FlexORTModelForSeq2SeqLM.from_pretrained(folder)
    assert torch.equal(generate(onnx, tokens=6), generate(model, tokens=6))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("family", "name"),
    [("bert", "BertForQuestionAnswering"), ("distilbert", "DistilBertForSequenceClassification"), ("vit", "ViTModel")],
)
def test_compressed_models(dropping, tmp_path, family, name, unit):
    model, folder = dropping(family, name, "compressed", unit)
    assert_same(model, folder / "model.onnx")
    fused, _ = fuse_graph(load_model(folder / "model.onnx"), model.config)
    save_model(fused, tmp_path / "fused.onnx")
    assert_same(model, tmp_path / "fused.onnx")


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_fractions_do_not_depend_on_padding(dropping, tmp_path, name):
    model, folder = dropping("bert", name, "stock", "fractions")
    file = folder / "model.onnx"
    fused, _ = fuse_graph(load_model(file), model.config)
    save_model(fused, tmp_path / "fused.onnx")
    inputs, _ = clear_case(model, 3, 17)
    for path in (file, tmp_path / "fused.onnx"):
        together = run(path, inputs)["logits"]
        for row, size in enumerate(inputs["attention_mask"].sum(1).tolist()):
            alone = run(path, {key: value[row : row + 1, :size] for key, value in inputs.items()})["logits"]
            expected = together[row : row + 1]
            expected = expected[:, :size] if expected.ndim == 3 else expected
            np.testing.assert_allclose(alone, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("unit", "mode"), [("counts", "static"), ("fractions", "dynamic")])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "BertForQuestionAnswering"),
        ("roberta", "RobertaForSequenceClassification"),
        ("distilbert", "DistilBertForTokenClassification"),
        ("vit", "ViTForImageClassification"),
        ("t5", "T5ForTokenClassification"),
        ("bart", "BartForConditionalGeneration"),
    ],
)
def test_int8(dropping, tmp_path, family, name, unit, mode):
    model, folder = dropping(family, name, "stock", unit)
    examples = [
        {key: value[0] for key, value in inputs_for(model, seed=100 + i, batch=1, length=5 + i % 6).items()}
        for i in range(24)
    ]
    quantizer = FlexORTQuantizer.from_pretrained(folder)
    quantizer.quantize(mode=mode, target="avx512_vnni", save_dir=tmp_path / "int8", calibration_dataset=examples)
    name = "encoder_model.onnx" if (folder / "encoder_model.onnx").is_file() else "model.onnx"
    plain = load_model(folder / name)
    int8 = load_model(tmp_path / "int8" / name)
    constants = {tensor.name for tensor in plain.graph.initializer if len(tensor.dims) == 2}
    products = [node for node in plain.graph.node if node.op_type in ("MatMul", "Gemm")]
    weights = {node.input[1] for node in products if node.input[1] in constants}
    report = quantizer.reports[name]
    # Each product with a weight is int8, once.
    assert report.static + report.dynamic == len(weights) and (report.static > 0) == (mode == "static")
    assert not any(node.op_type == "MatMul" and node.input[1] in constants for node in int8.graph.node)
    # Rounding moves scores; where another token is dropped for it, random models return something else altogether.
    errors = []
    for seed in range(4):
        inputs = inputs_for(model, seed=seed, batch=4, length=13)
        inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
        expected = next(iter(run(folder / name, inputs).values()))
        actual = next(iter(run(tmp_path / "int8" / name, inputs).values()))
        errors.append(relative_error(actual, expected))
    assert 0 < min(errors) < 0.15 and max(errors) < 1


def test_a_graph_that_is_fused_already_becomes_static_int8(tmp_path):
    model = build("bert", "BertForTokenClassification")
    export_onnx(model, tmp_path / "fused", length_config=[7, 4, 2], fuse=True, validate=False)
    examples = [{key: value[0] for key, value in inputs_for(model, i, 1, 9).items()} for i in range(12)]
    result = quantize_folder(tmp_path / "fused", tmp_path / "int8", "static", calibration_dataset=examples)
    assert result.files["model.onnx"].static == 19 and result.files["model.onnx"].dynamic == 0
    inputs, expected = clear_case(set_lengths(model, [7, 4, 2]), 1, 9)
    actual = run(tmp_path / "int8" / "model.onnx", inputs)["logits"]
    assert 0 < relative_error(actual, expected["logits"].numpy()) < 0.5


def test_lengths_at_export(tmp_path):
    model = build("bert", "BertForSequenceClassification")
    inputs, _ = clear_case(set_lengths(model, [7, 4, 2]), 3, 9)
    carried = outputs_of(model, inputs)["logits"].numpy()
    export_onnx(model, tmp_path / "carried")
    export_onnx(model, tmp_path / "given", length_config=LengthConfig((0.8, 0.6, 0.3), "fractions"))
    export_onnx(model, tmp_path / "full", length_config="full")
    assert lengths_of(model).values == (7, 4, 2) and model.config.length_config["counts"] == [7, 4, 2]
    np.testing.assert_allclose(run(tmp_path / "carried" / "model.onnx", inputs)["logits"], carried, atol=1e-4)
    for folder, lengths in (("given", [0.8, 0.6, 0.3]), ("full", "full")):
        with using_lengths(model, lengths):
            expected = outputs_of(model, inputs)["logits"].numpy()
        np.testing.assert_allclose(run(tmp_path / folder / "model.onnx", inputs)["logits"], expected, atol=1e-4)
        stored = json.loads((tmp_path / folder / "config.json").read_text()).get("length_config")
        assert stored == (
            None if folder == "full" else {"unit": "fractions", "max_length": None, "fractions": lengths}
        )
    loaded = ort.ORTModelForSequenceClassification.from_pretrained(tmp_path / "carried")
    inputs = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    np.testing.assert_allclose(loaded(**inputs).logits.numpy(), carried, atol=1e-4)


def test_a_folder_with_other_lengths_in_one_call(tmp_path):
    set_lengths(build("bert", "BertForQuestionAnswering"), [7, 4, 2]).save_pretrained(tmp_path / "model")
    for lengths, expected in ((None, [7, 4, 2]), ("full", None), ([5, 5, 3], [5, 5, 3])):
        quantize_folder(tmp_path / "model", tmp_path / "int8", length_config=lengths, overwrite=True)
        stored = json.loads((tmp_path / "int8" / "config.json").read_text())["length_config"]
        assert (stored or {}).get("counts") == expected


def test_what_cannot_be(tmp_path):
    model = build("bert", "BertForSequenceClassification")
    for lengths, message in (([7, 4], "are for 2 layers"), ([4, 7, 2], "more than the 4"), ("ful", "is 'ful'")):
        with pytest.raises(FlexCompressError, match=message):
            export_onnx(model, tmp_path / "out", length_config=lengths)
    with pytest.raises(FlexCompressError, match="is a decoder"):
        export_onnx(build("gpt2", "GPT2LMHeadModel"), tmp_path / "out", length_config=[7, 4, 2])
    assert not list(tmp_path.iterdir())
    export_onnx(model, tmp_path / "out")
    with pytest.raises(FlexCompressError, match="part of its graph"):
        quantize_folder(tmp_path / "out", tmp_path / "int8", length_config=[7, 4, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_whose_lengths_are_not_known_is_left_alone(dropping, kind):
    _, folder = dropping("bert", "BertForSequenceClassification", kind, "counts")
    plain = load_model(folder / "model.onnx")
    fused, report = fuse_graph(plain)
    assert fused is plain and "does not say how many" in report.left["all"]
