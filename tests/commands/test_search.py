"""`optimum-cli flexcompress search`."""

from __future__ import annotations

import argparse
import json

import pytest
from optimum.commands.flexcompress.search import SearchCommand
from transformers import AutoModelForSequenceClassification

from optimum_flexcompress import FlexCompressConfig, LengthAdaptiveConfig, lengths_of
from tests.tasks.toys import word_tokenizer
from tests.tiny import build


FEW = ("--population", "3", "--trials", "4", "--max-length", "16", "--no-picture")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model trained for dropping, a decoder, and `reviews.csv` with unusual column names."""
    root = tmp_path_factory.mktemp("search")
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    for name, family, class_name in (
        ("model", "bert", "BertForSequenceClassification"),
        ("decoder", "gpt2", "GPT2ForSequenceClassification"),
    ):
        build(family, class_name, **names).save_pretrained(root / name)
        word_tokenizer().save_pretrained(root / name)
    FlexCompressConfig(methods=[LengthAdaptiveConfig()]).save_pretrained(root / "model")
    rows = ["the film was good in paris,x", "bad plot and very bad film,y", "anna lives in the city,z"] * 3
    (root / "reviews.csv").write_text("\n".join(["opinion,verdict", *rows]) + "\n")
    return root


def run(*arguments) -> int:
    parser = argparse.ArgumentParser("optimum-cli")
    SearchCommand(parser.add_subparsers())
    try:
        args = parser.parse_args(["search", *map(str, arguments)])
        args.func(args).run()
    except SystemExit as end:
        return end.code
    return 0


def command(folder, output, *more):
    data = ("--dataset", folder / "reviews.csv", "--columns", "text=opinion", "label=verdict")
    return ("-m", folder / "model", "-o", output, *data, *FEW, *more)


def test_a_table_and_a_model(folder, tmp_path, capsys):
    picked = tmp_path / "picked"
    code = run(*command(folder, tmp_path / "front", "--max-cost", "95%", "--save-pick", picked))
    out = capsys.readouterr().out
    assert code == 0 and "on all 9 examples of train: accuracy against macs, pytorch" in out
    assert "* [" in out and "picked: [" in out and "of full" in out and str(tmp_path / "front" / "front.json") in out
    data = json.loads((tmp_path / "front" / "front.json").read_text())
    loaded = AutoModelForSequenceClassification.from_pretrained(picked)
    assert list(lengths_of(loaded).values) == data["pick"]["lengths"]["counts"]


def test_json(folder, tmp_path, capsys):
    assert run(*command(folder, tmp_path / "front", "--json")) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "front" / "front.json").read_text())
    assert "Searching lengths of model" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-cost", "1%"], "No configuration of the front is as cheap as asked"),
        (["--max-drop", "-1"], "max_drop is '-1'"),
        (["--objective", "mac"], 'Did you mean "macs"'),
        (["--storage", "sqlite:////no/where/at.db"], "cannot be opened (unable to open database file)"),
        (["--columns", "text"], "write it as ROLE=NAME"),
        (["--max-latency", "4"], "search with objective latency (--objective latency), or give max_cost (--max-cost)"),
        (["--max-drop", "1%", "--save-pick", "model"], "choose another folder for --save-pick, or remove it."),
        (["--max-drop", "1%", "--save-pick", "reviews.csv"], "is a file: give --save-pick the name of a new folder."),
        (["--batch-size", "0"], "batch_size (--batch-size) is 0: give a whole number of at least 1."),
        (["-m", "decoder"], "is a decoder, which cannot drop tokens"),
    ],
)
def test_one_sentence_for_what_is_wrong(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    code = run(*command(folder, tmp_path / "front", *arguments))
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert code == 1 and message in error
    assert (tmp_path / "front" / "front.json").exists() == ("--max-cost" in arguments)
