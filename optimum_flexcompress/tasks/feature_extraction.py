"""Feature extraction: one vector for a text, the mean of its last hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from transformers import DataCollatorWithPadding, EvalPrediction, PretrainedConfig, PreTrainedModel

from .base import Column, Prepared, Task, effective_length, first_output, map_splits, texts


class FeatureExtraction(Task):
    """`AutoModel`. There are no labels: what counts is how near the vectors stay to those of another model."""

    name = "feature-extraction"
    auto_class_name = "AutoModel"
    ort_class_path = "optimum.onnxruntime:ORTModelForFeatureExtraction"
    main_metric = "cosine"
    columns = (Column("text", ("text", "sentence", "sentence1", "content", "document", "query", "question")),)

    def read_output(self, output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """The mean of the last hidden states over the tokens that are not padding, `(B, hidden)`."""
        return mean_pool(output["last_hidden_state"], batch.get("attention_mask"))

    def prepare(
        self,
        data: DatasetDict,
        processor: Any,
        *,
        max_length: int = 128,
        columns: Mapping[str, str] | None = None,
        label_names: Sequence[str] | None = None,
        model: PreTrainedModel | PretrainedConfig | None = None,
    ) -> Prepared:
        """See [`Task.prepare`]. `compute_metrics` takes the vectors of another model as labels."""
        chosen = self.find_columns(data, columns)
        for split in data.values():
            texts(split, chosen["text"])
        length = effective_length(max_length, processor)

        def tokenise(rows: dict[str, list]) -> dict[str, list]:
            return dict(processor(rows[chosen["text"]], truncation=True, max_length=length, padding=False))

        return Prepared(
            dataset=map_splits(data, tokenise),
            collator=DataCollatorWithPadding(processor),
            compute_metrics=cosine_metrics,
            main_metric="cosine",
        )


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over valid tokens.

    Args:
        hidden: `(B, N, hidden)`.
        mask: `(B, N)`, 1 for valid tokens; None takes all.

    Returns:
        `(B, hidden)`; zeros for a row without valid tokens.
    """
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def cosine_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean and least cosine between the vectors and their references."""
    cosine = cosines(first_output(prediction.predictions), prediction.label_ids)
    return {"cosine": float(cosine.mean()), "cosine_min": float(cosine.min())}


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The cosine of each row of one matrix with the same row of another, `(B, d), (B, d) -> (B,)`."""
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return (left * right).sum(axis=-1) / np.maximum(norms, 1e-12)
