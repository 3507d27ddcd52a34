"""Int8 in OpenVINO: how far off, at any batch size and length, for stock, pruned and length-adaptive models."""

from __future__ import annotations

import json
import sys
import threading

import numpy as np
import openvino
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from optimum_flexcompress import (
    FlexCompressError,
    OVQuantizedModel,
    OVQuantizedModelForQuestionAnswering,
    OVQuantizedModelForSequenceClassification,
)
from optimum_flexcompress.evaluation import open_artifact
from optimum_flexcompress.evaluation.cost import file_size, weight_files
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.export.graph import load_model, save_model
from optimum_flexcompress.export.plain_attention import plain_graph
from optimum_flexcompress.quantization.openvino import IR_NAME, WEIGHTS_NAME, quantize_openvino
from optimum_flexcompress.quantization.saved import RECORD_NAME
from optimum_flexcompress.token_dropping import set_lengths
from tests.export.dropping import clear_case
from tests.export.exported import make, relative_error
from tests.methods.length_adaptive.families import counts_of, fractions_of, valid_only
from tests.quantization.test_families import examples
from tests.tasks.toys import word_tokenizer
from tests.tiny import inputs_for, outputs_of


HEADS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForTokenClassification",
    "distilbert": "DistilBertForQuestionAnswering",
    "vit": "ViTForImageClassification",
}
# As for ONNX Runtime: sums of large random numbers of both signs suffer more from rounding than trained models.
BOUND = 0.3


def quantize(model, folder, lengths=None, source=None, **options):
    """Makes a tiny model int8, or what it was saved or exported as."""
    options = {"target": "avx512_vnni", "length_config": lengths, **options}
    return quantize_openvino(source or model, folder, calibration_dataset=examples(model), **options)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """`(PyTorch model, int8 folder)`."""
    model = make("bert", "BertForSequenceClassification", "stock")
    source = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(source / "model")
    word_tokenizer().save_pretrained(source / "model")
    result = quantize(model, source / "int8", source=source / "model", num_calibration_samples=20)
    # Three layers of six, the pooler and the head.
    # (Of a model this small, the description of the graph is the larger file.)
    assert result.products == 20 and (source / "int8" / WEIGHTS_NAME).stat().st_size < result.bytes_before / 2
    assert "20 int8 products (static), last layer cut to the first token" in result.summary()
    return model, source / "int8"


def assert_near(int8, model, shapes=((1, 5), (4, 10), (2, 17)), bound=BOUND):
    for batch, length in shapes:
        inputs, expected = clear_case(model, batch, length)
        actual = {name: value for name, value in int8(**inputs).items() if name in expected}
        assert actual
        expected, actual = valid_only(expected, inputs, ""), valid_only(actual, inputs, "")
        for name, value in actual.items():
            assert 0 < relative_error(value.numpy(), expected[name].numpy()) < bound


@pytest.mark.parametrize("kind", ["stock", "compressed"])
@pytest.mark.parametrize("family", HEADS)
def test_int8(tmp_path, family, kind):
    model = make(family, HEADS[family], kind)
    quantize(model, tmp_path / "int8")
    int8 = OVQuantizedModel.from_pretrained(tmp_path / "int8", threads=1, precision="f32")
    assert type(int8).__name__ == f"OVQuantizedModelFor{HEADS[family].partition('For')[2]}".replace("ViT", "")
    assert_near(int8, model)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "BertModel"),
        ("bert", "BertForMaskedLM"),
        ("gpt2", "GPT2ForSequenceClassification"),
        ("bart", "BartForSequenceClassification"),
        ("t5", "T5EncoderModel"),
    ],
)
def test_other_heads_and_families(tmp_path, family, name):
    model = make(family, name, "stock")
    quantize(model, tmp_path / "int8")
    int8 = OVQuantizedModel.from_pretrained(tmp_path / "int8", precision="f32")
    assert_near(int8, model, ((3, 9),))


