"""Image classification, and feature extraction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTImageProcessor

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.tasks.feature_extraction import cosines, mean_pool, similarity_correlation
from tests.tasks.toys import reviews, splits, word_tokenizer
from tests.tiny import build


def images():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 0)]
    return splits(
        test={"img": [Image.new("RGB", (20, 12), colour) for colour in colours], "label": ["r", "g", "b", "r"]}
    )


def test_images_survive_a_trainer(tmp_path):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    prepared = get_task("image-classification").prepare(images(), processor)
    assert prepared.label_names == ["b", "g", "r"]
    batch = prepared.collator([prepared.dataset["test"][i] for i in range(4)])
    expected = processor(Image.new("RGB", (20, 12), (255, 0, 0)), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][0], expected)
    # The Trainer drops every column that the model's forward does not name.
    trainer = Trainer(
        build("vit", "ViTForImageClassification"),
        TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True),
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
    )
    assert 0 <= trainer.evaluate(prepared.dataset["test"])["eval_accuracy"] <= 1


def test_a_column_without_images():
    with pytest.raises(FlexCompressError, match="needs a column 'image'"):
        get_task("image-classification").prepare(reviews(), None)


def test_mean_pooling_ignores_padding():
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    pooled = mean_pool(hidden, mask)
    assert torch.allclose(pooled[0], hidden[0, :2].mean(0)) and torch.allclose(pooled[1], hidden[1].mean(0))
    hidden[0, 2:] = 1e6
    assert torch.equal(mean_pool(hidden, mask)[0], pooled[0])


def test_similarity_does_not_depend_on_width_or_rotation():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(20, 6))
    rotation, _ = np.linalg.qr(generator.normal(size=(6, 6)))
    wide = np.concatenate([3 * vectors @ rotation, np.zeros((20, 2))], axis=1)
    assert similarity_correlation(vectors, wide) == pytest.approx(1.0)
    assert similarity_correlation(vectors, generator.normal(size=(20, 8))) < 0.5
    assert cosines(vectors, 2 * vectors) == pytest.approx(np.ones(20))
    assert cosines(vectors, -vectors) == pytest.approx(-np.ones(20))


def test_features_need_no_labels():
    prepared = get_task("feature-extraction").prepare(reviews(), word_tokenizer())
    assert "labels" not in prepared.dataset["train"].column_names
    vectors = np.random.default_rng(0).normal(size=(5, 4))
    metrics = prepared.compute_metrics(EvalPrediction(vectors, vectors * 2))
    assert metrics[prepared.main_metric] == pytest.approx(1.0) and metrics["cosine_min"] == pytest.approx(1.0)
    narrow = prepared.compute_metrics(EvalPrediction(vectors[:, :2], vectors))
    assert set(narrow) == {"similarity"}
