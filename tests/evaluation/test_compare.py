"""Flips, agreement and changes by class, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from optimum_flexcompress.data import load_data
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import compare_predictions
from optimum_flexcompress.evaluation.compare import per_class_change
from optimum_flexcompress.evaluation.evaluate import Evaluation
from optimum_flexcompress.tasks import get_task
from tests.tasks.toys import splits, word_tokenizer


def logits(ids, classes: int = 3) -> np.ndarray:
    return np.eye(classes)[np.asarray(ids)]


def compare(task, before, after, labels, names=("a", "b", "c"), **prepared):
    context = SimpleNamespace(label_names=list(names) if names else None, **prepared)
    return compare_predictions(
        get_task(task), context, "test", Evaluation({}, before, labels), Evaluation({}, after, labels)
    )


def test_flips_by_hand():
    labels = np.array([0, 0, 1, 1, 2])
    result = compare("text-classification", logits([0, 1, 1, 1, 0]), logits([0, 0, 1, 2, 1]), labels)
    assert result["agreement"] == pytest.approx(2 / 5) and result["flipped"] == pytest.approx(3 / 5)
    assert result["fixed"] == pytest.approx(1 / 5) and result["broken"] == pytest.approx(1 / 5)
    assert [(c["name"], c["count"], c["baseline"], c["candidate"], c["change"]) for c in result["per_class"]] == [
        ("b", 2, 1.0, 0.5, -0.5),
        ("c", 1, 0.0, 0.0, 0.0),
        ("a", 2, 0.5, 1.0, 0.5),
    ]


def test_classes_without_rows_are_left_out():
    changes = per_class_change(np.array([0]), np.array([0]), np.array([1]), ["a", "b"])
    assert [change["name"] for change in changes] == ["a"]


def test_several_labels_at_once():
    labels = np.array([[1, 0], [0, 1]])
    result = compare("text-classification", np.array([[1, -1], [-1, 1]]), np.array([[1, -1], [1, 1]]), labels, "xy")
    assert result["flipped"] == 0.5
    assert [(c["name"], c["count"], c["change"]) for c in result["per_class"]] == [("x", 1, -0.5), ("y", 1, 0.0)]


def test_regression_agrees_by_correlation():
    before, after = np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [4.0], [6.0]])
    result = compare("text-classification", before, after, np.zeros(3), names=None)
    assert result == {"agreement": pytest.approx(1.0), "mean_difference": pytest.approx(2.0)}


def test_tokens_count_where_they_are_labelled():
    labels = np.array([[-100, 0, 1], [2, -100, -100]])
    result = compare("token-classification", logits([[0, 0, 1], [2, 0, 0]]), logits([[1, 0, 2], [2, 1, 1]]), labels)
    assert result["agreement"] == pytest.approx(2 / 3) and result["broken"] == pytest.approx(1 / 3)


def test_likeliest_tokens():
    labels = np.array([[5, 6, 7, -100]])
    before, after = np.zeros((1, 4, 2)), np.zeros((1, 4, 2))
    before[0, :, 1], after[0, :, 1] = [-1, 3, 4, 9], [-1, 3, 5, 8]
    # A causal model says nothing about the first token, and the last one is padding.
    assert compare("text-generation", before, after, labels)["agreement"] == pytest.approx(1 / 2)


def test_answers_agree_once_normalised():
    data = splits(
        test={
            "question": ["who"] * 2,
            "context": ["the film was good", "anna lives in paris"],
            "answers": ["film", "paris"],
        }
    )
    prepared = get_task("question-answering").prepare(load_data(data), word_tokenizer())

    def pointing(spans):
        start, end = np.zeros((2, 8)), np.zeros((2, 8))
        for row, (first, last) in enumerate(spans):
            start[row, first] = end[row, last] = 9.0
        return start, end

    # [CLS] who [SEP] the film was good: "film" and "the film" are the same answer.
    before, after = pointing([(4, 4), (6, 6)]), pointing([(3, 4), (3, 3)])
    result = compare_predictions(
        get_task("question-answering"), prepared, "test", Evaluation({}, before, None), Evaluation({}, after, None)
    )
    assert result["agreement"] == 0.5


def test_generated_texts():
    tokenizer = word_tokenizer()
    collator = SimpleNamespace(tokenizer=tokenizer)
    before, after = np.array([[2, 18, 3, -100], [2, 7, 3, 0]]), np.array([[2, 18, 3], [2, 8, 3]])
    assert compare("text2text-generation", before, after, None, collator=collator)["flipped"] == 0.5


def test_vectors_of_different_widths():
    vectors = np.random.default_rng(0).normal(size=(12, 5))
    same = compare("feature-extraction", vectors, 2 * vectors, None)
    wide = compare("feature-extraction", vectors, np.pad(vectors, [(0, 0), (0, 3)]), None)
    assert same["agreement"] == pytest.approx(1.0) and wide["agreement"] == pytest.approx(1.0)


def test_different_numbers_of_rows():
    with pytest.raises(FlexCompressError, match="different numbers of rows"):
        compare("text-classification", logits([0]), logits([0, 1]), np.array([0]))
