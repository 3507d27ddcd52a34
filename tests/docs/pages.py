"""The code blocks of the documentation, and what runs them.

All blocks of a page run in its order, in one folder and one namespace, as a reader would type them. A comment right
above a block says what else is to be done with it:

    <!-- file: NAME -->       it is the content of a file of that name
    <!-- not run: REASON -->  it is left alone; `test_pages.py` lists all of these

Blocks marked `text` show output. Commands of `optimum-cli` run in this process; those that train, search or measure get
settings for small models in front of their own, which win.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch


ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "source"
# Generated from docstrings, which `tests/docs/test_reference.py` looks at.
REFERENCE = GUIDES / "package_reference"
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\s*$")
_MARK = re.compile(r"^ *<!-- (?P<kind>file|not run): (?P<text>.+) -->\s*$")
# Commands that are left alone wherever they stand.
_NOT_RUN = {"make": "CI runs the targets", "pip": "changes the environment"}
_TIMING = {"rounds": "3", "max_seconds": "0.05", "stream_rows": "4", "batch_sizes": "[1, 2]", "threads": "1"}
# By type of stage; a recipe gets those of the stages that it has.
_STAGES = {
    "finetune": {"epochs": "1", "batch_size": "16", "checkpoints": "1"},
    "distill": {"epochs": "1", "batch_size": "16", "checkpoints": "1"},
    "length-adaptive": {"epochs": "1", "batch_size": "16", "checkpoints": "1"},
    "modular": {"epochs": "1", "batch_size": "16", "checkpoints": "1"},
    # Masks of so small a model move in a few steps, and its sizes have to be fine.
    "prune": {"mask_learning_rate": "0.5", "align": "1", "batch_size": "8", "max_steps": "40", "probe_samples": "8"},
    "search": {"population": "4", "trials": "6"},
    # Fusion has tests of its own, and takes its time.
    "export": {"fuse": "false"},
    "quantize": {"options": "{fuse: false}"},
    "benchmark": {**_TIMING, "memory": "false"},
}
_OPTIONS = {
    "search": ["--population", "4", "--trials", "6", "--samples", "24"],
    "benchmark": [
        "--batch-sizes",
        "1",
        "2",
        "--lengths",
        "8",
        "--rounds",
        "3",
        "--max-seconds",
        "0.05",
        "--stream-rows",
        "4",
        "--no-memory",
    ],
}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file.
        line: Of its first line of code, from 1.
        language: What stands after the fence.
        code: Its text.
        file: The file whose content it is, or "".
        skipped: Why it is not run, or "".
    """

    page: Path
    line: int
    language: str
    code: str
    file: str = ""
    skipped: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """The README and the pages that are written by hand."""
    return [ROOT / "README.md", *sorted(page for page in GUIDES.rglob("*.mdx") if REFERENCE not in page.parents)]


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    index = 0
    while index < len(lines):
        start = _FENCE.match(lines[index])
        index += 1
        if start is None:
            continue
        first, indent = index, start["indent"]
        while lines[index].rstrip() != f"{indent}```":
            index += 1
        mark = _MARK.match(lines[first - 2]) if first > 1 else None
        marks = {mark["kind"]: mark["text"]} if mark else {}
        code = "\n".join(line.removeprefix(indent) for line in lines[first:index])
        yield Block(page, first + 1, start["language"], code, marks.get("file", ""), marks.get("not run", ""))
        index += 1


@dataclass
class Session:
    """What the blocks of a page share.

    Attributes:
        folder: Where they run.
        namespace: Of the Python blocks.
        done: The blocks that ran.
    """

    folder: Path
    namespace: dict = field(default_factory=dict)
    done: list[Block] = field(default_factory=list)

    def run(self, block: Block) -> None:
        """Runs a block, or writes its file.

        Raises:
            AssertionError: A command failed, or the block is in a language that nothing here runs.
        """
        if block.skipped or block.language == "text":
            return
        if block.file:
            (self.folder / block.file).write_text(block.code + "\n", encoding="utf-8")
        elif block.language == "python":
            # Blank lines first, so that a traceback names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), self.namespace)
        elif block.language == "bash":
            for command in commands(block.code):
                run_command(command, block.where)
        else:
            raise AssertionError(f"{block.where}: nothing runs blocks in {block.language or 'no language'}")
        self.done.append(block)


def left_out(block: Block) -> str:
    """Why a block is not run, or a part of it; "" where all of it is."""
    if block.skipped or block.language != "bash":
        return block.skipped
    return ", ".join(dict.fromkeys(_NOT_RUN[words[0]] for words in commands(block.code) if words[0] in _NOT_RUN))


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block, split into words."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def run_command(words: list[str], where: str) -> None:
    """Runs one command of `optimum-cli` (or `hf upload`, of the Hub's client), in this process."""
    if words[:2] == ["optimum-cli", "flexcompress"]:
        from optimum.commands.optimum_cli import main

        words = with_small_settings(words)
    elif words[:2] == ["hf", "upload"]:
        from huggingface_hub.cli.hf import main
    elif words[0] in _NOT_RUN:
        return
    else:
        raise AssertionError(f"{where}: nothing runs `{shlex.join(words)}`; mark the block, or write it in Python")
    errors = io.StringIO()
    with patch.object(sys, "argv", words), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            assert not end.code, f"{where}: `{shlex.join(words)}` ended with {end.code}:\n{errors.getvalue()[-2000:]}"


def with_small_settings(words: list[str]) -> list[str]:
    """The command with settings for small models in front of its own."""
    head, command, rest = words[:2], words[2], words[3:]
    settings = list(_OPTIONS.get(command, []))
    if command == "compress" and "--list-recipes" not in rest:
        from optimum_flexcompress.recipes import load_recipe

        recipe = load_recipe(rest[rest.index("--recipe") + 1] if "--recipe" in rest else "full")
        small = {
            f"stages.{spec.name}.{key}": value
            for spec in recipe.stages
            for key, value in _STAGES.get(spec.type, {}).items()
        }
        # Fewest steps, and a share of rows, that mode `fast` would take of so little data.
        small.update({f"stages.{s.name}.data_fraction": "0.5" for s in recipe.stages if s.type == "prune"})
        settings = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    # What a model so small loses is a matter of chance.
    loose = ["--max-drop", "99%"] if "--max-drop" in rest else []
    return [*head, command, *settings, *rest, *loose]


def run_page(page: str, folder: str, setup: str = "") -> int:
    """Runs a page in a folder, and returns how many blocks ran.

    Args:
        page: The file.
        folder: Where to run it.
        setup: Python code that makes what a page takes for granted.
    """
    import logging
    import random

    import torch
    import transformers

    before, verbosity = os.getcwd(), transformers.logging.get_verbosity()
    noisy = {name: logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")}
    session = Session(Path(folder))
    os.chdir(folder)
    random.seed(0)
    torch.manual_seed(0)
    try:
        exec(setup, session.namespace)
        for block in blocks_of(Path(page)):
            session.run(block)
    finally:
        os.chdir(before)
        transformers.logging.set_verbosity(verbosity)
        for name, level in noisy.items():
            logging.getLogger(name).setLevel(level)
    return len(session.done)
