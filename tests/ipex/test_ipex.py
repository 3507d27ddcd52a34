"""Int8 models in IPEX: every family and head, stock, pruned and length-adaptive, saved and reloaded."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoTokenizer, pipeline

import optimum_flexcompress
from optimum_flexcompress import FlexCompressError, IPEXQuantizationConfig, IPEXQuantizer, set_lengths
from optimum_flexcompress.quantization.ipex import quantize_ipex
from tests.export.dropping import clear_case
from tests.export.exported import KINDS, make
from tests.tasks.toys import word_tokenizer
from tests.tiny import build, inputs_for, outputs_of


HEADS = [
    ("bert", "BertModel", "FeatureExtraction"),
    ("bert", "BertForSequenceClassification", "SequenceClassification"),
    ("roberta", "RobertaForTokenClassification", "TokenClassification"),
    ("roberta", "RobertaForMaskedLM", "MaskedLM"),
    ("distilbert", "DistilBertForQuestionAnswering", "QuestionAnswering"),
    ("vit", "ViTForImageClassification", "ImageClassification"),
]
# Nothing is rounded: what is left is what the graph does.
EXACT = {"exclude": ["*"], "embeddings": False}
LENGTHS = [7, 4, 2]


def open_ipex(folder, head: str = "SequenceClassification", **options):
    return getattr(optimum_flexcompress, f"IPEXQuantizedModelFor{head}").from_pretrained(folder, **options)


def examples(model, count: int = 12) -> list[dict[str, torch.Tensor]]:
    """Unpadded rows."""
    rows = []
    for seed in range(count // 3):
        batch = inputs_for(model, seed=100 + seed, length=12)
        for index in range(3):
            row = {name: values[index] for name, values in batch.items()}
            if "attention_mask" in row:
                row = {name: values[: int(row["attention_mask"].sum())] for name, values in row.items()}
            rows.append(row)
    return rows


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """`quantized(family, class, kind, lengths, **options) -> (PyTorch model, folder)`."""
    root = tmp_path_factory.mktemp("ipex")

    @functools.cache
    def quantize(family: str, name: str, kind: str = "stock", lengths=None, **options):
        model = make(family, name, kind)
        if lengths is not None:
            set_lengths(model, list(lengths))
        folder = root / str(len(list(root.iterdir())))
        quantizer = IPEXQuantizer.from_pretrained(model, processor=word_tokenizer())
        settings = {**options, "exclude": list(options.get("exclude", ()))}
        quantizer.quantize(folder, calibration_dataset=examples(model), **settings)
        return model, folder

    return quantize


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "name", "head"), HEADS)
def test_near_single_precision_at_other_shapes(quantized, family, name, head, kind, mode):
    model, folder = quantized(family, name, kind, mode=mode)
    loaded = open_ipex(folder, head)
    for batch, length in ((1, 5), (4, 23)):
        inputs = inputs_for(model, batch=batch, length=length)
        expected = outputs_of(model, inputs)
        # The second and third runs are the fused ones.
        for _ in range(3):
            found = loaded(**inputs)
            for key, value in found.items():
                assert value.shape == expected[key].shape
                assert relative_error(value, expected[key]) < (0.1 if mode == "dynamic" else 0.3)


@pytest.mark.parametrize("lengths", [(7, 4, 2), (0.9, 0.5, 0.3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "name", "head"), HEADS)
def test_a_graph_drops_what_the_model_drops_at_any_shape(quantized, family, name, head, kind, lengths):
    model, folder = quantized(family, name, kind, lengths, exclude=("*",), embeddings=False)
    loaded = open_ipex(folder, head)
    for batch, length in ((1, 5), (4, 14), (2, 30)):
        inputs, expected = clear_case(model, batch, length)
        for _ in range(2):
            for key, value in loaded(**inputs).items():
                torch.testing.assert_close(value, expected[key], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_int8_that_drops_tokens(quantized, mode):
    """Where lengths cut nothing, int8 is that of all tokens; where they do, a good part of it is."""
    _, full = quantized("bert", "BertModel", mode=mode)
    model, folder = quantized("bert", "BertModel", "stock", (12, 8, 8), mode=mode)
    loaded, dense = open_ipex(folder, "FeatureExtraction"), open_ipex(full, "FeatureExtraction")
    short = inputs_for(model, batch=2, length=8)
    assert relative_error(loaded(**short)[0], dense(**short)[0]) < 0.05
    inputs, expected = clear_case(model, 4, 16)
    assert relative_error(loaded(**inputs)[0], expected["last_hidden_state"]) < 0.3
    assert loaded.config.length_config["counts"] == [12, 8, 8]


def test_a_batch_in_parts_is_the_batch(quantized, monkeypatch):
    model, folder = quantized("bert", "BertForSequenceClassification", "stock", (7, 4, 2), exclude=("*",))
    loaded, inputs = open_ipex(folder), clear_case(model, 7, 14)[0]
    whole = loaded(**inputs).logits
    monkeypatch.setattr("optimum_flexcompress.modeling_ipex._MAP_BYTES", 4 * 4 * 14 * 14 * 4)
    assert loaded._parts(7, 14) == [4, 2, 1]
    torch.testing.assert_close(loaded(**inputs).logits, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lengths", [None, (7, 4, 2), (0.9, 0.5, 0.3)])
def test_padding_changes_nothing(quantized, lengths):
    model, folder = quantized("roberta", "RobertaForTokenClassification", "stock", lengths, mode="static")
    loaded, bucketed = (open_ipex(folder, "TokenClassification", length_bucket=size) for size in (1, 16))
    inputs = inputs_for(model, batch=1, length=11)
    wide = {
        name: torch.nn.functional.pad(values, (0, 9), value=model.config.pad_token_id if name == "input_ids" else 0)
        for name, values in inputs.items()
    }
    alone = loaded(**inputs).logits
    torch.testing.assert_close(loaded(**wide).logits[:, :11], alone, atol=1e-4, rtol=1e-3)
    assert bucketed(**inputs).logits.shape == alone.shape
    torch.testing.assert_close(bucketed(**inputs).logits, alone, atol=1e-4, rtol=1e-3)


def test_buckets_stop_where_the_model_does(quantized):
    model, folder = quantized("bert", "BertForSequenceClassification", mode="dynamic")
    loaded = open_ipex(folder, length_bucket=48)
    inputs = inputs_for(model, batch=1, length=60)  # 64 positions, not 96
    assert loaded(**inputs).logits.shape == (1, 3)
    with pytest.raises(FlexCompressError, match="length_bucket is 0"):
        open_ipex(folder, length_bucket=0)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_settings(quantized, mode):
    model, folder = quantized("bert", "BertModel", mode=mode, per_channel=False, reduce_range=True, target="avx2")
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)["last_hidden_state"]
    assert relative_error(open_ipex(folder, "FeatureExtraction")(**inputs)[0], expected) < 0.2
    settings = IPEXQuantizationConfig.from_pretrained(folder)
    assert (settings.mode, settings.reduce_range, settings.per_channel) == (mode, True, False)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_calibration_methods(quantized, method):
    model, folder = quantized("bert", "BertModel", mode="static", calibration_method=method)
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)["last_hidden_state"]
    assert relative_error(open_ipex(folder, "FeatureExtraction")(**inputs)[0], expected) < 0.15


def test_attention_alone_and_weights_alone_are_nearer(quantized):
    model, both = quantized("bert", "BertModel", mode="static", embeddings=False)
    _, weights = quantized("bert", "BertModel", mode="static", embeddings=False, attention=False)
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)["last_hidden_state"]
    errors = [relative_error(open_ipex(path, "FeatureExtraction")(**inputs)[0], expected) for path in (weights, both)]
    assert 0 < errors[0] < errors[1] * 1.2


def test_the_model_stays_as_it_is(quantized):
    model = build("bert", "BertForSequenceClassification")
    inputs, before = inputs_for(model), outputs_of(model, inputs_for(model))["logits"]
    quantizer = IPEXQuantizer.from_pretrained(model, length_config=LENGTHS)
    assert quantizer.model is not model and not hasattr(model.config, "length_config")
    # Not to the last bit: importing IPEX replaces the layer norm of PyTorch.
    torch.testing.assert_close(outputs_of(model, inputs)["logits"], before, atol=1e-5, rtol=1e-4)


def test_a_pipeline(quantized, caplog):
    _, folder = quantized("bert", "BertForSequenceClassification", mode="static")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classify = pipeline("text-classification", model=open_ipex(folder), tokenizer=tokenizer)
    found = classify(["the film was good", "bad plot"], batch_size=2)
    assert len(found) == 2 and all(0 <= item["score"] <= 1 for item in found)
    assert not [record for record in caplog.records if "not supported" in record.message]


def test_saving_again(quantized, tmp_path):
    model, folder = quantized("bert", "BertForSequenceClassification", mode="static")
    inputs = inputs_for(model)
    first = open_ipex(folder)
    first.save_pretrained(tmp_path / "copy")
    assert torch.equal(open_ipex(tmp_path / "copy")(**inputs).logits, first(**inputs).logits)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        (
            "t5",
            "T5EncoderModel",
            "encoders of the families BERT, RoBERTa, DistilBERT and ViT, and T5EncoderModel is none",
        ),
        ("gpt2", "GPT2ForSequenceClassification", "encoders of the families BERT, RoBERTa, DistilBERT and ViT"),
        ("bart", "BartForConditionalGeneration", "IPEX runs no text2text-generation models"),
        ("llama", "LlamaForCausalLM", "IPEX runs no text-generation models"),
    ],
)
def test_what_it_cannot_do_is_refused(family, name, message):
    with pytest.raises(FlexCompressError) as error:
        IPEXQuantizer.from_pretrained(build(family, name))
    assert message in str(error.value) and "--backend ort" in str(error.value) and "\n" not in str(error.value)


def test_relative_positions_are_refused(tmp_path):
    model = build("bert", "BertModel", position_embedding_type="relative_key")
    with pytest.raises(FlexCompressError, match="3 of the attentions of BertModel compute more than scaled dot"):
        IPEXQuantizer.from_pretrained(model).quantize(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_replaced_by_its_int8(tmp_path):
    build("bert", "BertForSequenceClassification").save_pretrained(tmp_path / "model")
    with pytest.raises(FlexCompressError, match="holds what the output is made of, which would be lost"):
        quantize_ipex(tmp_path / "model", tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "static"}, "Static quantization needs calibration examples"),
        ({"mode": "static", "calibration_dataset": []}, "There are no calibration examples"),
        ({"mode": "static", "calibration_dataset": [{"text": "x"}]}, "have no column input_ids"),
        ({"embedings": False}, "no IPEX quantization setting 'embedings'"),
        ({"fuse": False}, "leave --no-fuse out"),
        ({"length_config": [7, 4]}, "The lengths are for 2 layers"),
        ({"task": "sumarization"}, "is not a task"),
    ],
)
def test_one_sentence_for_what_is_wrong(tmp_path, options, message):
    with pytest.raises(FlexCompressError, match=message):
        quantize_ipex(build("bert", "BertForSequenceClassification"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
