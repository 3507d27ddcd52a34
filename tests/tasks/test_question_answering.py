"""Question answering: the official scores by hand, windows, answers out of logits."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import EvalPrediction

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.tasks.question_answering import LONGEST_ANSWER, answers_from_logits
from optimum_flexcompress.tasks.squad import exact_match, normalize_answer, squad_scores, token_f1
from tests.tasks.toys import splits, word_tokenizer


TASK = get_task("question-answering")
CONTEXT = " ".join(["the film was good in paris"] * 30) + " anna moved to berlin"


def questions(context: str = CONTEXT, answer: str = "berlin", extra=()):
    row = {"id": ["q0"], "question": [" where is anna"], "context": [context]}
    row["answers"] = [{"text": [answer], "answer_start": [context.index(answer)]}]
    for number, answers in enumerate(extra, start=1):
        row["id"].append(f"q{number}")
        row["question"].append("who moved")
        row["context"].append(context)
        row["answers"].append(answers)
    return splits(test=row)


def perfect(prepared, split="test", height=9.0):
    """Logits that point at the labels."""
    rows = prepared.dataset[split]
    width = max(len(ids) for ids in rows["input_ids"])
    start, end = np.zeros((len(rows), width)), np.zeros((len(rows), width))
    for row, (first, last) in enumerate(zip(rows["start_positions"], rows["end_positions"])):
        start[row, first] = end[row, last] = height
    return start, end


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  U.S. Army!", "us army"),
        ("an apple, a day", "apple day"),
        ("Theatre another", "theatre another"),
        ("A", ""),
        ("twenty-five", "twentyfive"),
        ("–", "–"),
    ],
)
def test_normalisation_is_the_official_one(text, normal):
    assert normalize_answer(text) == normal


def test_scores_by_hand():
    assert exact_match("the Paris", "paris.") == 1.0
    # Shared: "in", "paris"; precision 2/3, recall 2/4.
    assert token_f1("lived in Paris", "in old Paris town") == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    # Words count as often as they occur on both sides.
    assert token_f1("ho ho ho", "ho ho") == pytest.approx(0.8)
    assert token_f1("", "x") == 0.0 and token_f1("a", "the") == 1.0
    scores = squad_scores({"1": "paris", "2": "berlin wall"}, {"1": ["rome", "Paris"], "2": ["wall"], "3": ["x"]})
    assert scores["exact_match"] == pytest.approx(100 / 3)
    assert scores["f1"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)


def test_questions_without_an_answer_want_the_empty_text():
    scores = squad_scores({"1": "", "2": "x", "3": "y"}, {"1": [], "2": [], "3": ["y"]})
    assert scores["exact_match"] == pytest.approx(200 / 3)
    assert scores["exact_unanswerable"] == pytest.approx(50) and scores["f1_answerable"] == pytest.approx(100)


def test_windows_overlap_and_cover_the_context():
    prepared = TASK.prepare(questions(), word_tokenizer(), max_length=48)
    windows = prepared.windows["test"]
    assert len(windows.origin) > 3 and set(windows.origin) == {0}
    covered = set()
    for ids, spans in zip(prepared.dataset["test"]["input_ids"], windows.offsets):
        assert len(ids) == len(spans) <= 48
        inside = spans[spans[:, 0] >= 0]
        if covered:
            assert len(covered & {tuple(span) for span in inside}) == 48 // 3
        covered |= {tuple(span) for span in inside}
    assert len(covered) == len(CONTEXT.split())


def test_labels_point_at_the_answer_and_elsewhere_at_the_first_token():
    tokenizer = word_tokenizer()
    prepared = TASK.prepare(questions(), tokenizer, max_length=48)
    rows = prepared.dataset["test"]
    assert rows["start_positions"][:-1] == [0] * (len(rows) - 1)
    last = rows[len(rows) - 1]
    assert tokenizer.convert_ids_to_tokens(last["input_ids"][last["start_positions"]]) == "berlin"


def test_perfect_logits_give_perfect_scores():
    prepared = TASK.prepare(questions(answer="anna moved to berlin"), word_tokenizer(), max_length=48)
    start, end = perfect(prepared)
    labels = (
        np.array(prepared.dataset["test"]["start_positions"]),
        np.array(prepared.dataset["test"]["end_positions"]),
    )
    metrics = prepared.compute_metrics(EvalPrediction((start, end), labels))
    assert metrics == {"exact_match": 100.0, "f1": 100.0}


def test_answers_lie_in_the_context_in_order_and_are_not_endless():
    prepared = TASK.prepare(questions(context="the film was good in paris", answer="paris"), word_tokenizer())
    windows = prepared.windows["test"]
    length = len(windows.offsets[0])
    # [CLS] where is anna [SEP] the film was good in paris [SEP], "the" at 5 and "paris" at 10
    start, end = np.zeros((1, length)), np.zeros((1, length))
    start[0, [1, 5, 9]] = 50.0, 15.0, 20.0
    end[0, [2, 6, 10]] = 50.0, 30.0, 10.0
    # "where is" is the question; "in ... film" is out of order; "the film" has 15 + 30, "in paris" 20 + 10.
    assert answers_from_logits(windows, start, end) == {"q0": "the film"}

    long = " ".join(["good"] * 50)
    windows = TASK.prepare(questions(context=long, answer="good"), word_tokenizer()).windows["test"]
    length = len(windows.offsets[0])
    start, end = np.zeros((1, length)), np.zeros((1, length))
    start[0, 5], end[0, 5 + LONGEST_ANSWER] = 9.0, 9.0
    answer = answers_from_logits(windows, start, end)["q0"]
    assert len(answer.split()) <= LONGEST_ANSWER


def test_the_best_window_wins_and_the_empty_answer_competes():
    data = questions(extra=[{"text": [], "answer_start": []}])
    prepared = TASK.prepare(data, word_tokenizer(), max_length=48)
    windows = prepared.windows["test"]
    start, end = perfect(prepared)
    answers = answers_from_logits(windows, start, end)
    # Every window of q1 points at its first token. So do those of q0 but one, and there the answer scores best.
    assert answers == {"q0": "berlin", "q1": ""}
    assert answers_from_logits(windows, start, end, unanswerable=False)["q1"] != ""


def test_every_split_is_recognised_by_its_labels():
    tokenizer = word_tokenizer()
    one, other = questions()["test"], questions(answer="to")["test"]
    prepared = TASK.prepare(type(questions())({"validation": one, "test": other}), tokenizer, max_length=48)
    for split in ("validation", "test"):
        rows = prepared.dataset[split]
        labels = (np.array(rows["start_positions"]), np.array(rows["end_positions"]))
        assert prepared.compute_metrics(EvalPrediction(perfect(prepared, split), labels))["exact_match"] == 100.0
    with pytest.raises(FlexCompressError, match="belong to no prepared split"):
        prepared.compute_metrics(EvalPrediction((np.zeros((1, 4)), np.zeros((1, 4))), (np.zeros(1), np.zeros(1))))


def test_answers_in_other_shapes():
    base = {"question": ["where"], "context": ["anna moved to paris"]}
    for answers in ("paris", [{"text": "paris", "answer_start": 14}]):
        prepared = TASK.prepare(splits(test={**base, "answers": [answers]}), word_tokenizer())
        assert prepared.windows["test"].examples.answers == [["paris"]]
        assert prepared.dataset["test"]["start_positions"][0] == 6
    with pytest.raises(FlexCompressError, match="row 0: answers must look like"):
        TASK.prepare(splits(test={**base, "answers": [{"texts": ["paris"]}]}), word_tokenizer())


def test_long_questions_and_short_windows():
    data = splits(test={"question": ["where is anna " * 40], "context": [CONTEXT], "answers": ["berlin"]})
    prepared = TASK.prepare(data, word_tokenizer(), max_length=48)
    assert prepared.dataset["test"]["start_positions"][-1] > 0
    with pytest.raises(FlexCompressError, match="choose at least 48"):
        TASK.prepare(data, word_tokenizer(), max_length=20)
