"""How the answers of a compressed model differ from those of its baseline, beyond the metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import FlexCompressError
from ..tasks.base import Prepared, Task, first_output
from ..tasks.feature_extraction import cosines, similarity_correlation
from ..tasks.metrics import correlation
from ..tasks.question_answering import answers_from_logits
from ..tasks.squad import normalize_answer
from ..tasks.text2text_generation import decode
from .evaluate import Evaluation


def compare_predictions(
    task: Task, prepared: Prepared, split: str, baseline: Evaluation, candidate: Evaluation
) -> dict[str, Any]:
    """Compares two models' predictions on the same rows.

    Args:
        task: What the models are for.
        prepared: The data.
        split: The split that both were run on.
        baseline: What the baseline said.
        candidate: What the other model said.

    Returns:
        `agreement`, the share of equal decisions (labels, tags, answers, likeliest tokens, generated texts; the mean
        cosine of vectors, or the correlation of their similarities where the widths differ, and the correlation of
        regressed numbers), and `flipped`, its complement where decisions are
        counted. With classes also `fixed` and `broken`, the shares of rows that became right and wrong, and
        `per_class`: for each class `name`, `count`, `baseline`, `candidate` (accuracy on its rows) and `change`.

    Raises:
        FlexCompressError: The predictions are not of the same rows.
    """
    if len(_leading(baseline.predictions)) != len(_leading(candidate.predictions)):
        raise FlexCompressError("The two models were evaluated on different numbers of rows: use the same split.")
    kind = _KINDS.get(task.name, _compare_classes)
    return kind(prepared, split, baseline, candidate)


def _leading(predictions: Any) -> np.ndarray:
    return predictions[0] if isinstance(predictions, tuple) else predictions


def _agreement(equal: np.ndarray) -> dict[str, float]:
    share = float(np.mean(equal))
    return {"agreement": share, "flipped": 1.0 - share}


def per_class_change(
    labels: np.ndarray, baseline: np.ndarray, candidate: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Accuracy on the rows of each class, before and after.

    Args:
        labels: True class ids.
        baseline: Predicted ids, same shape.
        candidate: Predicted ids, same shape.
        names: Class names in the order of their ids.

    Returns:
        One dict for each class that has rows, the greatest loss first.
    """
    changes = []
    for index, name in enumerate(names):
        rows = labels == index
        if not rows.any():
            continue
        before, after = float(np.mean(baseline[rows] == index)), float(np.mean(candidate[rows] == index))
        changes.append(
            {"name": name, "count": int(rows.sum()), "baseline": before, "candidate": after, "change": after - before}
        )
    return sorted(changes, key=lambda change: (change["change"], change["name"]))


def _decisions(labels: np.ndarray, before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    right, still = before == labels, after == labels
    return {
        **_agreement(before == after),
        "fixed": float(np.mean(~right & still)),
        "broken": float(np.mean(right & ~still)),
        "per_class": per_class_change(labels, before, after, names),
    }


def _compare_classes(prepared: Prepared, split: str, baseline: Evaluation, candidate: Evaluation) -> dict[str, Any]:
    before, after = first_output(baseline.predictions), first_output(candidate.predictions)
    labels = np.asarray(baseline.label_ids)
    if prepared.label_names is None:  # regression
        left, right = np.ravel(before).astype(np.float64), np.ravel(after).astype(np.float64)
        return {"agreement": correlation(left, right), "mean_difference": float(np.mean(np.abs(left - right)))}
    if labels.ndim == 2:  # several labels at once
        left, right = before > 0, after > 0
        truth = labels > 0
        changes = []
        for index, name in enumerate(prepared.label_names):
            hit, now = np.mean(left[:, index] == truth[:, index]), np.mean(right[:, index] == truth[:, index])
            changes.append(
                {
                    "name": name,
                    "count": int(truth[:, index].sum()),
                    "baseline": float(hit),
                    "candidate": float(now),
                    "change": float(now - hit),
                }
            )
        equal = (left == right).all(axis=1)
        return {
            **_agreement(equal),
            "per_class": sorted(changes, key=lambda change: (change["change"], change["name"])),
        }
    return _decisions(labels, before.argmax(axis=-1), after.argmax(axis=-1), prepared.label_names)


def _compare_tokens(prepared: Prepared, split: str, baseline: Evaluation, candidate: Evaluation) -> dict[str, Any]:
    labels = np.asarray(baseline.label_ids)
    valid = labels != -100
    before = first_output(baseline.predictions).argmax(axis=-1)[valid]
    after = first_output(candidate.predictions).argmax(axis=-1)[valid]
    return _decisions(labels[valid], before, after, prepared.label_names or [])


def _compare_language(prepared: Prepared, split: str, baseline: Evaluation, candidate: Evaluation) -> dict[str, Any]:
    valid = np.asarray(baseline.label_ids) != -100
    before, after = baseline.predictions[..., 1][valid], candidate.predictions[..., 1][valid]
    predicted = before >= 0  # a causal model says nothing about the first token
    return _agreement(before[predicted] == after[predicted])


def _compare_answers(prepared: Prepared, split: str, baseline: Evaluation, candidate: Evaluation) -> dict[str, Any]:
    windows = prepared.windows[split]
    before = answers_from_logits(windows, *baseline.predictions)
    after = answers_from_logits(windows, *candidate.predictions)
    return _agreement(np.array([normalize_answer(before[key]) == normalize_answer(after[key]) for key in before]))


def _compare_generated(prepared: Prepared, split: str, baseline: Evaluation, candidate: Evaluation) -> dict[str, Any]:
    tokenizer = prepared.collator.tokenizer
    before, after = decode(baseline.predictions, tokenizer), decode(candidate.predictions, tokenizer)
    return _agreement(np.array([left == right for left, right in zip(before, after)]))


def _compare_vectors(prepared: Prepared, split: str, baseline: Evaluation, candidate: Evaluation) -> dict[str, Any]:
    if baseline.predictions.shape == candidate.predictions.shape:
        return {"agreement": float(cosines(baseline.predictions, candidate.predictions).mean())}
    return {"agreement": similarity_correlation(baseline.predictions, candidate.predictions)}


_KINDS = {
    "token-classification": _compare_tokens,
    "question-answering": _compare_answers,
    "fill-mask": _compare_language,
    "text-generation": _compare_language,
    "text2text-generation": _compare_generated,
    "feature-extraction": _compare_vectors,
}
