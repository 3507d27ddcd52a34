"""Runs a model over a split and computes the task's metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import EvalPrediction

from ..tasks.base import Prepared
from .artifact import LABELS, Artifact, to_numpy


@dataclass
class Evaluation:
    """What a model said about a split.

    Attributes:
        metrics: The task's metrics.
        predictions: In the order of the split: logits, generated ids, vectors; for language models see
            [`optimum_flexcompress.tasks.language_modeling.token_losses`].
        label_ids: The labels, padded with -100; a tuple for question answering; None where there are none.
    """

    metrics: dict[str, float]
    predictions: Any
    label_ids: Any


def evaluate_artifact(
    artifact: Artifact,
    prepared: Prepared,
    split: str,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    references: np.ndarray | None = None,
    progress: bool = True,
) -> Evaluation:
    """Runs a model over a split.

    Rows of similar length share a batch, which saves padding; results come back in the order of the split.

    Args:
        artifact: The model.
        prepared: The data.
        split: One of its splits.
        batch_size: Rows at a time.
        max_new_tokens: Bound for generated outputs; generation is greedy.
        references: Stands in for labels where a task has none: the vectors of the model to compare with.
        progress: Whether to show a progress bar.

    Returns:
        Metrics and predictions. Without labels or references there are no metrics.
    """
    rows = prepared.dataset[split]
    order = by_length(rows)
    collected: list[tuple[Any, Any]] = []
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    name = artifact.path.name
    for indices in tqdm(batches, desc=f"Evaluating {name}", unit="batch", leave=False, disable=not progress):
        # Indexing one by one, not with a list: rows may hold images, which come decoded this way only.
        batch = prepared.collator([rows[int(index)] for index in indices])
        labels = [batch[label] for label in LABELS if label in batch]
        if prepared.generation:
            output: Any = artifact.generate(batch, max_new_tokens=max_new_tokens, do_sample=False)
        else:
            output = artifact.outputs(batch)
        if prepared.preprocess_logits is not None:
            output = prepared.preprocess_logits(output, labels[0])
        collected.append((to_numpy(output), to_numpy(labels)))
    predictions = _in_order([output for output, _ in collected], order)
    label_ids = _in_order([labels for _, labels in collected], order)
    if references is not None:
        label_ids = references
    elif label_ids is not None and len(label_ids) == 1:
        label_ids = label_ids[0]
    metrics = {}
    if label_ids is not None and len(label_ids):
        metrics = prepared.compute_metrics(EvalPrediction(predictions=predictions, label_ids=label_ids))
    return Evaluation(metrics, predictions, label_ids if label_ids is not None and len(label_ids) else None)


def by_length(rows: Any) -> np.ndarray:
    """Row numbers, those of the longest inputs first."""
    if "input_ids" not in rows.column_names:
        return np.arange(len(rows))
    return np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable")


def _in_order(batches: list[Any], order: np.ndarray) -> Any:
    """Joins batches along the first axis, padding the second with -100, and undoes the sorting by length."""
    if isinstance(batches[0], tuple):
        return tuple(_in_order([batch[part] for batch in batches], order) for part in range(len(batches[0])))
    first = batches[0]
    if first.ndim > 1:
        width = max(batch.shape[1] for batch in batches)
        batches = [
            np.pad(
                batch,
                [(0, 0), (0, width - batch.shape[1])] + [(0, 0)] * (batch.ndim - 2),
                constant_values=-100,
            )
            for batch in batches
        ]
    joined = np.concatenate(batches)
    result = np.empty_like(joined)
    result[order] = joined
    return result


def stream_batches(prepared: Prepared, split: str, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Single rows at their real lengths, as a server that answers one request at a time would see them.

    Args:
        prepared: The data.
        split: One of its splits.
        count: How many rows, drawn at random.
        seed: Of the draw.

    Returns:
        Batches of one row each, without padding.
    """
    rows = prepared.dataset[split]
    chosen = np.random.default_rng(seed).choice(len(rows), size=min(count, len(rows)), replace=False)
    return [prepared.collator([rows[int(index)]]) for index in chosen]
