"""`compress` with a budget: plans, dry runs, choices, and budgets that cannot be met."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
import transformers
from optimum.commands.optimum_cli import main
from optimum.onnxruntime import ORTModelForSequenceClassification

from optimum_flexcompress.recipes import load_recipe
from optimum_flexcompress.recipes.stages.deployment import Quantize
from tests.recipes.conftest import data_folder, model_folder  # noqa: F401  fixtures
from tests.recipes.test_full import TIMING


PLANNED = ("finetune", "distill", "depth", "prune", "int8-dense", "int8-distill", "int8-prune", "benchmark", "best")
QUICK = [
    "data.max_length=24",
    *(f"stages.{stage}.{setting}" for stage in ("finetune", "distill") for setting in ("epochs=1", "batch_size=8")),
    *(f"stages.prune.{setting}" for setting in ("max_steps=30", "mask_learning_rate=0.5", "align=1", "probe_samples=0")),
    *(f"stages.{stage}.options={{fuse: false}}" for stage in ("int8-dense", "int8-distill", "int8-prune")),
    *(f"stages.benchmark.{setting}" for setting in TIMING),
]  # fmt: skip


@pytest.fixture
def compress(monkeypatch, capsys, model_folder, data_folder):  # noqa: F811
    """Runs the command in this process, on a slice of Banking77; `settings` are those of `--set`."""

    def compress(*arguments, settings=QUICK, task="text-classification"):
        words = ["-m", model_folder, "--dataset", data_folder, "--task", task, *arguments]
        words += [word for setting in settings for word in ("--set", setting)]
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "flexcompress", "compress", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            transformers.utils.logging.set_verbosity_warning()
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, errors=errors)

    return compress


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Where the tests below run one after the other, each from what the one before has left."""
    return tmp_path_factory.mktemp("budget") / "out"


