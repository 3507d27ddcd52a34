"""How many vectors every matrix of a model meets in one sample, by running one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...architectures import ModelView
from ...errors import FlexCompressError
from ...surgery import hidden_sides


DEFAULT_LENGTH = 128


@dataclass
class Rows:
    """What a sample costs.

    Attributes:
        inside: Vectors that a projection inside the layers multiplies.
        outside: Multiply-accumulates outside the layers: those that do not depend on the width of the residual
            stream, and what is to be multiplied by the width, and by its square, for the others.
    """

    inside: dict[nn.Module, int]
    outside: tuple[int, int, int]


@torch.no_grad()
def module_rows(view: ModelView, sequence_length: int | None) -> Rows:
    """Runs one sample and counts.

    Args:
        view: The model, without masks.
        sequence_length: Tokens of the sample, of source and target each; `None` for 128, or what the model can take
            where that is less. Images have one length only.

    Raises:
        FlexCompressError: The model cannot take so many tokens.
    """
    model = view.model
    rows: dict[nn.Module, int] = {}

    def count(module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
        features = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        rows[module] = rows.get(module, 0) + output.numel() // features

    matrices = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D | nn.Conv2d)}
    handles = [module.register_forward_hook(count) for module in matrices]
    was_training = model.training
    model.eval()
    try:
        model(**sample_inputs(view, sequence_length))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    inside = {module for stack in view.stacks.values() for module in stack.module_list.modules()}
    sides = {id(item): sides for item, sides in hidden_sides(view).values()}
    outside = [0, 0, 0]
    for module, number in rows.items():
        if module not in inside:
            power = len(sides[id(module)])
            outside[power] += number * module.weight.numel() // view.hidden_size**power
    return Rows({module: number for module, number in rows.items() if module in inside}, tuple(outside))


def sample_length(view: ModelView, length: int | None) -> int | None:
    """Tokens of a sample: `length`, or the default that the model can take; `None` for images.

    Raises:
        FlexCompressError: The model cannot take so many tokens.
    """
    if view.model.main_input_name == "pixel_values":
        return None
    limit = getattr(view.model.config, "max_position_embeddings", None)
    if length is None:
        # Some families keep two positions for other uses.
        return DEFAULT_LENGTH if limit is None else min(DEFAULT_LENGTH, limit - 2)
    if limit is not None and length > limit:
        raise FlexCompressError(
            f"sequence_length is {length}, the model takes {limit} tokens at most: give a number up to that."
        )
    return length


def sample_inputs(view: ModelView, length: int | None, batch_size: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass, of source and target in encoder-decoders; see [`sample_length`]."""
    model, config = view.model, view.model.config
    device = next(model.parameters()).device
    length = sample_length(view, length)
    if length is None:
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        dtype = next(model.parameters()).dtype
        return {
            "pixel_values": torch.zeros(batch_size, config.num_channels, height, width, device=device, dtype=dtype)
        }
    # Classification heads of some families look for the end of the sequence.
    ids = torch.full((batch_size, length), _end_token(config), device=device)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "encoder" in view.stacks and "decoder" in view.stacks:
        sample["decoder_input_ids"] = ids
    return sample


def _end_token(config) -> int:
    end = config.eos_token_id
    return int(end[0] if isinstance(end, list) else end or 0)
