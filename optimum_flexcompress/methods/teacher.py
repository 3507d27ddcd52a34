"""The teacher: whether it fits the student, and how it runs."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import FlexCompressError, UnsupportedArchitectureError
from ..structure import count_parameters
from .base import Needs, Step
from .capture import Capture, eager_attention


# A sentence that tells apart tokenizers of equal vocabularies: case, accents, digits, spacing.
_PROBE = "Naïve tokenizers DIFFER here:  1,234 words, don't they?"


def unwrap_peft(model: Any) -> Any:
    """The Transformers model below a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def require_teacher(teacher: PreTrainedModel | None, method: str) -> PreTrainedModel:
    """Raises [`FlexCompressError`] where there is no teacher."""
    if teacher is None:
        raise FlexCompressError(f'The method "{method}" learns from a teacher: pass teacher_model=... to the trainer.')
    return teacher


def _vocabulary_size(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    return getattr(config, "vocab_size", None)


def _size(model: PreTrainedModel) -> int:
    """Parameters without heads and poolers, which two models may differ in without one being the smaller."""
    try:
        counts = count_parameters(model)
    except UnsupportedArchitectureError:
        # Logits can be distilled between models of any family.
        return sum(parameter.numel() for parameter in model.base_model.parameters())
    return counts["embeddings"] + counts["prunable"]


def check_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
) -> None:
    """Says whether a teacher can teach a student at all.

    Args:
        student: The model that is trained.
        teacher: The model it learns from.
        student_tokenizer: What the batches are made with.
        teacher_tokenizer: What the teacher was trained with; looked for in the folder it was loaded from when `None`.

    Raises:
        FlexCompressError: They are the same object, the student is the bigger one, or their inputs mean different
            things.
    """
    if unwrap_peft(teacher) is unwrap_peft(student):
        raise FlexCompressError("teacher_model is the model that is trained: pass a copy of it (copy.deepcopy).")
    sizes = [_size(unwrap_peft(model)) for model in (student, teacher)]
    if sizes[0] > sizes[1]:
        raise FlexCompressError(
            f"The student is bigger than its teacher ({sizes[0]:,} against {sizes[1]:,} parameters in embeddings and layers): "
            "swap model and teacher_model, or make a smaller student with make_student."
        )
    vocabularies = [_vocabulary_size(model) for model in (student, teacher)]
    if vocabularies[0] != vocabularies[1]:
        raise FlexCompressError(
            f"The vocabularies differ (student {vocabularies[0]}, teacher {vocabularies[1]}): the teacher would "
            "misread the student's token ids; use two models with the same tokenizer."
        )
    if teacher_tokenizer is None:
        teacher_tokenizer = _tokenizer_beside(teacher)
    tokenizers = (student_tokenizer, teacher_tokenizer)
    if all(isinstance(tokenizer, PreTrainedTokenizerBase) for tokenizer in tokenizers):
        same = student_tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
        if not same or student_tokenizer(_PROBE)["input_ids"] != teacher_tokenizer(_PROBE)["input_ids"]:
            raise FlexCompressError(
                "The tokenizers of student and teacher differ: the teacher would misread the student's token ids; use "
                "the teacher's tokenizer as processing_class, or another teacher."
            )


def _tokenizer_beside(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model that was loaded from a local folder, if there is one."""
    folder = Path(model.config._name_or_path) if model.config._name_or_path else None
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder)


def check_labels(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises [`FlexCompressError`] unless the heads of both models speak of the same labels in the same order."""
    counts = [model.config.num_labels for model in (student, teacher)]
    if counts[0] != counts[1]:
        raise FlexCompressError(
            f"The student has {counts[0]} labels, the teacher {counts[1]}: logits can only be compared label by "
            "label; load the student with the teacher's num_labels and id2label."
        )
    names = [model.config.id2label for model in (student, teacher)]
    unnamed = {index: f"LABEL_{index}" for index in range(counts[0])}
    if names[0] != names[1] and unnamed not in names:
        index = next(i for i in range(counts[0]) if names[0].get(i) != names[1].get(i))
        raise FlexCompressError(
            f'Label {index} is "{names[0].get(index)}" in the student and "{names[1].get(index)}" in the teacher: '
            "load the student with the teacher's id2label and label2id."
        )


class Teacher:
    """Runs a teacher on the student's batches, without gradients.

    Args:
        model: The teacher; put in evaluation mode.
        needs: What is read from it.
        label_names: Inputs that are labels: not passed on.
    """

    def __init__(self, model: PreTrainedModel, needs: Needs, label_names: list[str]):
        self.model = model.eval()
        self._needs = needs
        self._capture = Capture(needs.teacher_projections)
        self._label_names = set(label_names) | {"labels", "num_items_in_batch"}
        # Without its head the teacher of a language model is spared the product with the whole vocabulary.
        self._runner = model if needs.teacher_logits else model.base_model
        parameters = inspect.signature(self._runner.forward).parameters.values()
        self._accepts = {parameter.name for parameter in parameters}

    def attach(self) -> None:
        self._capture.attach()

    def detach(self) -> None:
        self._capture.detach()

    @torch.no_grad()
    def run(self, step: Step) -> None:
        """Fills `teacher_outputs` and `teacher_captured` of the step."""
        inputs = {
            name: value
            for name, value in step.inputs.items()
            if name in self._accepts and name not in self._label_names
        }
        if "decoder_input_ids" in self._accepts and "decoder_input_ids" not in inputs:
            prepare = getattr(step.model, "prepare_decoder_input_ids_from_labels", None)
            if prepare is not None and "labels" in step.inputs:
                inputs["decoder_input_ids"] = prepare(labels=step.inputs["labels"])
        if self._needs.hidden_states:
            inputs["output_hidden_states"] = True
        if self._needs.attentions:
            inputs["output_attentions"] = True
        if "use_cache" in self._accepts:
            inputs["use_cache"] = False
        attention = eager_attention(self.model) if self._needs.attentions else contextlib.nullcontext()
        self._capture.start()
        with attention:
            step.teacher_outputs = self._runner(**inputs, return_dict=True)
        step.teacher_captured = self._capture.stop()
