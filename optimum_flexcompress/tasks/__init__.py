"""What a kind of model is for: its Auto class, its data columns, its metrics. One small file for each kind."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FlexCompressError, nearest


if TYPE_CHECKING:
    from .base import Column, Prepared, Task


# Task name -> (module, class). The names are Optimum's own.
TASKS = {
    "text-classification": ("text_classification", "TextClassification"),
    "token-classification": ("token_classification", "TokenClassification"),
    "question-answering": ("question_answering", "QuestionAnswering"),
    "fill-mask": ("fill_mask", "FillMask"),
    "text-generation": ("text_generation", "TextGeneration"),
    "text2text-generation": ("text2text_generation", "Text2TextGeneration"),
    "image-classification": ("image_classification", "ImageClassification"),
    "feature-extraction": ("feature_extraction", "FeatureExtraction"),
}
SYNONYMS = {
    "sequence-classification": "text-classification",
    "sentiment-analysis": "text-classification",
    "ner": "token-classification",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "summarization": "text2text-generation",
    "translation": "text2text-generation",
    "seq2seq-lm": "text2text-generation",
    "sentence-similarity": "feature-extraction",
}
# What a class name in `config.json`'s "architectures" ends with -> task. The first match counts.
CLASS_ENDINGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForImageClassification": "image-classification",
    "Model": "feature-extraction",
}


def get_task(name: str | Task) -> Task:
    """The task of that name.

    Args:
        name: One of `TASKS`, or a usual synonym; a `Task` is returned as it is.

    Returns:
        The task.

    Raises:
        FlexCompressError: The name is not known.
    """
    if not isinstance(name, str):
        return name
    known = SYNONYMS.get(name, name)
    if known not in TASKS:
        raise FlexCompressError(f"{name!r} is not a task.{nearest(name, TASKS)}")
    module, class_name = TASKS[known]
    return getattr(importlib.import_module(f".{module}", __name__), class_name)()


def infer_task(folder: str | os.PathLike) -> str:
    """The task that a model folder was made for, read from the `architectures` of its `config.json`.

    Args:
        folder: A model folder, or a model file in one.

    Returns:
        A key of `TASKS`.

    Raises:
        FlexCompressError: The folder is no model, or its architecture tells no task.
    """
    folder = Path(folder)
    config_file = (folder.parent if folder.is_file() else folder) / "config.json"
    if not config_file.is_file():
        raise FlexCompressError(f"{folder} is no model folder: it holds no config.json.")
    try:
        architectures = json.loads(config_file.read_text(encoding="utf-8")).get("architectures") or []
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise FlexCompressError(f"{config_file} is not a valid configuration file ({error}).") from error
    for architecture in architectures:
        for ending, task in CLASS_ENDINGS.items():
            if architecture.endswith(ending):
                return task
    raise FlexCompressError(
        f"{config_file} does not tell what the model is for (architectures: {architectures}): give --task, one of "
        f"{', '.join(sorted(TASKS))}."
    )


def has_head(auto_class: Any, config: Any) -> bool:
    """Whether a model with this configuration was saved by the class that `auto_class` would load it with."""
    classes = auto_class._model_mapping.get(type(config), ())
    classes = classes if isinstance(classes, (tuple, list)) else (classes,)
    return any(cls.__name__ in (config.architectures or ()) for cls in classes)


def __getattr__(name: str):
    if name in ("Task", "Prepared", "Column"):
        return getattr(importlib.import_module(".base", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["TASKS", "Column", "Prepared", "Task", "get_task", "has_head", "infer_task"]
