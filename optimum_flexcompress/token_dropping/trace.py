"""Which tokens a model keeps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import describe
from .model import dropping_stack, installed


@torch.no_grad()
def kept_positions(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> list[list[list[int]]]:
    """Runs the encoder of a model and notes which tokens are left after each layer.

    Args:
        model: The model, with the lengths that it runs with; one without lengths keeps every token.
        inputs: A batch. Of an encoder-decoder model only the encoder runs.

    Returns:
        For each layer and each sample the positions in the input, in the order of the text, without padding.

    Raises:
        FlexCompressError: The model cannot drop tokens.
    """
    view = describe(model)
    stack = dropping_stack(view)
    encoder = view.base.get_encoder() if model.config.is_encoder_decoder else model
    accepted = inspect.signature(encoder.forward).parameters.keys() - {"labels"}
    batch = {name: value.to(model.device) for name, value in inputs.items() if name in accepted}

    shape: list[int] = []
    left: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def note_shape(module: nn.Module, args: tuple) -> None:
        shape[:] = args[0].shape[:2]

    def watch(layer: int, positions: torch.Tensor | None, valid: torch.Tensor | None) -> None:
        left[layer] = (positions, valid)

    dropper = installed(view)
    handle = stack.layers[0].module.register_forward_pre_hook(note_shape)
    was_training = model.training
    model.eval()
    try:
        if dropper is not None:
            dropper.watch = watch
        encoder(**batch)
    finally:
        model.train(was_training)
        handle.remove()
        if dropper is not None:
            dropper.watch = None

    everything = torch.arange(shape[1]).expand(shape)
    mask = batch.get("attention_mask", torch.ones(shape)).bool()
    kept = []
    for layer in stack.layers:
        # Layers before the first that drops are not watched.
        positions, valid = left.get(layer.index, (None, mask))
        positions = everything if positions is None else positions.cpu()
        valid = torch.ones(positions.shape, dtype=torch.bool) if valid is None else valid.cpu()
        # Where a sample keeps fewer than the longest of its batch, the gap has a position behind the input.
        valid = valid & (positions < shape[1])
        kept.append([row[keep].tolist() for row, keep in zip(positions, valid, strict=True)])
    return kept
