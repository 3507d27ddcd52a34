"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from datasets import DatasetDict, Image
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import FlexCompressError
from .base import Column, Prepared, Task, load_pretrained
from .labels import LabelMap, model_kwargs, without_unlabelled
from .metrics import single_label_metrics


class ImageClassification(Task):
    """`AutoModelForImageClassification`."""

    name = "image-classification"
    auto_class_name = "AutoModelForImageClassification"
    ort_class_path = "optimum.onnxruntime:ORTModelForImageClassification"
    main_metric = "accuracy"
    columns = (
        Column("image", ("image", "img", "picture", "file", "path")),
        Column("label", ("label", "labels", "category", "class", "fine_label", "target")),
    )

    def load_processor(self, path: Any) -> Any:
        """The image processor."""
        return load_pretrained(transformers.AutoImageProcessor, path)

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
        """See [`Task.prepare`]; `max_length` has no meaning here.

        Rows keep their images, under the name `pixel_values` (a Trainer removes what the model's forward does not
        name); the collator scales and normalises them, so that no copy of the data set in pixels is kept.
        """
        chosen = self.find_columns(data, columns)
        data = without_unlabelled(data, chosen["label"])
        labels = LabelMap(data, chosen["label"], label_names, model)
        prepared = DatasetDict()
        for name, split in data.items():
            ids = [labels(value) for value in split[chosen["label"]]]
            images = split.select_columns([chosen["image"]]).rename_column(chosen["image"], "pixel_values")
            prepared[name] = images.cast_column("pixel_values", Image()).add_column("labels", ids)
        return Prepared(
            dataset=prepared,
            collator=ImageCollator(processor),
            compute_metrics=single_label_metrics,
            label_names=labels.names,
            main_metric="accuracy",
            unit="share",
            model_kwargs=model_kwargs(labels.names),
        )


class ImageCollator:
    """Images to pixels.

    Args:
        processor: The image processor.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["pixel_values"] for row in rows]
        if not all(hasattr(image, "convert") for image in images):
            raise FlexCompressError("The image column holds something that is no image: name another column.")
        batch = dict(self.processor([image.convert("RGB") for image in images], return_tensors="pt"))
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch
