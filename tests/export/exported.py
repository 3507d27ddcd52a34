"""Tiny models, stock and compressed, and what PyTorch and ONNX Runtime make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from optimum_flexcompress import Kept, KeptLayer, select
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.export.probe import open_session
from tests.tiny import build, is_encoder_decoder


KINDS = ("stock", "compressed")


def unequal(model: PreTrainedModel) -> Kept:
    """Other sizes in every layer: heads, FFN dims, a removed sub-layer each, and a narrower residual stream.

    Decoders of encoder-decoders keep a head of each attention, without which they have no cache to export.
    """
    view = describe(model)
    stacks = {}
    for name, stack in view.stacks.items():
        layers = []
        for index, layer in enumerate(stack.layers):
            groups = layer.attention.num_kv_heads
            keep_all = name == "decoder" and is_encoder_decoder(model)
            attention = [[0, groups - 1], [0] if keep_all else [], [groups - 1]][index]
            kept = KeptLayer(index, sorted(set(attention)), ffn=[range(0, 30, 2), range(7), []][index])
            if layer.cross_attention is not None:
                kept.cross_attention = [[1], [0, 2, 3], [2, 3]][index]
            layers.append(kept)
        stacks[name] = layers
    return Kept(sorted(set(range(view.hidden_size)) - {1, 5, 8, 21}), stacks)


def make(family: str, name: str, kind: str, **overrides) -> PreTrainedModel:
    """A tiny model, of one of `KINDS`."""
    model = build(family, name, **overrides)
    return select(model, unequal(model)) if kind == "compressed" else model


def run(file: Path, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Runs an ONNX file on the inputs that it knows; position ids count the visible tokens, as in generation."""
    session = open_session(file, threads=1)
    inputs = dict(inputs)
    if "attention_mask" in inputs:
        inputs.setdefault("position_ids", (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0))
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["attention_mask"]))
    feeds = {}
    for value in session.get_inputs():
        if value.name in inputs:
            feeds[value.name] = inputs[value.name].numpy()
        else:
            assert value.name.startswith("past_key_values"), value.name
            feeds[value.name] = np.zeros((len(inputs["input_ids"]), value.shape[1], 0, value.shape[3]), np.float32)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds)))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Length of the difference over the length of what was expected."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def generate(model, *, beams: int = 1, left: bool = False, tokens: int = 8) -> torch.Tensor:
    """Generated ids for three prompts, one of them padded."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 64, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    padded = slice(0, 3) if left else slice(4, 7)
    ids[1, padded], mask[1, padded] = 0, 0
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": beams}
    return model.generate(input_ids=ids, attention_mask=mask, **options)
