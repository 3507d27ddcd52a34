"""`optimum-cli flexcompress quantize`."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from optimum.commands.flexcompress.quantize import QuantizeCommand
from optimum.onnxruntime import ORTModelForSequenceClassification

from optimum_flexcompress import OVQuantizedModelForSequenceClassification
from optimum_flexcompress.export import onnx
from optimum_flexcompress.quantization.saved import write_saved
from tests.tasks.toys import word_tokenizer
from tests.tiny import build, inputs_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and `reviews.csv` with unusual column names."""
    root = tmp_path_factory.mktemp("quantize")
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    build("bert", "BertForSequenceClassification", **names).save_pretrained(root / "model")
    word_tokenizer().save_pretrained(root / "model")
    (root / "reviews.csv").write_text("opinion,verdict\nthe film was good,x\nbad plot,y\nvery bad,z\n")
    return root


def run(*arguments) -> int:
    parser = argparse.ArgumentParser("optimum-cli")
    QuantizeCommand(parser.add_subparsers())
    try:
        args = parser.parse_args(["quantize", *map(str, arguments)])
        args.func(args).run()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_an_int8_folder_that_loads(folder, tmp_path, capsys, mode):
    data = ["--dataset", folder / "reviews.csv", "--columns", "text=opinion", "label=verdict", "--samples", "2"]
    code = run("-m", folder / "model", "--mode", mode, "-o", tmp_path / "int8", *(data if mode == "static" else []))
    out = capsys.readouterr().out
    assert code == 0 and f"int8 products ({mode})" in out and " thread" in out and "; torch" in out
    model = ORTModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert torch.isfinite(model(**inputs_for(build("bert", "BertForSequenceClassification"))).logits).all()


def test_json_on_the_standard_output(folder, tmp_path, capsys):
    assert run("-m", folder / "model", "-o", tmp_path / "int8", "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["output"], found["mode"]) == (str(tmp_path / "int8"), "dynamic") and "Wrote" in printed.err
    assert found["bytes"] < sum(file.stat().st_size for file in (tmp_path / "int8").iterdir())


def test_openvino(folder, tmp_path, capsys):
    data = ["--dataset", folder / "reviews.csv", "--columns", "text=opinion", "label=verdict"]
    options = ["--backend", "openvino", "--mode", "static", "--length-config", "0.9,0.5,0.3"]
    assert run("-m", folder / "model", *options, *data, "-o", tmp_path / "int8") == 0
    out = capsys.readouterr().out
    # The head reads the first token only: the last choice is spared.
    assert "int8 for OpenVINO: static" in out and "20 int8 products (static), 2 layers drop tokens" in out
    model = OVQuantizedModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert torch.isfinite(model(**inputs_for(build("bert", "BertForSequenceClassification"))).logits).all()


def test_lengths(folder, tmp_path):
    assert run("-m", folder / "model", "--length-config", "7,4,2", "-o", tmp_path / "int8") == 0
    model = ORTModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert model.config.length_config["counts"] == [7, 4, 2]
    assert torch.isfinite(model(**inputs_for(build("bert", "BertForSequenceClassification"))).logits).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length-config", "7,4"], "The lengths are for 2 layers"),
        (["--length-config", "7;4;2"], "is no length configuration"),
        (["--backend", "ortt"], "'ortt' is no quantization backend. Did you mean \"ort\"?"),
        (["--backend", "tensorrt"], "choose --backend ort --target tensorrt."),
        (["--backend", "openvino"], "choose --mode static, and give --dataset, or --backend ort"),
        (["--mode", "static"], "--mode static needs calibration examples: give --dataset, or choose dynamic."),
        (["--mode", "statik"], 'Did you mean "static"?'),
        (["--target", "avx"], "'avx' is no quantization target."),
        (["--mode", "static", "--dataset", "reviews.csv", "--split", "dev"], "has no split 'dev'"),
        (["--mode", "static", "--dataset", "reviews.csv", "--samples", "0"], "at least 1 example"),
        (["--columns", "text"], "write it as ROLE=NAME"),
        (["-m", "nothing-here/at-all"], "nothing-here/at-all"),
    ],
)
def test_one_sentence_for_what_is_wrong(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = run("-m", folder / "model", "-o", tmp_path / "int8", *arguments)
    error = capsys.readouterr().err.strip()
    assert code == 1 and message in error and error.startswith("error: ") and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_how_near_the_export_has_to_be(folder, tmp_path, capsys, monkeypatch):
    def differ(*args, **kwargs):
        raise ValueError("max diff = 1")

    monkeypatch.setattr(onnx, "validate_models_outputs", differ)
    assert run("-m", folder / "model", "-o", tmp_path / "int8", "--atol", "0.5") == 1
    assert "(max diff = 1): report this" in (error := capsys.readouterr().err)
    assert "accept more than atol=0.5 (--atol of `quantize`)" in error


def test_a_model_that_is_int8_already(folder, tmp_path, capsys):
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "model.pt").write_bytes(b"x")
    write_saved(tmp_path / "int8", "ipex", "ipex", {}, ["model.pt"])
    assert run("-m", tmp_path / "int8", "-o", tmp_path / "again") == 1
    assert "is int8 already, for the backend ipex: give the model that it was made from" in capsys.readouterr().err
