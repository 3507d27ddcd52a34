"""`optimum-cli flexcompress benchmark`."""

from __future__ import annotations

import argparse
import errno
import json
import os

import pytest
from optimum.commands.flexcompress.benchmark import BenchmarkCommand

from optimum_flexcompress.evaluation import Report
from tests.tasks.toys import word_tokenizer
from tests.tiny import build


QUICK = [
    "--batch-sizes",
    "1",
    "--lengths",
    "8",
    "--rounds",
    "3",
    "--stream-rows",
    "2",
    "--no-memory",
    "--max-seconds",
    "0.3",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models and `reviews.csv` with unusual column names."""
    root = tmp_path_factory.mktemp("benchmark")
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    for seed, name in enumerate(("teacher", "student")):
        build("bert", "BertForSequenceClassification", seed=seed, **names).save_pretrained(root / name)
        word_tokenizer().save_pretrained(root / name)
    (root / "reviews.csv").write_text("opinion,verdict\nthe film was good,x\nbad plot,y\nvery bad,z\n")
    return root


def run(*arguments) -> int:
    parser = argparse.ArgumentParser("optimum-cli")
    BenchmarkCommand(parser.add_subparsers())
    try:
        args = parser.parse_args(["benchmark", *map(str, arguments)])
        args.func(args).run()
    except SystemExit as end:
        return end.code
    return 0


def test_a_report_and_two_tables(folder, tmp_path, capsys):
    code = run(
        folder / "student", "--baseline", folder / "teacher", "--dataset", folder / "reviews.csv",
        "--columns", "text=opinion", "label=verdict", "-o", tmp_path / "report", *QUICK,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and "baseline: teacher" in out and str(tmp_path / "report" / "report.html") in out
    report = Report.load(tmp_path / "report")
    assert [model.name for model in report.models] == ["teacher", "student"] and report.rows == 3
    assert report.environment["threads"] == 1


def test_json_on_the_standard_output(folder, capsys):
    code = run(
        folder / "teacher", "--dataset", folder / "reviews.csv", "--task", "text-classification",
        "--columns", "text=opinion", "label=verdict", "--max-samples", "2", "--json", *QUICK,
    )  # fmt: skip
    assert code == 0 and json.loads(capsys.readouterr().out)["rows"] == 2


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full; make room, or run again with -o on another disk."),
        (errno.EIO, "Input/output error; run again with another -o."),
    ],
)
def test_what_cannot_be_written_is_shown_first(folder, tmp_path, capsys, monkeypatch, number, reason):
    def fail(path, text):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("optimum_flexcompress.evaluation.report.write_text_atomically", fail)
    code = run(
        folder / "teacher", "--dataset", folder / "reviews.csv", "--columns", "text=opinion", "label=verdict",
        "-o", tmp_path / "report", "--no-html", "--json", *QUICK,
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 1 and json.loads(captured.out)["models"][0]["latency"]["1x8"]["median"] > 0
    error = f"error: the report above could not be written to {tmp_path / 'report'}: {reason}"
    assert captured.err.splitlines()[-1] == error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_comes_before_the_work(folder, capsys):
    code = run(folder / "teacher", "--dataset", "nowhere.csv", "-o", folder)
    assert code == 1 and "is not empty: choose another folder, or add --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--columns", "opinion"], "ROLE=NAME"),
        ([], "needs a column 'text'"),
        (["--columns", "text=opinion", "label=verdict", "--split", "test"], "no split 'test'"),
        (["--task", "text-clasification"], "Did you mean"),
        (["--baseline", "nowhere"], "no baseline 'nowhere'"),
        (["--dataset", "nowhere.csv"], "no file or folder nowhere.csv"),
    ],
)
def test_mistakes_are_one_sentence(folder, capsys, arguments, words):
    code = run(folder / "teacher", "--dataset", folder / "reviews.csv", *arguments)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and words in errors[0]
