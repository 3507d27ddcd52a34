"""Metrics of classification and regression, shared by the tasks."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from .base import first_output


def single_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro-averaged F1 over the classes that occur."""
    predicted = first_output(prediction.predictions).argmax(axis=-1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, predicted)),
        "f1": float(f1_score(prediction.label_ids, predicted, average="macro", zero_division=0)),
    }


def multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Micro and macro F1 at probability 0.5, and the share of rows with exactly the right set."""
    predicted = (first_output(prediction.predictions) > 0).astype(int)
    truth = np.asarray(prediction.label_ids).astype(int)
    return {
        "f1": float(f1_score(truth, predicted, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(truth, predicted)),
    }


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Pearson and Spearman correlation (0 where a side is constant), mean squared and mean absolute error."""
    predicted = np.asarray(first_output(prediction.predictions), dtype=np.float64).reshape(-1)
    truth = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1)
    return {
        "pearson": correlation(predicted, truth),
        "spearman": correlation(ranks(predicted), ranks(truth)),
        "mse": float(np.mean((predicted - truth) ** 2)),
        "mae": float(np.mean(np.abs(predicted - truth))),
    }


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's correlation; 0 where a side is constant, since it then explains nothing."""
    left, right = left - left.mean(), right - right.mean()
    scale = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum() / scale) if scale else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
