"""The commands with `--push-to-hub` and with models by id, and what they say when that goes wrong."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.model_card import write_model_card
from tests.hub.server import File, Repo
from tests.methods.modular.helpers import deep, with_modules
from tests.tasks.toys import word_tokenizer
from tests.tiny import build, inputs_for


BASE_CARD = b"---\nlicense: cc-by-4.0\nlanguage: en\n---\n\n# Base\n"


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    """A model made from one on the Hub, a modular checkpoint, and examples."""
    root = tmp_path_factory.mktemp("models")
    hub.repos["bob/base"] = Repo(private=False)
    hub.repos["bob/base"].commit("main", {"README.md": File(BASE_CARD)}, "base")
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    build("bert", "BertForSequenceClassification", **names).save_pretrained(root / "model")
    word_tokenizer().save_pretrained(root / "model")
    with_modules(deep("bert", "BertForSequenceClassification")).save_pretrained(root / "modular")
    word_tokenizer().save_pretrained(root / "modular")
    (root / "reviews.csv").write_text("text,label\nthe film was good,x\nbad plot,y\nvery bad,z\n")
    return root


@pytest.fixture(scope="module")
def on_the_hub(client, folder):
    """The modular checkpoint, the model and its int8 form, on the Hub."""
    client(upload, str(folder / "modular"), "ada/modular")
    client(upload, str(folder / "model"), "ada/model")
    code, out, _ = client.cli("quantize", "-m", "ada/model", "-o", folder / "int8", "--push-to-hub")
    assert code == 0
    return out


def upload(folder: str, repo: str, base: str = "bob/base"):
    """With a card that names the base on the Hub, and by way of the function that all commands use."""
    from optimum_flexcompress.hub import HubTarget

    write_model_card(folder, base_model=base, methods=["distillation"])
    HubTarget.check(repo).push(folder, "Upload")


def load_onnx(repo: str, **options):
    """The int8 model by its id."""
    from optimum.onnxruntime import ORTModelForSequenceClassification

    model = ORTModelForSequenceClassification.from_pretrained(repo, **options)
    return model(**inputs_for(build("bert", "BertForSequenceClassification"))).logits


def test_quantize_takes_an_id_and_pushes_what_loads_by_its_own(hub, client, folder, on_the_hub):
    assert f"Pushed to ada/int8: {hub.url}/ada/int8/commit/" in on_the_hub
    assert hub.repos["ada/int8"].messages == ["initial commit", "Upload int8 model"]
    local = client(load_onnx, str(folder / "int8"))
    commit = hub.repos["ada/int8"].refs["main"]
    torch.testing.assert_close(client(load_onnx, "ada/int8", revision=commit), local, rtol=0, atol=0)
    card = ModelCard(hub.files("ada/int8")["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and card.data.language == "en"
    assert card.data.base_model == "ada/model" and card.data.base_model_relation == "quantized"
    assert card.data.tags == ["optimum-flexcompress", "distillation", "int8", "onnx"]
    assert 'ORTModelForSequenceClassification.from_pretrained("ada/int8")' in card.text


def load_openvino(repo: str, **options):
    """An int8 model for OpenVINO by its id."""
    from optimum_flexcompress import OVQuantizedModelForSequenceClassification

    model = OVQuantizedModelForSequenceClassification.from_pretrained(repo, **options)
    return model(**inputs_for(build("bert", "BertForSequenceClassification"))).logits


def test_saved_models_of_other_runtimes_load_by_id_and_revision(hub, client, folder, on_the_hub, tmp_path):
    data = ["--mode", "static", "--dataset", folder / "reviews.csv", "--samples", "2"]
    options = ["--backend", "openvino", *data, "-o", tmp_path / "ov", "--push-to-hub"]
    code, out, err = client.cli("quantize", "-m", "ada/model", *options)
    assert code == 0, err
    commit = hub.repos["ada/ov"].refs["main"]
    local = client(load_openvino, str(tmp_path / "ov"))
    torch.testing.assert_close(client(load_openvino, "ada/ov", revision=commit), local, rtol=0, atol=0)
    card = ModelCard(hub.files("ada/ov")["README.md"].decode())
    assert card.data.tags[-2:] == ["int8", "openvino"]
    assert 'OVQuantizedModelForSequenceClassification.from_pretrained("ada/ov")' in card.text


def test_static_int8_takes_its_examples_through_the_tokenizer_of_an_id(client, folder, on_the_hub, tmp_path):
    data = ["--mode", "static", "--dataset", folder / "reviews.csv", "--samples", "2"]
    code, out, err = client.cli("quantize", "-m", "ada/model", *data, "-o", tmp_path / "static")
    assert (code, err.count("error")) == (0, 0) and "(static)" in out


def test_assemble_takes_an_id_and_pushes(hub, client, on_the_hub, tmp_path):
    options = ["--push-to-hub", "--hub-model-id", "analysts/half", "--hub-private-repo"]
    code, out, _ = client.cli("assemble", "-m", "ada/modular", "--ratio", "2", "-o", tmp_path / "small", *options)
    assert code == 0 and "Pushed to analysts/half" in out
    assert hub.repos["analysts/half"].private
    assert json.loads(hub.files("analysts/half")["config.json"])["num_hidden_layers"] == 3
    card = ModelCard(hub.files("analysts/half")["README.md"].decode())
    assert card.data.base_model == "ada/modular" and card.data.license == "cc-by-4.0"
    assert "checkpoint `ada/modular`" in card.text and card.text.startswith("\n# analysts/half")


def test_benchmark_compares_ids(client, folder, on_the_hub, tmp_path):
    quick = ["--rounds", "3", "--max-seconds", "0.1", "--lengths", "8", "--batch-sizes", "2", "--stream-rows", "0"]
    data = ["--dataset", folder / "reviews.csv", "--no-memory", "--no-html", "--threads", "1"]
    code, out, _ = client.cli("benchmark", "ada/int8", "--baseline", "ada/model", *data, *quick, "-o", tmp_path / "r")
    assert code == 0 and "ada/int8" in out and "baseline: ada/model" in out


@pytest.mark.parametrize(
    ("command", "more", "token", "message"),
    [
        ("quantize", ["-m", "ada/nothing"], "hf_ada", "no model of that name on the Hub: check the path or the id"),
        ("assemble", ["-m", "ada/nothing", "--ratio", "2"], "hf_ada", "no model of that name on the Hub"),
        ("quantize", ["--push-to-hub"], None, "nobody is logged in to the Hub; log in with `hf auth login`"),
        ("quantize", ["--push-to-hub"], "hf_wrong", "the Hub does not accept the token; log in"),
        ("quantize", ["--push-to-hub"], "hf_reader", "The Hub token of ada may only read: log in"),
        ("quantize", ["--push-to-hub", "--hub-model-id", "bob/base"], "hf_ada", "bob/base belongs to others, and ada"),
        ("quantize", ["--push-to-hub", "--hub-model-id", "a/b/c"], "hf_ada", "cannot name a model on the Hub"),
        ("quantize", ["--hub-model-id", "x"], "hf_ada", "add --push-to-hub, or leave it out"),
        ("quantize", ["--push-to-hub", "--hub-token", "hf_wrong"], "hf_ada", "the Hub does not accept the token"),
        ("search", ["--dataset", "reviews.csv", "--push-to-hub"], "hf_ada", "add --save-pick DIR"),
    ],
)
def test_what_can_be_known_is_said_before_any_work(hub, client, folder, tmp_path, command, more, token, message):
    repos = dict(hub.repos)
    model = [] if "-m" in more else ["-m", folder / "model"]
    code, out, err = client.cli(command, *model, "-o", tmp_path / "out", *more, token=token)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and message in lines[0] and err.rstrip().endswith(lines[0])
    assert "Making" not in out and list(tmp_path.iterdir()) == [] and hub.repos == repos


@pytest.mark.parametrize("place", [("PUT", "/lfs/"), ("POST", "/api/models/ada/broken/commit")])
def test_a_network_that_fails_in_the_middle(hub, client, folder, tmp_path, place):
    hub.repos.pop("ada/broken", None)
    # What is stored already would not be sent.
    stored = dict(hub.stored)
    hub.stored.clear()
    hub.break_at = place
    out = tmp_path / "broken"
    try:
        code, printed, err = client.cli("quantize", "-m", folder / "model", "-o", out, "--push-to-hub", impatient=True)
    finally:
        hub.break_at = None
        hub.stored.update(
            {oid: stored[oid] for oid in stored.keys() - hub.stored.keys()} if place[0] == "POST" else {}
        )
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert code == 1 and "ada/broken was not pushed: the connection to the Hub failed" in line
    assert "nothing of it was published" in line and f"push it with `hf upload ada/broken {out} .`" in line
    assert f"Wrote {out}" in printed and (out / "model.onnx").is_file()
    assert set(hub.files("ada/broken")) == {".gitattributes"}
    # The command that the message names.
    client(hf, ["upload", "ada/broken", str(out), "."])
    assert hub.files("ada/broken")["model.onnx"] == (out / "model.onnx").read_bytes()
    assert len(hub.repos["ada/broken"].messages) == 2


def test_a_licence_that_the_hub_does_not_know(hub, client, folder, tmp_path):
    hub.repos["bob/odd"] = Repo(private=False)
    hub.repos["bob/odd"].commit("main", {"README.md": File(b"---\nlicense: home-made\n---\n")}, "base")
    with pytest.raises(
        FlexCompressError, match='refuses the model card .*"license" cannot be home-made.* mend the top'
    ):
        client(upload, str(folder / "model"), "ada/odd", base="bob/odd")
    assert set(hub.files("ada/odd")) == {".gitattributes"}


def hf(arguments: list[str]):
    """The command line of the Hub's client."""
    import sys
    from unittest.mock import patch

    from huggingface_hub.cli.hf import main

    with patch.object(sys, "argv", ["hf", *arguments]):
        main()


def test_a_repository_that_vanished_in_between(hub, client, folder, tmp_path):
    hub.repos["analysts/closed"] = Repo(private=False)
    client(push_after_leaving, str(folder / "model"))
    assert hub.repos["analysts/closed"].messages == []


def push_after_leaving(folder: str):
    """Somebody whose token lost its rights after the check."""
    from optimum_flexcompress.errors import FlexCompressError
    from optimum_flexcompress.hub import HubTarget

    with pytest.raises(FlexCompressError, match="analysts/closed was not pushed: it belongs to others") as caught:
        HubTarget("analysts/closed", token="hf_bob").push(folder, "Upload")
    assert f"push it with `hf upload analysts/closed {folder} .`" in str(caught.value)
