"""Names of tasks, and the task a model folder tells."""

from __future__ import annotations

import json

import pytest
import transformers

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.tasks import TASKS, get_task, infer_task


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_knows_its_classes(name):
    task = get_task(name)
    assert task.name == name
    assert task.auto_class is getattr(transformers, task.auto_class_name)
    assert hasattr(task.ort_class, "from_pretrained")
    assert get_task(task) is task


def test_synonyms_and_unknown_names():
    assert get_task("summarization").name == "text2text-generation"
    with pytest.raises(FlexCompressError, match='Did you mean "text-classification"'):
        get_task("text-clasification")


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("GPT2LMHeadModel", "text-generation"),
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("BertModel", "feature-extraction"),
        ("ViTForImageClassification", "image-classification"),
    ],
)
def test_the_architecture_tells_the_task(tmp_path, architecture, task):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert infer_task(tmp_path) == task
    assert infer_task(tmp_path / "config.json") == task


def test_folders_that_tell_no_task(tmp_path):
    with pytest.raises(FlexCompressError, match=r"no config\.json"):
        infer_task(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FlexCompressError, match="give --task"):
        infer_task(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FlexCompressError, match="not a valid configuration"):
        infer_task(tmp_path)
