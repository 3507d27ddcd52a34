"""Opening models, and running them over a split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optimum_flexcompress.data import load_data
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import evaluate_artifact, open_artifact
from optimum_flexcompress.evaluation.artifact import find_backend
from optimum_flexcompress.evaluation.evaluate import stream_batches
from optimum_flexcompress.evaluation.inputs import example_batch
from optimum_flexcompress.export import export_onnx
from tests.evaluation.conftest import save
from tests.tasks.toys import word_tokenizer


@pytest.fixture(scope="module")
def exported(classifiers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "teacher"
    export_onnx(classifiers / "teacher", folder, task="text-classification")
    return folder


@pytest.fixture(scope="module")
def prepared(classifiers, rows):
    artifact = open_artifact(classifiers / "teacher")
    return artifact.task.prepare(load_data(rows), artifact.load_processor(), model=artifact.config)


def test_pytorch_and_onnx_give_the_same(classifiers, exported, prepared):
    ours, theirs = open_artifact(classifiers / "teacher"), open_artifact(exported, threads=1)
    assert (ours.backend, ours.precision, ours.task.name) == ("pytorch", "fp32", "text-classification")
    assert (theirs.backend, theirs.precision) == ("onnxruntime", "fp32")
    first, second = (
        evaluate_artifact(model, prepared, "test", batch_size=4, progress=False) for model in (ours, theirs)
    )
    np.testing.assert_allclose(first.predictions, second.predictions, atol=1e-4)
    assert first.metrics == second.metrics


@pytest.mark.parametrize(
    ("family", "name", "task"),
    [
        ("roberta", "RobertaForSequenceClassification", "text-classification"),
        ("distilbert", "DistilBertForTokenClassification", "token-classification"),
        ("bert", "BertForQuestionAnswering", "question-answering"),
        ("distilbert", "DistilBertForMaskedLM", "fill-mask"),
        ("bert", "BertModel", "feature-extraction"),
    ],
)
def test_every_encoder_runs_in_onnx_runtime(tmp_path, family, name, task):
    folder = save(tmp_path / "model", family, name)
    export_onnx(folder, tmp_path / "onnx", task=task)
    ours, theirs = open_artifact(folder), open_artifact(tmp_path / "onnx", threads=1)
    assert theirs.task.name == task
    # The tokenizer gives token types to models that know none: they are left out.
    batch = dict(ours.load_processor()(["the film was good", "bad"], return_tensors="pt", padding=True))
    for first, second in zip(_parts(ours.predict(batch)), _parts(theirs.predict(batch))):
        np.testing.assert_allclose(first, second, atol=1e-4)


def _parts(predictions):
    return predictions if isinstance(predictions, tuple) else (predictions,)


def test_predictions_come_in_the_order_of_the_split(classifiers, prepared):
    artifact = open_artifact(classifiers / "teacher")
    result = evaluate_artifact(artifact, prepared, "test", batch_size=4, progress=False)
    for index in (0, 7, 20):
        row = prepared.dataset["test"][index]
        logits = artifact.predict(prepared.collator([row]))
        np.testing.assert_allclose(result.predictions[index], logits[0], atol=1e-5)
        assert result.label_ids[index] == row["labels"]
    accuracy = np.mean(result.predictions.argmax(-1) == prepared.dataset["test"]["labels"])
    assert result.metrics["accuracy"] == pytest.approx(accuracy)


def test_half_precision_and_attention_are_passed_on(classifiers):
    artifact = open_artifact(classifiers / "teacher", dtype=torch.bfloat16, attn_implementation="eager")
    assert artifact.precision == "bf16" and artifact.config._attn_implementation == "eager"


def test_int8_graphs_are_recognised(exported, tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    from optimum_flexcompress.evaluation.artifact import is_int8

    quantize_dynamic(exported / "model.onnx", tmp_path / "model.onnx")
    assert is_int8(tmp_path / "model.onnx") and not is_int8(exported / "model.onnx")


def test_masked_and_token_models_pad_their_outputs_alike(tmp_path, rows):
    folder = save(tmp_path / "mlm", "bert", "BertForMaskedLM")
    artifact = open_artifact(folder)
    prepared = artifact.task.prepare(load_data(rows), word_tokenizer(), max_length=16)
    whole, parts = (
        evaluate_artifact(artifact, prepared, "test", batch_size=size, progress=False).metrics for size in (64, 1)
    )
    assert whole["perplexity"] == pytest.approx(parts["perplexity"], rel=1e-4)


@pytest.mark.parametrize(("family", "name"), [("t5", "T5ForConditionalGeneration"), ("gpt2", "GPT2LMHeadModel")])
def test_generation(tmp_path, family, name):
    artifact = open_artifact(save(tmp_path / family, family, name))
    batch = example_batch(artifact.config, artifact.task, 2, 6)
    ids = artifact.generate(batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape == (2, 5 if artifact.config.is_encoder_decoder else 10)


def test_example_batches_have_the_shape_and_no_special_ids(classifiers):
    artifact = open_artifact(classifiers / "teacher")
    batch = example_batch(artifact.config, artifact.task, 3, 20)
    assert batch["input_ids"].shape == (3, 20) and batch["attention_mask"].all()
    assert not (batch["input_ids"] == artifact.config.pad_token_id).any()
    assert torch.equal(batch["input_ids"], example_batch(artifact.config, artifact.task, 3, 20)["input_ids"])
    with pytest.raises(FlexCompressError, match="at most 64 tokens"):
        example_batch(artifact.config, artifact.task, 1, 65)


def test_streams_are_real_rows_without_padding(prepared):
    batches = stream_batches(prepared, "test", 10)
    lengths = {len(ids) for ids in prepared.dataset["test"]["input_ids"]}
    assert len(batches) == 10 and all(batch["attention_mask"].all() for batch in batches)
    assert {batch["input_ids"].shape[1] for batch in batches} <= lengths
    assert len(stream_batches(prepared, "test", 1000)) == 21


def test_what_cannot_be_opened(tmp_path, classifiers, exported):
    with pytest.raises(FlexCompressError, match="no model"):
        open_artifact(tmp_path / "missing")
    with pytest.raises(FlexCompressError, match="neither PyTorch nor ONNX"):
        open_artifact(tmp_path, "text-classification")
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FlexCompressError, match=r"both PyTorch and ONNX.*model\.onnx"):
        find_backend(tmp_path)
    assert find_backend(tmp_path / "model.onnx") == "onnxruntime"


def test_a_head_is_not_made_up(tmp_path):
    bare = save(tmp_path / "bare", "bert", "BertModel")
    message = (
        r"bare has no head for text-classification \(it is a BertModel\): fine-tune it first, or give --task feat"
    )
    with pytest.raises(FlexCompressError, match=message):
        open_artifact(bare, "text-classification")
    assert open_artifact(bare).task.name == "feature-extraction"
    # Another class may have been saved with the same head.
    both = save(tmp_path / "both", "bert", "BertForPreTraining")
    assert type(open_artifact(both, "fill-mask").model).__name__ == "BertForMaskedLM"
    with pytest.raises(FlexCompressError, match="has no head for question-answering"):
        open_artifact(both, "question-answering")


def test_a_damaged_graph_is_one_sentence(exported, tmp_path):
    import shutil

    from optimum_flexcompress import FlexORTModelForCausalLM, FlexORTModelForSeq2SeqLM

    shutil.copytree(exported, tmp_path / "cut")
    graph = tmp_path / "cut" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(
        FlexCompressError, match=r"model\.onnx cannot be opened \(.*\): it is damaged; copy the folder"
    ):
        open_artifact(tmp_path / "cut")
    with pytest.raises(FlexCompressError, match="cannot be opened .* it is damaged"):
        FlexORTModelForCausalLM.from_pretrained(tmp_path / "cut")
    for name in ("encoder_model", "decoder_model", "decoder_with_past_model"):
        shutil.copy(graph, tmp_path / "cut" / f"{name}.onnx")
    with pytest.raises(FlexCompressError, match="cannot be opened .* it is damaged"):
        FlexORTModelForSeq2SeqLM.from_pretrained(tmp_path / "cut")


def test_several_onnx_models_in_one_folder(exported, tmp_path):
    import shutil

    folder = tmp_path / "two"
    shutil.copytree(exported, folder)
    shutil.copy(folder / "model.onnx", folder / "model_quantized.onnx")
    with pytest.raises(FlexCompressError, match=r"several ONNX models \(model\.onnx, model_quantized\.onnx\)"):
        open_artifact(folder)
    assert open_artifact(folder / "model_quantized.onnx").folder == folder
