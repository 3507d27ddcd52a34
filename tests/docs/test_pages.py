"""Every code block of the README and of the guides runs, in small."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, blocks_of, left_out, pages, run_page


HUB = "docs/source/usage_guides/hub.mdx"
# What is not run: page, language, and why. Everything else is.
NOT_RUN = [
    ("README.md", "bash", "changes the environment"),
    ("README.md", "bash", "CI runs the targets"),
    ("README.md", "bash", "takes from minutes to hours"),
    ("docs/source/installation.mdx", "bash", "changes the environment"),
    ("docs/source/usage_guides/benchmark.mdx", "bash", "needs the environment of IPEX"),
    ("docs/source/usage_guides/quantization.mdx", "bash", "needs the environment of IPEX"),
    ("docs/source/usage_guides/quantization.mdx", "python", "needs the environment of IPEX"),
    ("docs/source/usage_guides/quantization.mdx", "python", "needs a GPU"),
]
# What the README takes for granted.
SETUP = {
    "README.md": """
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

teacher = AutoModelForSequenceClassification.from_pretrained("my-model")
tokenizer = AutoTokenizer.from_pretrained("my-model")
train_dataset = load_dataset("csv", data_files={"train": "questions/test.csv"})["train"]
train_dataset = train_dataset.map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)
args = TrainingArguments("checkpoints", num_train_epochs=1, report_to="none")
"""
}


def name_of(page) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in pages() if any(blocks_of(page))]


@pytest.mark.parametrize("page", [page for page in WITH_CODE if name_of(page) != HUB], ids=name_of)
def test_page_runs(page, workplace, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workplace / "cache")
    run_page(str(page), str(workplace), SETUP.get(name_of(page), ""))


def test_page_of_the_hub_runs(workplace, hub, client):
    assert client(run_page, str(ROOT / HUB), str(workplace)) >= 4
    assert {"ada/my-model-int8", "ada/student"} <= hub.repos.keys()
    assert "config.json" in hub.files("ada/student")


def test_what_is_not_run_is_listed():
    found = [(name_of(page), block.language, left_out(block)) for page in pages() for block in blocks_of(page)]
    assert sorted(entry for entry in found if entry[2]) == sorted(NOT_RUN)


def test_pages_are_in_the_table_of_contents():
    toctree = (ROOT / "docs" / "source" / "_toctree.yml").read_text(encoding="utf-8")
    listed = re.findall(r"local: (\S+)", toctree)
    there = [page.relative_to(ROOT / "docs" / "source") for page in (ROOT / "docs" / "source").rglob("*.mdx")]
    assert sorted(listed) == sorted(page.with_suffix("").as_posix() for page in there)


def test_links_between_pages_lead_somewhere():
    for page in pages():
        if page.suffix != ".mdx":
            continue
        for target in re.findall(r"\]\(([\w./-]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("~"):
                assert (page.parent / f"{target}.mdx").is_file(), f"{name_of(page)} links to {target}"


def test_files_that_pages_name_exist():
    """Scripts and figures; what a benchmark has still to write is said to be missing."""
    for page in pages():
        for line in page.read_text(encoding="utf-8").splitlines():
            for path in re.findall(r"`(examples/[\w./-]+)`", line):
                assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
