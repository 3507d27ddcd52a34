"""Every family, dynamic and static: how far off, what is int8, and that the stock classes load it."""

from __future__ import annotations

import json

import numpy as np
import optimum.onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from transformers import PreTrainedModel

from optimum_flexcompress import FlexORTModelForCausalLM, FlexORTModelForSeq2SeqLM, FlexORTQuantizer
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.export.graph import load_model
from optimum_flexcompress.quantization import quantize_folder
from optimum_flexcompress.quantization.examples import calibration_feeds
from tests.export.exported import KINDS, generate, make, relative_error
from tests.tasks.toys import word_tokenizer
from tests.tiny import inputs_for, outputs_of


HEADS = {
    "bert": ("BertForSequenceClassification", ort.ORTModelForSequenceClassification),
    "roberta": ("RobertaForTokenClassification", ort.ORTModelForTokenClassification),
    "distilbert": ("DistilBertForQuestionAnswering", ort.ORTModelForQuestionAnswering),
    "vit": ("ViTForImageClassification", ort.ORTModelForImageClassification),
    "gpt2": ("GPT2LMHeadModel", FlexORTModelForCausalLM),
    "llama": ("LlamaForCausalLM", FlexORTModelForCausalLM),
    "t5": ("T5ForConditionalGeneration", FlexORTModelForSeq2SeqLM),
    "bart": ("BartForConditionalGeneration", FlexORTModelForSeq2SeqLM),
}
# Random weights make logits that are sums of large numbers of both signs, which rounding hits much harder than those
# of trained models; these are the errors seen, with some room.
BOUNDS = {"dynamic": 0.12, "static": 0.2}


def examples(model: PreTrainedModel, count: int = 24) -> list[dict[str, torch.Tensor]]:
    return [
        {name: value[0] for name, value in inputs_for(model, seed=100 + i, batch=1, length=5 + i % 6).items()}
        for i in range(count)
    ]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", HEADS)
def test_int8(exported, tmp_path, family, kind, mode):
    name, ort_class = HEADS[family]
    model, folder = exported(family, name, kind)
    result = quantize_folder(
        folder,
        tmp_path / "int8",
        mode,
        "avx512_vnni",
        calibration_dataset=examples(model) if mode == "static" else None,
    )
    int8 = ort_class.from_pretrained(tmp_path / "int8")
    inputs = inputs_for(model, batch=4, length=10)
    outputs = outputs_of(model, inputs)
    actual = int8(**inputs)
    for output in ("logits", "start_logits", "end_logits"):
        if output in outputs:
            visible = np.s_[:]
            if outputs[output].dim() > 1 and "attention_mask" in inputs and "decoder_input_ids" not in inputs:
                # Padded positions are nobody's concern, and static ranges do not cover them.
                if outputs[output].shape[:2] == inputs["input_ids"].shape:
                    visible = inputs["attention_mask"].bool().numpy()
            expected = outputs[output].numpy()[visible]
            error = relative_error(np.asarray(actual[output])[visible], expected)
            assert 0 < error < BOUNDS[mode], f"{output}: {error:.3f}"
    for file in result.files.values():
        assert (file.static, file.dynamic)[mode == "static"] == 0 and file.static + file.dynamic
        assert file.bytes_after < file.bytes_before


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_int8_generates(exported, tmp_path, family, mode):
    name, ort_class = HEADS[family]
    model, folder = exported(family, name, "compressed")
    quantize_folder(folder, tmp_path / "int8", mode, calibration_dataset=examples(model))
    expected = generate(model, tokens=4)
    for beams in (1, 3):
        assert generate(ort_class.from_pretrained(tmp_path / "int8"), beams=beams, tokens=4).shape == expected.shape
    # Rounding may turn a close race, after which all further tokens differ: the first one is judged.
    place = 1 if model.config.is_encoder_decoder else 7
    actual = generate(ort_class.from_pretrained(tmp_path / "int8"), tokens=4)
    assert (actual[:, place] == expected[:, place]).sum() >= 2


def test_weights_and_tables_are_int8(exported, tmp_path):
    _, folder = exported("bert", "BertForSequenceClassification", "stock")
    quantize_folder(folder, tmp_path / "int8")
    tensors = load_model(tmp_path / "int8" / "model.onnx").graph.initializer
    matrices = [t for t in tensors if len(t.dims) == 2 and min(t.dims) > 1]
    kinds = {t.name: t.data_type for t in matrices}
    # Three layers of six, the pooler, the head, words and positions; the two token types stay.
    assert list(kinds.values()).count(TensorProto.INT8) == 22
    assert [name for name, kind in kinds.items() if kind != TensorProto.INT8] == [
        "bert.embeddings.token_type_embeddings.weight"
    ]
    assert kinds["bert.embeddings.word_embeddings.weight_quantized"] == TensorProto.INT8


