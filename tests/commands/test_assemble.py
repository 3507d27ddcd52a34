"""`optimum-cli flexcompress assemble`."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from huggingface_hub import ModelCard
from optimum.commands.flexcompress.assemble import AssembleCommand
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForSequenceClassification, T5ForConditionalGeneration

from optimum_flexcompress import ModularModel
from optimum_flexcompress.methods.modular import MODULES_NAME
from tests.methods.modular.helpers import deep, with_modules
from tests.tasks.toys import word_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two modular checkpoints and plans."""
    root = tmp_path_factory.mktemp("assemble")
    with_modules(deep("t5", "T5ForConditionalGeneration")).save_pretrained(root / "t5")
    word_tokenizer().save_pretrained(root / "t5")
    with_modules(deep("bert", "BertForSequenceClassification")).save_pretrained(root / "bert")
    deep("bert", "BertForSequenceClassification").save_pretrained(root / "plain")
    plan = {"decoder": [{"layer": 0}, {"layer": 1}, {"granularity": 2, "block": 1}, {"granularity": 2, "block": 2}]}
    (root / "plan.json").write_text(json.dumps(plan))
    (root / "gap.json").write_text(json.dumps({"decoder": plan["decoder"][:3]}))
    (root / "coarse.json").write_text('{"decoder": [{"granularity": 6, "block": 0}]}')
    return root


def run(*arguments) -> int:
    parser = argparse.ArgumentParser("optimum-cli")
    AssembleCommand(parser.add_subparsers())
    try:
        args = parser.parse_args(["assemble", *map(str, arguments)])
        args.func(args).run()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize(
    ("options", "counts", "ratio"),
    [
        (["--ratio", "3"], (2, 2), "3"),
        (["--strategy", "speed-first", "--ratio", "1.5"], (6, 2), "1.5"),
        (["--strategy", "plan.json"], (6, 4), "1.2"),
        (["--ratio", "2.5"], (3, 2), "2.4, the nearest to the 2.5 asked for"),
    ],
)
def test_a_stock_folder_with_a_card(folder, tmp_path, monkeypatch, capsys, options, counts, ratio):
    monkeypatch.chdir(folder)
    assert run("-m", folder / "t5", "-o", tmp_path / "small", *options) == 0
    out = capsys.readouterr().out
    assert f"12 layers became {sum(counts)}: a ratio of {ratio}" in out
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert (model.config.num_layers, model.config.num_decoder_layers) == counts
    AutoTokenizer.from_pretrained(tmp_path / "small")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert "Assembled from the modular checkpoint `t5`" in card.text and "without any plugin" in card.text
    assert card.text.startswith("\n# small") and 'from_pretrained("small")' in card.text
    assert str(folder) not in card.text
    # The plan beside it makes it once more.
    assert run("-m", folder / "t5", "-o", tmp_path / "again", "--strategy", tmp_path / "small" / "assembly.json") == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("small", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_json_on_the_standard_output(folder, tmp_path, capsys):
    assert run("-m", folder / "t5", "-o", tmp_path / "small", "--ratio", "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["full_layers"], found["layers"], found["ratio"]) == (12, 4, 3.0)
    assert found["assembly"] == json.loads((tmp_path / "small" / "assembly.json").read_text())


def test_encoders_too(folder, tmp_path):
    assert run("-m", folder / "bert", "-o", tmp_path / "small", "--ratio", "2") == 0
    assert BertForSequenceClassification.from_pretrained(tmp_path / "small").config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "size-first"], "give --ratio, such as --ratio 2."),
        (["--strategy", "plan.json", "--ratio", "2"], "leave --ratio out"),
        (["--strategy", "nowhere.json"], "Cannot read the plan nowhere.json"),
        (["--strategy", "speed", "--ratio", "2"], 'Did you mean "speed-first"?'),
        (["--ratio", "6"], "the nearest is 3."),
        (["--strategy", "gap.json"], "gap after module 2.1 (layers 2 to 3): nothing stands for layers 4 to 5"),
        (["--strategy", "coarse.json"], "this checkpoint was trained for 2, 3 there"),
        (["-m", "bert", "--strategy", "speed-first", "--ratio", "2"], "this model has the encoder alone"),
        (
            ["-m", "plain", "--ratio", "2"],
            "plain is no modular checkpoint: train one with ModularConfig, or with comp",
        ),
        (["-m", "nowhere", "--ratio", "2"], "There is no folder nowhere"),
    ],
)
def test_one_sentence_for_what_is_wrong(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    code = run("-m", "t5", "-o", tmp_path / "small", *arguments)
    error = capsys.readouterr().err.strip()
    assert code == 1 and message in error and error.startswith("error: ") and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_what_the_output_is_made_of_is_not_replaced(folder, tmp_path, capsys):
    before = (folder / "t5" / "model.safetensors").read_bytes()
    for output in (folder / "t5", folder):
        assert run("-m", folder / "t5", "-o", output, "--ratio", "2", "--overwrite") == 1
        assert "holds what the output is made of, which would be lost" in capsys.readouterr().err
    assert (folder / "t5" / "model.safetensors").read_bytes() == before
    assert (folder / "t5" / MODULES_NAME).is_file()


def test_the_precision_stays(folder, tmp_path):
    modular = ModularModel.from_pretrained(folder / "t5", dtype=torch.bfloat16)
    modular.save_pretrained(tmp_path / "modular")
    assert run("-m", tmp_path / "modular", "-o", tmp_path / "small", "--ratio", "2") == 0
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert {value.dtype for value in small.values()} == {torch.bfloat16}


def test_an_output_in_the_way(folder, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "file").touch()
    assert run("-m", folder / "t5", "-o", tmp_path / "small", "--ratio", "2") == 1
    assert "is not empty" in capsys.readouterr().err
    assert run("-m", folder / "t5", "-o", tmp_path / "small", "--ratio", "2", "--overwrite") == 0
    assert not (tmp_path / "small" / "file").exists()
    assert ModularModel.from_pretrained(folder / "t5").depths == {"encoder": 6, "decoder": 6}


def test_what_the_modules_were_not_trained_for_is_said(tmp_path, caplog):
    modular = with_modules(deep("t5", "T5ForConditionalGeneration"), ratios=[2, 3])
    modular.save_pretrained(tmp_path / "t5")
    plan = {name: [{"granularity": 3, "block": block} for block in range(2)] for name in ("encoder", "decoder")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))

    def warnings(*options) -> list[str]:
        caplog.clear()
        assert run("-m", tmp_path / "t5", "-o", tmp_path / "small", "--overwrite", *options) == 0
        return [record.getMessage() for record in caplog.records if "trained above all" in record.getMessage()]

    card = tmp_path / "small" / "README.md"
    for options in (["--ratio", "2"], ["--strategy", tmp_path / "plan.json"], ["--ratio", "1"]):
        assert warnings(*options) == [] and "trained above all" not in card.read_text()
    for options in (["--ratio", "1.5"], ["--ratio", "2", "--strategy", "speed-first"]):
        (warning,) = warnings(*options)
        assert "size-first assemblies of the ratios 2, 3; this one, of the ratio" in warning
        assert warning in card.read_text()