def compiled(model, tmp_path, lengths=None):
    """The graph that NNCF gets, in single precision, in OpenVINO."""
    export_onnx(model, tmp_path / "onnx", length_config=lengths, validate=False)
    save_model(plain_graph(load_model(tmp_path / "onnx" / "model.onnx"), model.config)[0], tmp_path / "plain.onnx")
    return openvino.Core().compile_model(tmp_path / "plain.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize("unit", ["counts", "fractions"])
@pytest.mark.parametrize("family", HEADS)
def test_tokens_are_dropped(tmp_path, family, unit):
    model = make(family, HEADS[family], "stock")
    lengths = {"counts": counts_of, "fractions": fractions_of}[unit](family)
    quantize(model, tmp_path / "int8", lengths)
    set_lengths(model, lengths)
    # Before it is rounded, it is the same model.
    graph = compiled(model, tmp_path, lengths)
    for batch, length in ((1, 5), (4, 17)):
        inputs, expected = clear_case(model, batch, length)
        names = [port.get_any_name() for port in graph.inputs]
        outputs = graph({key: inputs[key].numpy() if key in inputs else zeros_like(inputs) for key in names})
        actual = {key: torch.from_numpy(outputs[key]) for key in expected}
        for key, value in valid_only(expected, inputs, "").items():
            torch.testing.assert_close(valid_only(actual, inputs, "")[key], value, atol=1e-4, rtol=1e-4)
    int8 = OVQuantizedModel.from_pretrained(tmp_path / "int8", precision="f32")
    assert int8.config.length_config["unit" if "unit" in int8.config.length_config else unit]
    # Rounding may change a choice among a handful of tokens, and with it everything: most samples are judged.
    errors = []
    for seed in range(12):
        inputs = inputs_for(model, seed=seed, batch=1, length=12)
        expected = outputs_of(model, inputs)
        actual = int8(**inputs)
        errors.append(max(relative_error(actual[name].numpy(), expected[name].numpy()) for name in expected))
    assert np.median(errors) < BOUND


def zeros_like(inputs):
    return np.zeros(inputs["input_ids"].shape, np.int64)


def test_padding_changes_nothing(classifier):
    model, folder = classifier
    int8 = OVQuantizedModelForSequenceClassification.from_pretrained(folder, precision="f32")
    inputs = inputs_for(model, batch=3, length=11)
    together = int8(**inputs).logits
    for row, size in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = int8(input_ids=inputs["input_ids"][row : row + 1, :size]).logits
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)


def test_a_pipeline_and_threads(classifier):
    model, folder = classifier
    int8 = OVQuantizedModelForSequenceClassification.from_pretrained(folder, threads=1)
    assert int8.model.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["the film was good", "bad", "very bad plot"]
    answers = pipeline("text-classification", model=int8, tokenizer=tokenizer)(texts, batch_size=2)
    with torch.no_grad():
        expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(1)
    assert [answer["label"] for answer in answers] == [model.config.id2label[int(label)] for label in expected]
    # Calls from several threads do not disturb each other.
    inputs = [inputs_for(model, seed=seed, batch=2, length=6 + seed) for seed in range(4)]
    alone, found = [int8(**batch).logits for batch in inputs], {}

    def call(number: int) -> None:
        for _ in range(5):
            found[number] = int8(**inputs[number]).logits

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number]) for number in range(4))


def test_it_is_an_artifact(classifier):
    model, folder = classifier
    artifact = open_artifact(folder, threads=1)
    assert (artifact.backend, artifact.precision) == ("openvino", "int8")
    assert [file.name for file in weight_files(folder)] == [WEIGHTS_NAME, IR_NAME]
    assert file_size(folder) == sum((folder / name).stat().st_size for name in (WEIGHTS_NAME, IR_NAME))
    inputs = inputs_for(model)
    assert artifact.predict({**inputs, "labels": torch.zeros(3)}).shape == (3, 3)


def test_an_onnx_folder_of_ours(tmp_path):
    model = make("bert", "BertForSequenceClassification", "stock")
    export_onnx(model, tmp_path / "onnx", validate=False)
    quantize(model, tmp_path / "int8", source=tmp_path / "onnx", task="text-classification", per_channel=False)
    assert_near(OVQuantizedModel.from_pretrained(tmp_path / "int8", precision="f32"), model, ((3, 9),))
    with pytest.raises(FlexCompressError, match="are part of its graph: give the PyTorch model"):
        quantize(model, tmp_path / "no", lengths=[4, 3, 2], source=tmp_path / "onnx", task="text-classification")
    export_onnx(model, tmp_path / "fused", fuse=True, validate=False)
    with pytest.raises(FlexCompressError, match="fused for ONNX Runtime or int8 already: give the PyTorch model"):
        quantize(model, tmp_path / "no", source=tmp_path / "fused", task="text-classification")
    (tmp_path / "onnx" / "other.onnx").write_bytes((tmp_path / "onnx" / "model.onnx").read_bytes())
    with pytest.raises(FlexCompressError, match="holds several ONNX models: name the one"):
        quantize(model, tmp_path / "no", source=tmp_path / "onnx", task="text-classification")
    assert not (tmp_path / "no").exists()


