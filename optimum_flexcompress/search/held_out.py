"""The examples that candidates are scored on, which training should not have seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import PretrainedConfig

from ..data import load_data, select_split, take
from ..errors import FlexCompressError
from ..evaluation.artifact import LABELS, Artifact
from ..evaluation.evaluate import by_length, evaluate_artifact
from ..tasks.base import Prepared, Task
from ..tasks.labels import LabelMap, class_column, names_of_model, without_unlabelled


SPLIT = "validation"
"""Under this name the rows are prepared: tasks may treat training rows differently."""
LOSS = "loss"
_IGNORED = -100
_LOWER = ("wer", "perplexity", "mse", "mae")


def hold_out(data: Dataset, samples: int, seed: int = 42) -> tuple[Dataset, Dataset]:
    """Parts a training set into rows to train on and rows to search on; the same call gives the same parts.

    Args:
        data: The training split.
        samples: How many rows to hold out.
        seed: Of the draw.

    Returns:
        The rows to train on and those held out, each in their order.

    Raises:
        FlexCompressError: Nothing would be left to train on.
    """
    if not 0 < samples < len(data):
        raise FlexCompressError(
            f"{samples} examples cannot be held out of {len(data)}: ask for at least 1, and leave some to train on."
        )
    drawn = np.zeros(len(data), dtype=bool)
    drawn[np.random.default_rng(seed).choice(len(data), size=samples, replace=False)] = True
    return data.select(np.flatnonzero(~drawn)), data.select(np.flatnonzero(drawn))


@dataclass
class HeldOut:
    """Tokenised examples, and how a model is scored on them.

    Attributes:
        prepared: The examples, under the split `SPLIT`.
        where: Where they come from, in words.
        metric: Name of the metric.
        greater_is_better: Its direction.
        unit: How to show it.
        batch_size: Rows at a time.
        max_new_tokens: Bound for generated outputs.
        references: Stand in for labels where the task has none: the vectors of the full model.
        bf16: Whether PyTorch models compute in bfloat16.
    """

    prepared: Prepared
    where: str
    metric: str
    greater_is_better: bool
    unit: str
    batch_size: int
    max_new_tokens: int
    references: np.ndarray | None = None
    bf16: bool = False

    def compare_with(self, full: Artifact) -> None:
        """Lets the full model's vectors stand in for labels, for tasks that have none."""
        if full.task.name == "feature-extraction":
            with self._precision():
                self.references = self._evaluate(full).predictions

    def score(self, artifact: Artifact) -> float:
        """The metric of a model on the examples.

        Raises:
            FlexCompressError: The data or the model cannot give that metric.
        """
        with self._precision():
            if self.metric == LOSS:
                return self._loss(artifact)
            metrics = self._evaluate(artifact).metrics
        if self.metric not in metrics:
            raise FlexCompressError(
                f"There is no metric {self.metric!r} on these examples; there are {', '.join(metrics) or 'none'}, and "
                f"{LOSS}."
            )
        return float(metrics[self.metric])

    def _precision(self) -> torch.autocast:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16)

    def _evaluate(self, artifact: Artifact) -> Any:
        return evaluate_artifact(
            artifact,
            self.prepared,
            SPLIT,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            references=self.references,
            progress=False,
        )

    @torch.inference_mode()
    def _loss(self, artifact: Artifact) -> float:
        """The model's own loss, over all labels of all rows."""
        rows = self.prepared.dataset[SPLIT]
        order = by_length(rows)
        total, items = 0.0, 0
        for begin in range(0, len(order), self.batch_size):
            batch = self.prepared.collator([rows[int(index)] for index in order[begin : begin + self.batch_size]])
            batch = {name: value.to(artifact.model.device) for name, value in batch.items() if name in artifact.inputs}
            output = artifact.model(**batch)
            if output.get("loss") is None:
                raise FlexCompressError(f"{artifact.task.name} has no loss on these examples: choose its own metric.")
            labels = batch.get("labels")
            per_token = labels is not None and labels.dim() > 1 and not labels.is_floating_point()
            count = int((labels != _IGNORED).sum()) if per_token else len(next(iter(batch.values())))
            total, items = total + float(output["loss"]) * count, items + count
        return total / items

    def digest(self) -> str:
        """Tells these examples, tokenised like this, from others."""
        rows = self.prepared.dataset[SPLIT]
        names = [name for name in ("input_ids", *LABELS) if name in rows.column_names]
        text = json.dumps({name: np.asarray(rows[name], dtype=object).tolist() for name in names}, default=float)
        return hashlib.sha256(f"{len(rows)} {self.where} {text}".encode()).hexdigest()


