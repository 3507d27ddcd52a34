"""Text classification: one label of several, several labels at once, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import DatasetDict
from transformers import DataCollatorWithPadding, PretrainedConfig, PreTrainedModel

from ..data import training_split
from ..errors import FlexCompressError
from .base import Column, Prepared, Task, effective_length, map_splits, texts
from .labels import LabelMap, flatten, model_config, model_kwargs, without_unlabelled
from .metrics import multi_label_metrics, regression_metrics, single_label_metrics


class TextClassification(Task):
    """`AutoModelForSequenceClassification`.

    The kind of problem is the model's `config.problem_type` where it is set; else regression where the labels are
    fractional numbers, multi-label where they are lists, and single label otherwise.
    """

    name = "text-classification"
    auto_class_name = "AutoModelForSequenceClassification"
    ort_class_path = "optimum.onnxruntime:ORTModelForSequenceClassification"
    main_metric = "accuracy"
    columns = (
        Column("text", ("text", "sentence", "sentence1", "premise", "question1", "review", "content", "query")),
        Column("text_pair", ("text_pair", "sentence2", "hypothesis", "question2"), required=False),
        Column("label", ("label", "labels", "category", "intent", "class", "target", "score", "stars", "rating")),
    )

    def find_columns(self, data: DatasetDict, columns: Mapping[str, str] | None = None) -> dict[str, str]:
        """See [`Task.find_columns`]. `question` and `sentence` beside each other are a pair, as in QNLI."""
        chosen = super().find_columns(data, columns)
        names = training_split(data).column_names
        free = not {"text", "text_pair"} & set(columns or {}) and "text_pair" not in chosen
        if free and chosen["text"] == "sentence" and "question" in names:
            chosen |= {"text": "question", "text_pair": "sentence"}
        return chosen

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
        """See [`Task.prepare`]."""
        chosen = self.find_columns(data, columns)
        label_column = chosen["label"]
        data = without_unlabelled(data, label_column)
        problem = _problem_type(data, label_column, model)
        names = None
        if problem == "regression":
            encode = _number(label_column)
            kwargs: dict[str, Any] = {"num_labels": 1, "problem_type": problem}
        else:
            labels = LabelMap(data, label_column, label_names, model)
            names = labels.names
            encode = _one_hot(labels) if problem == "multi_label_classification" else labels
            kwargs = model_kwargs(names, problem_type=problem)

        for split in data.values():
            for role in ("text", "text_pair"):
                if role in chosen:
                    texts(split, chosen[role])
        length = effective_length(max_length, processor)

        def tokenise(rows: dict[str, list]) -> dict[str, list]:
            pair = rows[chosen["text_pair"]] if "text_pair" in chosen else None
            result = dict(processor(rows[chosen["text"]], pair, truncation=True, max_length=length, padding=False))
            result["labels"] = [encode(value) for value in rows[label_column]]
            return result

        metrics, main = METRICS[problem]
        return Prepared(
            dataset=map_splits(data, tokenise),
            collator=DataCollatorWithPadding(processor),
            compute_metrics=metrics,
            label_names=names,
            main_metric=main,
            unit="" if problem == "regression" else "share",
            model_kwargs=kwargs,
        )


def _problem_type(data: DatasetDict, column: str, model: PreTrainedModel | PretrainedConfig | None) -> str:
    config = model_config(model)
    stated = getattr(config, "problem_type", None)
    if stated is not None:
        return stated
    if config is not None and config.num_labels == 1:
        return "regression"
    first = training_split(data)
    if any(isinstance(value, list | tuple) for value in first[column]):
        return "multi_label_classification"
    if any(isinstance(value, float) and not value.is_integer() for value in flatten(first[column])):
        return "regression"
    return "single_label_classification"


def _number(column: str):
    def encode(value: Any) -> float:
        if not isinstance(value, int | float):
            raise FlexCompressError(f"Column {column!r} has the value {value!r} where regression needs a number.")
        return float(value)

    return encode


def _one_hot(labels: LabelMap):
    def encode(values: Any) -> list[float]:
        if not isinstance(values, list | tuple):
            values = [values]
        vector = [0.0] * len(labels.names)
        for value in values:
            vector[labels(value)] = 1.0
        return vector

    return encode


METRICS = {
    "single_label_classification": (single_label_metrics, "accuracy"),
    "multi_label_classification": (multi_label_metrics, "f1"),
    "regression": (regression_metrics, "pearson"),
}