def test_targets_without_vnni(tmp_path):
    model = make("bert", "BertForSequenceClassification", "stock")
    kept = {"embeddings": False, "fuse": False}
    result = quantize_openvino(model, tmp_path / "7", target="avx2", calibration_dataset=examples(model), **kept)
    assert "neither VNNI nor AMX: weights are 7-bit" in result.summary() and not result.report.attentions
    quantize(model, tmp_path / "8", **kept)
    largest = {}
    for bits in "78":
        ops = openvino.Core().read_model(tmp_path / bits / IR_NAME).get_ops()
        weights = [op.data for op in ops if op.get_type_name() == "Constant" and op.data.dtype == np.int8]
        assert len(weights) == 20
        largest[bits] = max(int(np.abs(weight.astype(int)).max()) for weight in weights)
    assert largest == {"7": 64, "8": 127}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dynamic"}, "choose --mode static, and give --dataset, or --backend ort"),
        ({"mode": "statik"}, 'Did you mean "static"'),
        ({"target": "arm64"}, "makes int8 for x86 processors .* not for arm64"),
        ({"target": "tensorrt"}, "not for tensorrt"),
        ({"calibration_dataset": None}, "needs calibration examples"),
        ({"calibration_dataset": []}, "at least one row"),
        ({"per_chanel": True}, 'Did you mean "per_channel"'),
        ({"calibration_method": "mse"}, "calibrated with minmax, not with 'mse'"),
        (
            {"task": "text-generation"},
            "runs no text-generation models, only feature-extraction, .* choose --backend ort",
        ),
    ],
)
def test_one_sentence_for_what_is_wrong(tmp_path, options, message):
    model = make("bert", "BertForSequenceClassification", "stock")
    with pytest.raises(FlexCompressError, match=message):
        quantize_openvino(model, tmp_path / "int8", **{"calibration_dataset": examples(model), **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("family", "name"), [("gpt2", "GPT2LMHeadModel"), ("t5", "T5ForConditionalGeneration")])
def test_decoders_are_refused(tmp_path, family, name):
    make(family, name, "stock").save_pretrained(tmp_path / "model")
    with pytest.raises(
        FlexCompressError, match=r"runs no text2?-?(text-)?generation models, only .* choose --backend ort"
    ):
        quantize_openvino(tmp_path / "model", tmp_path / "int8", calibration_dataset=[{"input_ids": [1, 2]}])


def test_a_model_is_not_replaced_by_its_int8(tmp_path):
    make("bert", "BertForSequenceClassification", "stock").save_pretrained(tmp_path / "model")
    with pytest.raises(FlexCompressError, match="holds what the output is made of, which would be lost"):
        quantize_openvino(tmp_path / "model", tmp_path, calibration_dataset=[{"input_ids": [1, 2]}], overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_without_the_extra(classifier, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FlexCompressError, match=r"pip install optimum-flexcompress\[openvino\]"):
        quantize_openvino(classifier[0], tmp_path / "int8", calibration_dataset=[])
    if package == "openvino":
        with pytest.raises(FlexCompressError, match=r"pip install optimum-flexcompress\[openvino\]"):
            OVQuantizedModel.from_pretrained(classifier[1])


def copy_of(folder, tmp_path):
    OVQuantizedModel.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


def test_damaged_and_other_artefacts(classifier, tmp_path):
    folder = copy_of(classifier[1], tmp_path)
    assert OVQuantizedModelForSequenceClassification.from_pretrained(folder).config.id2label
    with pytest.raises(FlexCompressError, match="open it with OVQuantizedModelForSequenceClassification"):
        OVQuantizedModelForQuestionAnswering.from_pretrained(folder)
    with pytest.raises(FlexCompressError, match="OpenVINO cannot open .* on the device TPU"):
        OVQuantizedModel.from_pretrained(folder, device="TPU")
    with pytest.raises(FlexCompressError, match="no option 'thread'. Did you mean \"threads\""):
        OVQuantizedModel.from_pretrained(folder, thread=1)
    weights = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(weights[:-100])
    with pytest.raises(FlexCompressError, match="it is incomplete or was changed"):
        OVQuantizedModel.from_pretrained(folder)
    (folder / WEIGHTS_NAME).write_bytes(weights[:100] + bytes(10) + weights[110:])
    with pytest.raises(FlexCompressError, match="SHA-256 differs"):
        open_artifact(folder)
    (folder / WEIGHTS_NAME).write_bytes(weights)
    record = json.loads((folder / RECORD_NAME).read_text())
    for change, message in (
        ({"versions": {"openvino": "2099.1.0"}}, r"made with OpenVINO 2099\.1\.0, and .* is installed: install"),
        ({"versions": {"openvino": "dev"}}, "OpenVINO dev made the model, which is no version"),
        ({"files": {WEIGHTS_NAME: record["files"][WEIGHTS_NAME]}}, "names no .xml files where there must be one"),
        ({"format": 0}, "quantize the original model again"),
        ({"backend": "ipex"}, "made for the backend ipex"),
    ):
        (folder / RECORD_NAME).write_text(json.dumps({**record, **change}))
        with pytest.raises(FlexCompressError, match=message):
            OVQuantizedModel.from_pretrained(folder)
