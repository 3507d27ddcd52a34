"""Token classification: tags on first pieces, entity scores as the CoNLL scorer gives them."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Sequence
from transformers import EvalPrediction

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.tasks.token_classification import entities, token_metrics
from tests.tasks.toys import splits, word_tokenizer


TASK = get_task("token-classification")


def test_first_piece_carries_the_tag():
    data = splits(
        train={"tokens": [["Anna", "lives", "in", "Paris.berlin"]], "ner_tags": [["B-PER", "O", "O", "B-LOC"]]}
    )
    prepared = TASK.prepare(data, word_tokenizer())
    names, row = prepared.label_names, prepared.dataset["train"][0]
    assert names == ["B-LOC", "B-PER", "O"]
    # [CLS] anna lives in paris . berlin [SEP]
    assert row["labels"] == [-100, 1, 2, 2, 0, -100, -100, -100]


def test_declared_names_and_dynamic_padding():
    data = splits(train={"tokens": [["anna"], ["in", "paris"]], "ner_tags": [[1], [0, 2]]})
    data = data.cast_column("ner_tags", Sequence(ClassLabel(names=["O", "B-PER", "B-LOC"])))
    prepared = TASK.prepare(data, word_tokenizer())
    batch = prepared.collator([prepared.dataset["train"][i] for i in range(2)])
    assert prepared.label_names == ["O", "B-PER", "B-LOC"]
    assert batch["labels"].tolist() == [[-100, 1, -100, -100], [-100, 0, 2, -100]]


def test_rows_whose_tags_do_not_fit():
    with pytest.raises(FlexCompressError, match="one tag for each word"):
        TASK.prepare(splits(train={"tokens": [["anna", "in"]], "tags": [["O"]]}), word_tokenizer())


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER O", {("PER", 1, 2)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-PER I-LOC", {("PER", 0, 1), ("LOC", 2, 2)}),
        ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),
        ("B-PER I-PER E-PER S-LOC O", {("PER", 0, 2), ("LOC", 3, 3)}),
        ("S-PER S-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("B-PER E-PER I-PER", {("PER", 0, 1), ("PER", 2, 2)}),
        ("O O", set()),
        ("B-PER", {("PER", 0, 0)}),
    ],
)
def test_entities(tags, expected):
    assert entities(tags.split()) == expected


def test_entity_scores_by_hand():
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    truth = np.array([[1, 2, 0, 3, -100], [0, 1, 0, -100, -100]])
    guess = np.array([[1, 2, 0, 0, 3], [0, 1, 2, 0, 0]])
    logits = np.eye(4)[guess]
    metrics = token_metrics(names)(EvalPrediction(logits, truth))
    # True: PER(0-1), LOC(3), PER(1). Found: PER(0-1) right, PER(1-2) wrong.
    assert metrics["precision"] == pytest.approx(1 / 2) and metrics["recall"] == pytest.approx(1 / 3)
    assert metrics["f1"] == pytest.approx(2 / 5)
    assert metrics["accuracy"] == pytest.approx(5 / 7)


def test_tags_without_a_scheme_are_scored_by_token():
    truth, guess = np.array([[0, 1, 1, -100]]), np.array([[0, 1, 0, 1]])
    metrics = token_metrics(["NOUN", "VERB"])(EvalPrediction(np.eye(2)[guess], truth))
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