def test_the_files_of_an_encoder_decoder(exported, tmp_path):
    model, folder = exported("bart", "BartForConditionalGeneration", "stock")
    quantize_folder(folder, tmp_path / "dynamic")
    quantize_folder(folder, tmp_path / "static", "static", calibration_dataset=examples(model, 4))

    def names(mode):
        return sorted(file.name for file in (tmp_path / mode).glob("*.onnx"))

    assert names("dynamic") == ["decoder_model_merged.onnx", "encoder_model.onnx"]
    assert names("static") == ["decoder_model.onnx", "decoder_with_past_model.onnx", "encoder_model.onnx"]
    for name in names("static"):
        kinds = {node.op_type for node in load_model(tmp_path / "static" / name).graph.node}
        assert "MatMulIntegerToFloat" in kinds and not kinds & {"DynamicQuantizeMatMul", "DynamicQuantizeLinear"}


def test_decoders_are_calibrated_on_what_the_model_generates(tmp_path):
    model = make("bart", "BartForConditionalGeneration", "stock")
    export_onnx(model, tmp_path)
    rows = examples(model, 3)
    feeds = calibration_feeds(sorted(tmp_path.glob("*.onnx")), rows, limit=2, new_tokens=9)
    decoder, with_past = feeds["decoder_model.onnx"], feeds["decoder_with_past_model.onnx"]
    assert [len(feed["input_ids"][0]) for feed in feeds["encoder_model.onnx"]] == [5, 6]
    assert [feed["input_ids"].shape for feed in decoder] == [(1, 1), (1, 1)]
    # Four of eight steps for each example, early and late, each with the tokens before it in its cache.
    assert [feed["past_key_values.0.decoder.key"].shape[2] for feed in with_past] == 2 * [1, 3, 6, 8]
    ids = model.generate(rows[0]["input_ids"][None], max_new_tokens=9, min_new_tokens=9, do_sample=False)[0]
    assert [feed["input_ids"].item() for feed in with_past[:4]] == [ids[place].item() for place in (1, 3, 6, 8)]


def test_a_model_that_ends_at_once_can_be_calibrated(tmp_path):
    model = make("bart", "BartForConditionalGeneration", "stock")
    model.final_logits_bias[0, model.generation_config.eos_token_id] = 1e3
    quantize_folder(model, tmp_path / "int8", "static", calibration_dataset=examples(model, 4))
    assert (tmp_path / "int8" / "decoder_with_past_model.onnx").is_file()


def test_a_pytorch_folder_in_one_call(tmp_path):
    model = make("bert", "BertForSequenceClassification", "compressed")
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    result = quantize_folder(tmp_path / "model", tmp_path / "int8")
    names = {file.name for file in (tmp_path / "int8").iterdir()}
    assert {"model.onnx", "config.json", "ort_config.json", "quantization_report.json", "tokenizer.json"} <= names
    report = json.loads((tmp_path / "int8" / "quantization_report.json").read_text())
    assert report["settings"]["mode"] == "dynamic" and report["files"]["model.onnx"]["dynamic"] > 0
    assert "MB ->" in result.summary() and "int8 embedding tables" in result.summary()


def test_the_quantizer_takes_models_and_suffixes(exported, tmp_path):
    model, folder = exported("bert", "BertForSequenceClassification", "stock")
    loaded = ort.ORTModelForSequenceClassification.from_pretrained(folder)
    FlexORTQuantizer.from_pretrained(loaded).quantize(save_dir=tmp_path / "a", file_suffix="quantized")
    FlexORTQuantizer.from_pretrained(model).quantize(save_dir=tmp_path / "b", target="avx2", per_channel=False)
    assert (tmp_path / "a" / "model_quantized.onnx").is_file()
    inputs, logits = inputs_for(model), []
    for name in ("a", "b"):
        logits.append(ort.ORTModelForSequenceClassification.from_pretrained(tmp_path / name)(**inputs).logits)
        assert relative_error(logits[-1].numpy(), outputs_of(model, inputs)["logits"].numpy()) < 0.2
    assert not torch.equal(*logits)


def test_reduced_range_fits_seven_bits(exported, tmp_path):
    _, folder = exported("bert", "BertForSequenceClassification", "stock")
    largest = {}
    for target in ("avx2", "avx512", "avx512_vnni", "arm64"):
        quantize_folder(folder, tmp_path / target, target=target)
        tensors = load_model(tmp_path / target / "model.onnx").graph.initializer
        values = [np.frombuffer(t.raw_data, np.int8) for t in tensors if t.name.startswith("onnx::MatMul")]
        values = [value for value in values if value.size >= 32 * 32]
        largest[target] = max(int(np.abs(value.astype(int)).max()) for value in values)
    assert largest == {"avx2": 64, "avx512": 64, "avx512_vnni": 127, "arm64": 127}
