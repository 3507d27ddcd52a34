"""Small model folders and data."""

from __future__ import annotations

import pytest
import torch

from tests.tasks.toys import WORDS, splits, word_tokenizer
from tests.tiny import build


def save(folder, family: str, name: str, tokenizer=None, seed: int = 0, **overrides):
    """A tiny model with a tokenizer beside it."""
    model = build(family, name, seed=seed, **overrides)
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def named():
    """Class names for the three classes of the tiny models."""
    return {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory, named):
    """`teacher` and `student`, two BERT classifiers."""
    root = tmp_path_factory.mktemp("classifiers")
    save(root / "teacher", "bert", "BertForSequenceClassification", **named)
    save(root / "student", "bert", "BertForSequenceClassification", seed=1, num_hidden_layers=1, **named)
    return root


@pytest.fixture(scope="session")
def rows():
    """Thirty texts of one to nine words, three classes, and a data set for each other kind of task."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (1 + n % 9,), generator=generator)) for n in range(30)
    ]
    return splits(
        train={"text": texts, "label": ["a", "b", "c"] * 10},
        test={"text": texts[:21], "label": ["c", "a", "b"] * 7},
    )
