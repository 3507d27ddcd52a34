"""Which models IPEX takes, and a copy of one that can be changed."""

from __future__ import annotations

import tempfile

import torch
from transformers import PreTrainedModel

from ..architectures import describe
from ..errors import FlexCompressError, UnsupportedArchitectureError
from ..tasks import CLASS_ENDINGS


def task_of(model: PreTrainedModel) -> str:
    """What a model is for, by the name of its class.

    Raises:
        FlexCompressError: The name does not tell.
    """
    name = type(model).__name__
    found = next((task for ending, task in CLASS_ENDINGS.items() if name.endswith(ending)), None)
    if found is None:
        raise FlexCompressError(f"The class {name} does not tell the task: give one, such as text-classification.")
    return found


def single_precision_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in single precision, with the attention that it has by default and that can be made int8."""
    with tempfile.TemporaryDirectory(prefix="flexcompress-ipex-") as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=torch.float32)


def check_family(model: PreTrainedModel) -> None:
    """Raises [`UnsupportedArchitectureError`] unless a model is an encoder whose scores are plain scaled products."""
    view = describe(model)
    stacks = list(view.stacks.values())
    alone = len(stacks) == 1 and not stacks[0].is_causal and not getattr(model.config, "is_decoder", False)
    if not alone or stacks[0].table.attention.position_bias is not None:
        raise UnsupportedArchitectureError(
            f"IPEX takes encoders of the families BERT, RoBERTa, DistilBERT and ViT, and {type(model).__name__} is none: "
            "use --backend ort."
        )


def check_attentions(model: PreTrainedModel, seen: int) -> None:
    """Raises [`UnsupportedArchitectureError`] unless all attention went through `scaled_dot_product_attention`.

    Args:
        model: A model that has run.
        seen: How many calls of it there were.
    """
    (stack,) = describe(model).stacks.values()
    expected = sum(layer.attention is not None for layer in stack.layers)
    if seen != expected:
        raise UnsupportedArchitectureError(
            f"{expected - seen} of the attentions of {type(model).__name__} compute more than scaled dot products, "
            "such as relative positions, which IPEX cannot make int8: use a model with absolute positions, or --backend "
            "ort."
        )
