"""Recipes that distil and quantize from end to end on a tiny model: every stage runs, the results open and agree."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import Report, open_artifact
from optimum_flexcompress.recipes import load_recipe, run_recipe


QUICK = [
    "data.max_length=24",
    "stages.finetune.epochs=1",
    "stages.distill.epochs=1",
    "stages.benchmark.rounds=3",
    "stages.benchmark.max_seconds=0.1",
    "stages.benchmark.stream_rows=4",
    "stages.benchmark.batch_sizes=[2]",
    "stages.benchmark.memory=false",
    "stages.benchmark.threads=1",
]


@pytest.fixture(scope="module")
def compress(tmp_path_factory, model_folder, data_folder):
    def compress(recipe, *overrides, output=None, data=data_folder):
        return run_recipe(
            load_recipe(recipe, [*QUICK, *overrides]),
            str(model_folder),
            str(data),
            "text-classification",
            output or tmp_path_factory.mktemp("runs") / "out",
            say=lambda line: None,
        )

    return compress


@pytest.fixture(scope="module", params=["distil-int8", "minilm-int8"])
def result(request, compress):
    """What each recipe that distils and quantizes leaves."""
    return compress(request.param)


def test_every_stage_leaves_its_folder(result):
    for name, files in {
        "finetune": ["model.safetensors", "tokenizer.json"],
        "distill": ["model.safetensors", "tokenizer.json"],
        "export": ["model.onnx", "config.json", "tokenizer.json"],
        "quantize": ["model.onnx", "config.json", "tokenizer.json"],
        "benchmark": ["report.json", "report.html"],
    }.items():
        present = {path.name for path in result.folders[name].iterdir()}
        assert {*files, "stage.json"} <= present, name


def test_the_student_is_half_the_teacher(result):
    depths = {
        name: transformers.AutoConfig.from_pretrained(result.folders[name]).num_hidden_layers
        for name in ("finetune", "distill")
    }
    assert depths == {"finetune": 4, "distill": 2}


def test_the_export_says_what_the_student_says(result):
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folders["export"])
    batch = tokenizer(["where is my card", "is the rate fair today or not"], padding=True, return_tensors="pt")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(result.folders["distill"]).eval()
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    found = open_artifact(result.folders["export"], "text-classification").predict(batch)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_int8_is_smaller(result):
    sizes = {name: (result.folders[name] / "model.onnx").stat().st_size for name in ("export", "quantize")}
    assert sizes["quantize"] < 0.5 * sizes["export"]
    session = onnxruntime.InferenceSession(result.folders["quantize"] / "model.onnx")
    assert {value.name for value in session.get_inputs()} >= {"input_ids", "attention_mask"}


def test_the_report_names_the_models_and_their_final_places(result):
    report = Report.load(result.folders["benchmark"])
    assert [model.name for model in report.models] == ["finetune", "distill", "export", "quantize"]
    assert report.baseline == "finetune"
    assert [model.path for model in report.models] == [str(result.folders[model.name]) for model in report.models]
    assert report.rows == 24
    assert report["distill"].parameters < report["finetune"].parameters
    kept = json.loads((result.folders["benchmark"] / "stage.json").read_text())["metrics"]
    assert kept["quantize accuracy"] == report["quantize"].metrics["accuracy"]
    # One page that needs nothing beside it.
    page = (result.folders["benchmark"] / "report.html").read_text()
    assert "<script src" not in page and "quantize" in page


def test_static_int8(compress):
    result = compress("distil-int8", "stages.quantize.mode=static", "stages.quantize.calibration_samples=8")
    operators = (result.folders["quantize"] / "model.onnx").read_bytes()
    assert b"QuantizeLinear" in operators
    assert result.metrics["quantize"]["target"] in ("avx2", "avx512", "avx512_vnni", "arm64")


def test_only_the_later_stages_run_again(compress, tmp_path):
    compress("distil-int8", output=tmp_path / "out")
    result = compress("distil-int8", "stages.quantize.per_channel=false", output=tmp_path / "out")
    assert result.skipped == ["finetune", "distill", "export"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.quantize.target=avx51", "stages.quantize: .*avx51.*avx512"),
        ("stages.quantize.options.embedings=false", 'stages.quantize: .*Did you mean "embeddings"'),
        ("stages.quantize.target=tensorrt", "stages.quantize: .*static"),
        ("stages.benchmark.rounds=1", "rounds must be at least 3"),
        ("stages.benchmark.lengths=[]", "lengths must be one or more numbers"),
        ("stages.benchmark.models=[finetune, distil]", 'reads "distil", which is no stage above it'),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(compress, tmp_path, override, message):
    with pytest.raises(FlexCompressError, match=message):
        compress("distil-int8", override, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_static_int8_without_training_data(tmp_path, compress, data_folder):
    trained = compress("distil-int8").folders["finetune"]
    file = tmp_path / "only.yaml"
    file.write_text("stages:\n  quantize: {model: input, mode: static}\n")
    with pytest.raises(FlexCompressError, match="has no training split: give a data set with one, or set mode"):
        run_recipe(
            load_recipe(str(file)),
            str(trained),
            str(data_folder / "test.csv"),
            "text-classification",
            tmp_path / "out",
        )
    file.write_text("stages:\n  quantize: {model: input}\n")
    done = run_recipe(
        load_recipe(str(file)), str(trained), str(data_folder / "test.csv"), "text-classification", tmp_path / "out"
    )
    assert (done.folders["quantize"] / "model.onnx").is_file()