def open_held_out(
    data: Any,
    task: Task,
    processor: Any,
    config: PretrainedConfig,
    *,
    split: str | None = None,
    samples: int | None = 1000,
    columns: Mapping[str, str] | None = None,
    max_length: int = 128,
    metric: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    seed: int = 42,
    bf16: bool = False,
) -> HeldOut:
    """Takes and tokenises the examples to score candidates on.

    Args:
        data: See [`optimum_flexcompress.data.load_data`].
        task: What the model is for.
        processor: Its tokenizer or image processor.
        config: Its configuration.
        split: The split to take them from; by default `validation`, else `train`.
        samples: How many; all when `None` or where there are no more.
        columns: See [`Task.find_columns`].
        max_length: Longest input in tokens.
        metric: One of the task's metrics, or `"loss"`, the model's own; by default the task's main one.
        batch_size: Rows at a time.
        max_new_tokens: Bound for generated outputs.
        seed: Of the draw. From `train`, [`hold_out`] takes the same rows.
        bf16: Whether PyTorch models compute in bfloat16.

    Returns:
        The examples.

    Raises:
        FlexCompressError: There is no such split, none but a test split, no labels, or no such metric.
    """
    if samples is not None and samples < 1:
        raise FlexCompressError(f"samples is {samples}: score on at least 1 example.")
    loaded = load_data(data)
    name = _split(loaded, split)
    rows = DatasetDict({SPLIT: take(loaded[name], samples, seed)})
    prepared = task.prepare(
        rows,
        processor,
        max_length=max_length,
        columns=columns,
        label_names=_label_names(loaded, task, columns) if names_of_model(config) is None else None,
        model=config,
    )
    if SPLIT not in prepared.dataset:
        raise FlexCompressError(f"The split {name!r} has no labels: choose another one with split.")
    if prepared.label_names is not None and len(prepared.label_names) > config.num_labels:
        raise FlexCompressError(
            f"The data set has {len(prepared.label_names)} classes, but the model has a head for {config.num_labels}: "
            "search a model that was trained for this data set."
        )
    loss = metric == LOSS
    return HeldOut(
        prepared=prepared,
        where=f"{len(rows[SPLIT])} of the {len(loaded[name])} examples of {name}, drawn with seed {seed}"
        if len(rows[SPLIT]) < len(loaded[name])
        else f"all {len(loaded[name])} examples of {name}",
        metric=metric or prepared.main_metric,
        greater_is_better=False if loss or metric in _LOWER else prepared.greater_is_better,
        unit="" if metric not in (None, prepared.main_metric) else prepared.unit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        bf16=bf16,
    )


def _split(data: DatasetDict, split: str | None) -> str:
    if split is not None:
        return select_split(data, split)
    for name in ("validation", "train"):
        if name in data:
            return name
    raise FlexCompressError(
        f"The data set has no split but {', '.join(data)}, which should see the chosen configurations only: give one "
        f'with training examples, or say split="{next(iter(data))}" (--split) to search on it all the same.'
    )


def _label_names(data: DatasetDict, task: Task, columns: Mapping[str, str] | None) -> list[str] | None:
    """The classes of the whole data set, of which a few examples may not show all."""
    column = class_column(task.find_columns(data, columns))
    return None if column is None else LabelMap(without_unlabelled(data, column), column).names
