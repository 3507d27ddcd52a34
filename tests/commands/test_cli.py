"""`optimum-cli` as a user meets it: what is listed, and that help is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest
from optimum.commands.flexcompress.base import _TASKS
from optimum.commands.optimum_cli import main

from optimum_flexcompress.recipes import list_recipes
from optimum_flexcompress.tasks import TASKS


COMMANDS = ("compress", "assemble", "search", "quantize", "benchmark")
# Runs optimum-cli and says on stderr which of the heavy packages came in.
PROBE = """
import sys
from optimum.commands.optimum_cli import main
sys.argv = ["optimum-cli", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "transformers", "onnxruntime", "onnx", "datasets", "optimum_flexcompress"}
    print("imported:", *sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def optimum_cli(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_the_group_is_listed():
    done = optimum_cli("--help")
    assert done.returncode == 0
    assert "flexcompress" in done.stdout
    assert done.stderr == "imported:\n"


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_commands_are_listed(arguments):
    done = optimum_cli("flexcompress", *arguments)
    assert done.returncode == 0
    assert done.stderr == "imported:\n"
    for command in COMMANDS:
        assert command in done.stdout
    assert "examples:" in done.stdout and "optimum-cli flexcompress benchmark small/quantize" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    done = optimum_cli("flexcompress", command, "--help")
    assert done.returncode == 0
    assert "--debug" in done.stdout and "examples:" in done.stdout
    assert done.stderr == "imported:\n"


def test_help_names_the_tasks():
    assert list(_TASKS) == list(TASKS)
    for command in ("benchmark", "compress", "quantize", "search"):
        text = " ".join(optimum_cli("flexcompress", command, "--help").stdout.split())
        assert all(task in text.replace("- ", "-") for task in TASKS)


def test_lists_the_recipes():
    done = optimum_cli("flexcompress", "compress", "--list-recipes")
    assert done.returncode == 0
    for name, description in list_recipes().items():
        assert name in done.stdout and description in done.stdout


@pytest.mark.parametrize("missing", ["--model", "--dataset", "--task", "--output"])
def test_compress_says_which_argument_is_missing(missing):
    given = {"--model": "m", "--dataset": "d", "--task": "text-classification", "--output": "o"}
    arguments = [word for option, value in given.items() if option != missing for word in (option, value)]
    done = optimum_cli("flexcompress", "compress", *arguments)
    assert done.returncode == 2
    assert f"{missing} is needed" in done.stderr
    # Said at once, not after seconds of imports.
    assert done.stderr.endswith("imported:\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--recipe": "distill-int8"}, 'Did you mean "distil-int8"?'),
        ({"--task": "text-clasification"}, "text-clasification"),
        ({"--set": "stages.distill.epoch=2"}, 'Did you mean "epochs"?'),
        ({"--columns": "question"}, "--columns question: write it as ROLE=NAME"),
        ({"--model": "./none"}, "There is no folder"),
        ({"--dataset": "./none.csv"}, "There is no file or folder"),
    ],
)
def test_compress_errors_are_one_sentence(tmp_path, monkeypatch, capsys, change, message):
    (tmp_path / "train.csv").write_text("text,label\n" + "a,b\nc,d\n" * 6)
    options = {
        "--model": "./model",
        "--dataset": "./train.csv",
        "--task": "text-classification",
        "--output": "out",
        **change,
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["optimum-cli", "flexcompress", "compress", *(word for item in options.items() for word in item)]
    )
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().err
    assert end.value.code == 1
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.csv"]
