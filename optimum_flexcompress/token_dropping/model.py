"""Sets the lengths of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..architectures import ModelView, StackView, describe
from ..config_sizes import LENGTHS_KEY, QUANT_METHOD, TAG
from ..errors import FlexCompressError
from .dropper import Counts, TokenDropper
from .lengths import LengthConfig


_ATTRIBUTE = "_token_dropper"


def dropping_stack(view: ModelView) -> StackView:
    """The stack whose layers can drop tokens.

    Raises:
        FlexCompressError: The model has none; the message says why and what works instead.
    """
    stack = next((stack for stack in view.stacks.values() if not stack.is_causal), None)
    name = type(view.model).__name__
    if stack is None or getattr(view.model.config, "is_decoder", False):
        raise FlexCompressError(
            f"{name} is a decoder, which cannot drop tokens: every position predicts the next token, and later steps "
            "read the cached keys and values of all positions; make it smaller with distillation into fewer layers, "
            "pruning or int8 quantization instead, or drop tokens in an encoder or encoder-decoder model."
        )
    objection = view.architecture.dropping_objection(view.model.config)
    if objection is not None:
        raise FlexCompressError(f"{name} cannot drop tokens, because {objection}.")
    return stack


def check_lengths(model: PreTrainedModel, lengths: LengthConfig) -> None:
    """Raises [`FlexCompressError`] unless `lengths` suit the encoder of a model."""
    _check(describe(model), lengths)


def _check(view: ModelView, lengths: LengthConfig) -> StackView:
    stack = dropping_stack(view)
    given, count = len(lengths.values), len(stack.layers)
    if given != count:
        raise FlexCompressError(
            f"The lengths are for {given} layer{'s' * (given > 1)}, the {stack.name} of {type(view.model).__name__} "
            f"has {count}: give one length for each layer."
        )
    return stack


def first_token(view: ModelView) -> tuple[bool, bool]:
    """Whether the head (or pooler) reads the first token, and whether it reads that one alone."""
    bare = view.base is view.model
    names = [base.__name__ for base in type(view.model).__mro__]
    # All classes derive from some "...PreTrainedModel": the ending "Model" counts for those without a head only.
    found = [
        alone
        for ending, alone in view.architecture.first_token.items()
        if (ending == "Model") == bare and any(name.endswith(ending) for name in names)
    ]
    return bool(found), any(found)


def install(
    model: PreTrainedModel, lengths: LengthConfig | Counts | None, skip: Collection[int] = ()
) -> TokenDropper | None:
    """Replaces the hooks of a model, and nothing else; [`set_lengths`] also tells the configuration.

    Args:
        model: The model.
        lengths: A configuration, a function from the input length to the counts of the layers that run, or `None`.
        skip: Layers of the encoder that do not run.
    """
    view = describe(model)
    stack = _check(view, lengths) if isinstance(lengths, LengthConfig) else None
    if stack is None and lengths is not None:
        stack = dropping_stack(view)
    _remove(view)
    if stack is None:
        return None
    keep_first, alone = first_token(view)
    dropper = TokenDropper(view, stack, lengths, keep_first=keep_first, restore=not alone, skip=skip)
    setattr(_home(stack), _ATTRIBUTE, dropper)
    return dropper


def _home(stack: StackView) -> nn.Module:
    # On the list of layers, where a model with a head and its base model both find it.
    return stack.module_list


def installed(view: ModelView) -> TokenDropper | None:
    """The hooks of a model, if it has some."""
    found = (getattr(_home(stack), _ATTRIBUTE, None) for stack in view.stacks.values())
    return next((dropper for dropper in found if dropper is not None), None)


def _remove(view: ModelView) -> None:
    for stack in view.stacks.values():
        dropper = getattr(_home(stack), _ATTRIBUTE, None)
        if dropper is not None:
            dropper.remove()
            delattr(_home(stack), _ATTRIBUTE)


def lengths_of(model: PreTrainedModel) -> LengthConfig | None:
    """The length configuration that a model runs with, or `None` where it keeps all tokens."""
    dropper = installed(describe(model))
    return dropper.lengths if dropper is not None and isinstance(dropper.lengths, LengthConfig) else None


def set_lengths(model: PreTrainedModel, lengths: Any, max_length: int | None = None) -> PreTrainedModel:
    """Sets how many tokens each layer of the encoder keeps, from now on.

    The weights stay as they are: any configuration can follow any other. It is written into the model's
    configuration, so that `save_pretrained` keeps it and `from_pretrained` (once `optimum_flexcompress` is imported)
    restores it, or takes another one as `length_config=`.

    Args:
        model: A BERT, RoBERTa, DistilBERT, ViT, T5 or BART model with any head, pruned or not; changed in place.
        lengths: A [`LengthConfig`], a list of counts or of fractions with one entry per layer, or `None` or `"full"`.
        max_length: The input length that counts refer to, to be stored with them.

    Returns:
        The same model.

    Raises:
        FlexCompressError: Lengths that increase, are zero or have the wrong count; a model that cannot drop tokens.
    """
    parsed = LengthConfig.parse(lengths, max_length)
    install(model, parsed)
    if parsed is not None or hasattr(model.config, LENGTHS_KEY):
        write_lengths(model, parsed)
    return model


def write_lengths(model: PreTrainedModel, lengths: LengthConfig | None) -> None:
    """Enters lengths into the model's configuration; `None` makes it one that takes `length_config=` when loaded."""
    setattr(model.config, LENGTHS_KEY, None if lengths is None else lengths.to_dict())
    model.add_model_tags(TAG)
    if not hasattr(model.config, "quantization_config"):
        model.config.quantization_config = {"quant_method": QUANT_METHOD}


@contextlib.contextmanager
def using_lengths(model: PreTrainedModel, lengths: Any) -> Iterator[PreTrainedModel]:
    """Runs a model with other lengths while the block lasts; its configuration stays as it is.

    Args:
        model: The model.
        lengths: As for [`set_lengths`].

    Yields:
        The same model.

    Raises:
        FlexCompressError: As for [`set_lengths`].
    """
    before = installed(describe(model))
    install(model, LengthConfig.parse(lengths))
    try:
        yield model
    finally:
        install(model, before.lengths if before is not None else None, before.skip if before is not None else ())