def test_a_dry_run_prints_the_plan_and_leaves_nothing(compress, tmp_path, monkeypatch, data_folder):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    before = sorted(data_folder.iterdir())
    done = compress("--max-drop", "1%", "--dry-run", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "+ layers    MiniLM and logits, into half of 4 layers [quickstart.json, " in done.out
    assert "VIB pruning of 75 % of the layers, with what went before, in 1,000 steps [vib_text.json, " in done.out
    assert "- tokens " in done.out and "This was a dry run: nothing was trained, and nothing was written." in done.out
    table = done.out[done.out.index("\nstage  ") + 1 :].splitlines()
    assert [line.split()[0] for line in table[2 : 2 + len(PLANNED)]] == list(PLANNED)
    assert "about" in table[2 + len(PLANNED)]
    assert table[0].endswith(" time (m:ss)")
    assert "The same by hand:\noptimum-cli flexcompress compress -m " in done.out
    assert not list(tmp_path.iterdir()) and sorted(data_folder.iterdir()) == before


def test_a_dry_run_as_json(compress, tmp_path, model_folder, data_folder):  # noqa: F811
    columns = ["--columns", "text=text", "label=category"]
    done = compress(
        "--max-drop", "1%", "--target-latency", "0.001ms", *columns, "--dry-run", "--json", "-o", tmp_path / "o"
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    # The command that it prints plans nothing, and does the same: for the budget, with the user's own settings.
    words = shlex.split(found["command"])
    assert words[:3] == ["optimum-cli", "flexcompress", "compress"]
    options = dict(zip(words[3::2], words[4::2]))
    assert (options["--recipe"], options["-o"]) == ("full", str(tmp_path / "o"))
    assert {options["-m"], options["--dataset"]} == {str(model_folder), str(data_folder)}
    overrides = [word for flag, word in zip(words[3::2], words[4::2]) if flag == "--set"]
    same = load_recipe("full", overrides).to_dict()
    assert (same["stages"], same["data"]) == (found["recipe"]["stages"], found["recipe"]["data"])
    assert same["stages"]["best"]["target_latency"] == 0.001 and same["data"]["columns"]["label"] == "category"
    assert list(found["seconds"]) == list(PLANNED) and found["recipe"]["plan"]["decisions"][0]["rule"] == "int8"
    assert found["facts"]["layers"] == 4 and "This was a dry run" in done.err


def test_a_dry_run_of_a_recipe(compress, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = compress("--recipe", "distil-int8", "--dry-run", settings=["data.max_length=24"])
    assert done.code == 0, done.err
    assert "distilling finetune into a smaller model" in done.out and "Plan" not in done.out
    assert not list(tmp_path.iterdir())


def test_interrupted_it_goes_on_by_the_same_plan(compress, output, monkeypatch, model_folder, data_folder):  # noqa: F811
    def interrupted(self, context):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Quantize, "run", interrupted)
        done = compress("--max-drop", "99%", "-o", output)
    assert done.code == 130 and "run the same command again to go on from there" in done.err
    assert json.loads((output / "run.json").read_text())["recipe"]["name"] == "plan"
    # The same model and data, spelt differently.
    monkeypatch.chdir(model_folder)
    folders = ["-m", f"../{model_folder.name}/", "--dataset", os.path.relpath(data_folder)]
    done = compress(*folders, "--max-drop", "99%", "-o", output)
    assert done.code == 0, done.err
    assert "Going on by the plan of the earlier run" in done.out and "measuring int8" not in done.out
    assert done.out.count("finished in an earlier run, skipped") == 4
    # What is left goes by what the plan has measured, without the stages that were finished.
    assert not re.search(r"finetune: .* left\)", done.out) and re.search(
        r"benchmark: .* about \d+:\d\d left\)", done.out
    )
    assert "Chosen: int8-" in done.out


def test_what_was_chosen_loads(output):
    choice = json.loads((output / "best" / "choice.json").read_text())
    assert choice["met"] and choice["lost"] <= 0.99
    assert "\nPlanned for a budget: loses at most 99 %.\n" in (output / "best" / "README.md").read_text()
    model = ORTModelForSequenceClassification.from_pretrained(output / "best")
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "best")
    assert model(**tokenizer(["where is my card"], return_tensors="pt")).logits.shape == (1, 4)


def test_a_budget_that_cannot_be_met(compress, output):
    done = compress("--target-latency", "0.0001ms", "-o", output)
    assert done.code == 1
    (line,) = done.errors
    assert line.startswith("error: No model takes at most 0.0001 ms for 2x24: the model fastest is int8-")
    assert line.endswith(f"All models are kept in {output}, this one is {output / 'best'}.")
    assert done.out.count("finished in an earlier run, skipped") == len(PLANNED) - 1
    for name in ("finetune", "prune", "int8-dense", "best"):
        assert (output / name / "config.json").is_file()


def test_without_a_budget_the_front_is_shown_and_a_name_chooses(compress, output):
    done = compress("-o", output)
    assert done.code == 0, done.err
    assert "What there is to choose from: accuracy against the time of one batch (2x24)" in done.out
    assert "Choose one: the same command with --max-drop 1%" in done.out
    assert not (output / "best" / "config.json").exists()
    done = compress("-o", output, "--choose", "int8-dense")
    assert done.code == 0 and "Chosen: int8-dense, which takes " in done.out
    assert (output / "best" / "config.json").is_file()
    done = compress("-o", output, "--choose", "int8-dense", "--json")
    found = json.loads(done.out)
    assert list(found["stages"]) == found["skipped"] == list(PLANNED)
    assert found["stages"]["best"]["metrics"]["chosen"] == "int8-dense" and "Chosen: int8-dense" in done.err
    assert found["stages"]["best"]["folder"] == str(output / "best")
    chosen = found["stages"]["best"]["metrics"]
    assert chosen["metric"] == "accuracy" and {model["shape"] for model in chosen["models"]} == {"2x24"}
    (model,) = (model for model in chosen["models"] if model["name"] == "int8-dense")
    assert f"which takes {model['milliseconds']:.3g} ms for 2x24 and " in chosen["sentence"]
    assert model["milliseconds"] == chosen["milliseconds"] and model["bytes"] > 0 and 0 <= model["accuracy"] <= 1
    done = compress("-o", output, "--choose", "int8-dens")
    assert done.code == 1
    assert done.errors[0].startswith(
        "error: --choose int8-dens is not among the models that are measured. Did you mean"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--recipe", "full", "--max-drop", "1%"],
            "--max-drop and --recipe contradict each other: leave --recipe out",
        ),
        (["--recipe", "full", "--device-profile", "this-machine"], "--device-profile and --recipe contradict"),
        (["--choose", "int8", "--target-latency", "5ms"], "--choose and --target-latency contradict each other"),
        (
            ["--dry-run", "--push-to-hub"],
            "--dry-run and --push-to-hub contradict each other: a dry run writes nothing",
        ),
        (["--dry-run", "--overwrite"], "--dry-run and --overwrite contradict"),
        (
            ["--dry-run", "--hub-stage", "distill"],
            "--hub-stage is for pushing to the Hub: add --push-to-hub, or leave",
        ),
        (
            ["--dry-run", "--hub-model-id", "x"],
            "--hub-model-id is for pushing to the Hub: add --push-to-hub, or leave",
        ),
        (["-m", "./nofolder"], "There is no folder ./nofolder: check the path of the model."),
        (["--push-to-hub"], "--push-to-hub pushes the chosen model, and nothing says which: add --max-drop"),
        (
            ["--device-profile", "xeon"],
            "--device-profile xeon is not known: latency is measured where the command runs",
        ),
        (["--max-drop", "1"], "--max-drop 1 allows to lose everything"),
        (["--target-latency", "soon"], "--target-latency is 'soon': give a time above 0"),
    ],
)
def test_flags_that_contradict_each_other(compress, tmp_path, arguments, message):
    done = compress("-o", tmp_path / "out", *arguments, settings=())
    assert done.code == 1
    (line,) = done.errors
    assert message in line and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_that_nothing_can_be_trained_on(compress, tmp_path, data_folder):  # noqa: F811
    (tmp_path / "test.csv").write_bytes((data_folder / "test.csv").read_bytes())
    done = compress("-o", tmp_path / "out", "--max-drop", "1%", "--dataset", tmp_path / "test.csv")
    assert done.code == 1 and "has no training split" in done.errors[0]
    assert not (tmp_path / "out").exists()
