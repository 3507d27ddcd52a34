"""Feature extraction: one vector for a text, the mean of its last hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from transformers import DataCollatorWithPadding, EvalPrediction, PretrainedConfig, PreTrainedModel

from .base import Column, Prepared, Task, effective_length, first_output, map_splits, texts
from .metrics import correlation


# A thousand texts make half a million pairs, which is enough for a correlation and still takes no time.
PAIRED_ROWS = 1000


class FeatureExtraction(Task):
    """`AutoModel`. There are no labels: what counts is how near the vectors stay to those of another model."""

    name = "feature-extraction"
    auto_class_name = "AutoModel"
    ort_class_path = "optimum.onnxruntime:ORTModelForFeatureExtraction"
    main_metric = "similarity"
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
            compute_metrics=similarity_metrics,
            main_metric="similarity",
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


def similarity_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """How well vectors keep what another model's vectors say about which texts are alike.

    Returns:
        `similarity`, the correlation of the cosines between all pairs of texts (of the first `PAIRED_ROWS`) under the
        two models, which may differ in width; where they do not, `cosine` and `cosine_min` between the two vectors
        of each text.
    """
    vectors, references = np.asarray(first_output(prediction.predictions)), np.asarray(prediction.label_ids)
    result = {"similarity": similarity_correlation(vectors, references)}
    if vectors.shape == references.shape:
        cosine = cosines(vectors, references)
        result.update(cosine=float(cosine.mean()), cosine_min=float(cosine.min()))
    return result


def similarity_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's correlation between two models' cosines of all pairs of rows, `(B, d), (B, d') -> scalar`."""
    pairs = np.triu_indices(min(len(left), PAIRED_ROWS), k=1)
    if len(pairs[0]) < 2:  # one pair or none: nothing to correlate
        return 1.0 if left.shape == right.shape and np.allclose(left, right, rtol=1e-3, atol=1e-4) else 0.0
    left, right = _unit(left[:PAIRED_ROWS]), _unit(right[:PAIRED_ROWS])
    return correlation((left @ left.T)[pairs], (right @ right.T)[pairs])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The cosine of each row of one matrix with the same row of another, `(B, d), (B, d) -> (B,)`."""
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return (left * right).sum(axis=-1) / np.maximum(norms, 1e-12)
