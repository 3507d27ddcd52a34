"""The family matrix: ONNX computes what PyTorch computes, at lengths other than the traced ones."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import optimum.onnxruntime
import pytest
import torch
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM

from optimum_flexcompress import (
    FlexCompressError,
    FlexORTModelForCausalLM,
    FlexORTModelForSeq2SeqLM,
    Kept,
    KeptLayer,
    select,
)
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.export import onnx as onnx_export
from tests.export.exported import KINDS, generate, make, run
from tests.tasks.toys import word_tokenizer
from tests.tiny import ALL, GENERATIVE, build, inputs_for, outputs_of


DECODERS = [pair for pair in GENERATIVE if pair[0] not in ("t5", "t5-gated-untied", "bart")]
ENCODER_DECODERS = [pair for pair in GENERATIVE if pair not in DECODERS]
ONE_FILE = [pair for pair in ALL if pair not in ENCODER_DECODERS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "name"), ONE_FILE)
def test_outputs_equal_pytorch(exported, family, name, kind):
    model, folder = exported(family, name, kind)
    for batch, length in ((1, 5), (4, 13)):
        inputs = inputs_for(model, seed=batch, batch=batch, length=length)
        if "position_ids" in inputs_of(folder):
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        actual, compared = run(folder / "model.onnx", inputs), 0
        for output, expected in outputs_of(model, inputs).items():
            # Poolers and the like are not part of the task's ONNX outputs.
            if output in actual:
                compared += 1
                np.testing.assert_allclose(actual[output], expected.numpy(), atol=1e-4, rtol=1e-4)
        assert compared


def inputs_of(folder) -> list[str]:
    from optimum_flexcompress.export.probe import open_session

    return [value.name for value in open_session(folder / "model.onnx").get_inputs()]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "name"), DECODERS)
def test_decoders_generate_what_pytorch_generates(exported, family, name, kind, beams):
    model, folder = exported(family, name, kind)
    onnx_model = FlexORTModelForCausalLM.from_pretrained(folder)
    for left in (True, False):
        torch.testing.assert_close(
            generate(onnx_model, beams=beams, left=left), generate(model, beams=beams, left=left)
        )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "name"), ENCODER_DECODERS)
def test_encoder_decoders_generate_what_pytorch_generates(exported, family, name, kind, beams):
    model, folder = exported(family, name, kind)
    expected = generate(model, beams=beams)
    for merged in (True, False):
        onnx_model = FlexORTModelForSeq2SeqLM.from_pretrained(folder, use_merged=merged)
        torch.testing.assert_close(generate(onnx_model, beams=beams), expected)


def test_threads_sleep_between_two_runs_unless_told_otherwise(exported):
    entry = "session.force_spinning_stop"
    _, decoder = exported("gpt2", "GPT2LMHeadModel", KINDS[0])
    _, pair = exported("bart", "BartForConditionalGeneration", KINDS[0])
    own, spinning = SessionOptions(), SessionOptions()
    own.intra_op_num_threads = 1
    spinning.add_session_config_entry(entry, "0")
    for options, expected in ((None, "1"), (own, "1"), (spinning, "0")):
        more = {} if options is None else {"session_options": options}
        seq2seq = FlexORTModelForSeq2SeqLM.from_pretrained(pair, **more)
        sessions = [FlexORTModelForCausalLM.from_pretrained(decoder, **more).session, seq2seq.encoder.session]
        for session in (*sessions, seq2seq.decoder.session):
            found = session.get_session_options()
            assert found.get_session_config_entry(entry) == expected
            assert options is not own or found.intra_op_num_threads == 1


def test_a_folder_without_a_merged_decoder_loads_without_a_warning(exported, tmp_path, caplog):
    _, folder = exported("bart", "BartForConditionalGeneration", KINDS[0])
    shutil.copytree(folder, tmp_path / "pair")
    (tmp_path / "pair" / "decoder_model_merged.onnx").unlink()
    logging.getLogger("optimum").propagate = True
    with caplog.at_level(logging.WARNING):
        assert not FlexORTModelForSeq2SeqLM.from_pretrained(tmp_path / "pair").decoder.is_merged
    assert "merged" not in caplog.text


@pytest.mark.parametrize(
    ("family", "name", "flex_class"),
    [
        ("gpt2", "GPT2LMHeadModel", FlexORTModelForCausalLM),
        ("llama", "LlamaForCausalLM", FlexORTModelForCausalLM),
        ("bart", "BartForConditionalGeneration", FlexORTModelForSeq2SeqLM),
    ],
)
def test_bound_inputs_and_outputs_have_true_shapes(exported, family, name, flex_class):
    model, folder = exported(family, name, "compressed")
    onnx_model = flex_class.from_pretrained(folder, use_io_binding=True)
    torch.testing.assert_close(generate(onnx_model), generate(model))


def test_stock_classes_run_stock_exports(exported):
    model, folder = exported("gpt2", "GPT2LMHeadModel", "stock")
    torch.testing.assert_close(generate(ORTModelForCausalLM.from_pretrained(folder)), generate(model))
    model, folder = exported("bart", "BartForConditionalGeneration", "stock")
    torch.testing.assert_close(generate(ORTModelForSeq2SeqLM.from_pretrained(folder)), generate(model))


def test_an_encoder_runs_in_the_stock_class(exported):
    model, folder = exported("bert", "BertForSequenceClassification", "compressed")
    inputs = inputs_for(model)
    onnx_model = optimum.onnxruntime.ORTModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(onnx_model(**inputs).logits, outputs_of(model, inputs)["logits"], atol=1e-4, rtol=1e-4)


def without_attention(kind: str):
    model = build("bart", "BartForConditionalGeneration")
    layers = [KeptLayer(index) for index in range(3)]
    setattr(layers[1], kind, [])
    return select(model, Kept(stacks={"decoder": layers}))


@pytest.mark.parametrize(("kind", "said"), [("attention", "self-attention"), ("cross_attention", "cross-attention")])
def test_a_decoder_layer_without_an_attention(kind, said, tmp_path):
    model = without_attention(kind)
    with pytest.raises(FlexCompressError, match=f"Decoder layer 1 has no {said}.*use_cache=False"):
        export_onnx(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    # The other way out that the message names.
    export_onnx(model, tmp_path / "out", use_cache=False)
    onnx_model = FlexORTModelForSeq2SeqLM.from_pretrained(tmp_path / "out", use_cache=False)
    torch.testing.assert_close(generate(onnx_model), generate(model))


def test_the_model_is_left_as_it_was(tmp_path):
    model = make("t5", "T5ForConditionalGeneration", "compressed")
    model.train()
    model.encoder.eval()
    before = [module.training for module in model.modules()], model.config.to_dict(), model.generation_config.to_dict()
    export_onnx(model, tmp_path / "out")
    after = [module.training for module in model.modules()], model.config.to_dict(), model.generation_config.to_dict()
    assert after == before


def test_half_precision_is_exported_in_single(tmp_path):
    model = build("bert", "BertForSequenceClassification").to(torch.bfloat16)
    export_onnx(model, tmp_path / "out")
    inputs = inputs_for(model)
    expected = outputs_of(model.float(), inputs)["logits"].numpy()
    assert model.dtype == torch.float32
    np.testing.assert_allclose(run(tmp_path / "out" / "model.onnx", inputs)["logits"], expected, atol=1e-4)


def test_a_saved_folder_with_its_processor(tmp_path):
    model = make("bert", "BertForTokenClassification", "compressed")
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    files = export_onnx(tmp_path / "model", tmp_path / "out")
    assert files == [tmp_path / "out" / "model.onnx"]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)["logits"].numpy()
    np.testing.assert_allclose(run(files[0], inputs)["logits"], expected, atol=1e-4, rtol=1e-4)


def test_a_wrong_graph_is_not_written(tmp_path):
    # Nothing agrees to 1e-30: stands for an export that went wrong.
    with pytest.raises(FlexCompressError, match="does not compute what the PyTorch model computes"):
        export_onnx(build("bert", "BertModel"), tmp_path / "out", atol=1e-30)
    assert list(tmp_path.iterdir()) == []


def test_the_bound_follows_the_outputs_and_the_inputs_the_seed(tmp_path, monkeypatch):
    seen = []

    def validate(*args, atol, **kwargs):
        seen.append((atol, torch.rand(3).tolist()))

    monkeypatch.setattr(onnx_export, "validate_models_outputs", validate)
    model = build("bert", "BertModel")
    for factor in (1, 1000):
        with torch.no_grad():
            model.encoder.layer[-1].output.LayerNorm.weight.mul_(factor)
        torch.manual_seed(factor)
        export_onnx(model, tmp_path / str(factor))
    (small, first), (large, second) = seen
    assert 1e-4 <= small < 1e-2 < large and first == second


def test_bart_without_an_end_token(tmp_path):
    model = build("bart", "BartForConditionalGeneration", eos_token_id=None, forced_eos_token_id=None)
    with pytest.raises(
        FlexCompressError, match="no eos_token_id, .* a bart model needs: set model.config.eos_token_id"
    ):
        export_onnx(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("text-clasification", 'is not a task. Did you mean "text-classification"?'),
        ("image-classification", "A bert model cannot be exported for image-classification: choose one of"),
    ],
)
def test_a_task_that_cannot_be(task, message, tmp_path):
    with pytest.raises(FlexCompressError) as caught:
        export_onnx(build("bert", "BertModel"), tmp_path / "out", task=task)
    assert message in str(caught.value)


def test_an_unfit_output_or_model(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(FlexCompressError, match="is not empty"):
        export_onnx(build("bert", "BertModel"), tmp_path / "full")
    with pytest.raises(FlexCompressError, match=r"no config\.json"):
        export_onnx(tmp_path / "full", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_model_is_not_replaced_by_its_export(tmp_path):
    build("bert", "BertModel").save_pretrained(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FlexCompressError, match="holds what the output is made of, which would be lost"):
        export_onnx(tmp_path / "model", tmp_path / "model", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_cache_inputs_have_one_shape_for_each_layer(exported):
    model, folder = exported("llama", "LlamaForCausalLM", "compressed")
    onnx_model = FlexORTModelForCausalLM.from_pretrained(folder)
    layers = describe(model).stacks["decoder"].layers
    heads = [layer.attention.num_kv_heads for layer in layers if layer.attention is not None]
    shapes = [onnx_model.input_shapes[f"past_key_values.{index}.key"][1] for index in range(len(heads))]
    assert shapes == heads and len(set(heads)) > 1 and len(heads) < len(layers)
