"""Scoring of extracted answers as in the official SQuAD 1.1 and 2.0 evaluation (Rajpurkar et al., 2016, 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence


PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without the articles a, an and the, single spaces."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are the same once normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the bags of words; where one side has no words, 1 if the other has none either, else 0."""
    mine, gold = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not mine or not gold:
        return float(mine == gold)
    shared = sum((Counter(mine) & Counter(gold)).values())
    return 2 * shared / (len(mine) + len(gold))


def squad_scores(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Exact match and F1, each the best over a question's answers, averaged over questions.

    Args:
        predictions: Question id -> answer; the empty text says that there is none. A missing one scores 0.
        references: Question id -> accepted answers; none of them means that the question has no answer.

    Returns:
        `exact_match` and `f1` in percent; with unanswerable questions also `f1_answerable` and
        `exact_unanswerable`.
    """
    exact, f1 = {}, {}
    for key, answers in references.items():
        # The 2.0 scorer leaves out answers that are empty once normalised.
        answers = [answer for answer in answers if normalize_answer(answer)] or [""]
        given = predictions.get(key)
        exact[key] = max(exact_match(given, answer) for answer in answers) if given is not None else 0.0
        f1[key] = max(token_f1(given, answer) for answer in answers) if given is not None else 0.0
    scores = {"exact_match": _percent(exact.values()), "f1": _percent(f1.values())}
    unanswerable = [key for key, answers in references.items() if not any(answers)]
    if unanswerable:
        scores["f1_answerable"] = _percent(value for key, value in f1.items() if key not in set(unanswerable))
        scores["exact_unanswerable"] = _percent(exact[key] for key in unanswerable)
    return scores


def _percent(values) -> float:
    values = list(values)
    return 100.0 * sum(values) / len(values) if values else 0.0
