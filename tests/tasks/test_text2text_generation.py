"""Text to text: columns, batches, scores."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from transformers import EvalPrediction

from optimum_flexcompress.errors import FlexCompressError, MissingExtraError
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.tasks.text2text_generation import edit_distance, text_metrics
from tests.tasks.toys import splits, word_tokenizer


TASK = get_task("text2text-generation")


def pairs():
    return splits(train={"body": ["anna lives in paris", "bad plot"], "subject": ["anna", "the film"]})


def test_rows_and_batches():
    tokenizer = word_tokenizer()
    prepared = TASK.prepare(pairs(), tokenizer)
    assert prepared.generation and prepared.main_metric == "chrf"
    batch = prepared.collator([prepared.dataset["train"][i] for i in range(2)])
    assert batch["labels"].tolist()[0] == [2, tokenizer.convert_tokens_to_ids("anna"), 3, -100]


def test_the_translation_column_needs_two_languages():
    data = splits(train={"translation": [{"en": "the film", "de": "der film"}]})
    with pytest.raises(FlexCompressError, match=r"\(de, en\)|\(en, de\)"):
        TASK.prepare(data, word_tokenizer())
    prepared = TASK.prepare(data, word_tokenizer(), columns={"source": "en", "target": "de"})
    assert prepared.dataset["train"]["labels"][0] == [2, 1, word_tokenizer().convert_tokens_to_ids("film"), 3]


def test_metrics_of_generated_ids():
    tokenizer = word_tokenizer()
    prepared = TASK.prepare(pairs(), tokenizer)
    labels = np.array([[2, 18, 3, -100], [2, 11, 7, 3]])
    right = np.array([[0, 2, 18, 3, 0], [2, 11, 7, 3, -100]])
    metrics = prepared.compute_metrics(EvalPrediction(right, labels))
    assert metrics["exact_match"] == 1.0 and metrics["wer"] == 0.0 and metrics["chrf"] == pytest.approx(100)
    assert metrics["generated_length"] == pytest.approx(3.5)


def test_scores_by_hand():
    metrics = text_metrics(["the film was good", "bad"], ["the film is very good", "bad"])
    # One substitution and one deletion over six words.
    assert metrics["wer"] == pytest.approx(2 / 6) and metrics["exact_match"] == 0.5
    assert 0 < metrics["chrf"] < 100
    same = text_metrics(["the film was very good"], ["the film was very good"])
    assert same["bleu"] == pytest.approx(100) and same["chrf"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("left", "right", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0)]
)
def test_edit_distance(left, right, distance):
    assert edit_distance(left, right) == distance


def test_a_missing_scorer_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"sacrebleu.*\[report\]"):
        TASK.prepare(pairs(), word_tokenizer())
