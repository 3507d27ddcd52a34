"""The counts of the constraint are those of the model that surgery leaves."""

from __future__ import annotations

import copy

import pytest
import torch

from optimum_flexcompress.architectures import describe
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation.cost import count_macs
from optimum_flexcompress.methods.vib.cost import macs_cost, parameter_cost
from optimum_flexcompress.methods.vib.masks import as_masks
from optimum_flexcompress.methods.vib.probe import sample_inputs
from optimum_flexcompress.structure import count_parameters
from optimum_flexcompress.surgery import select
from tests.methods.vib.helpers import random_masks
from tests.tiny import ALL, build


LENGTH = 9


def _rotary_products(model) -> int:
    """LLaMA multiplies positions and frequencies as matrices, whatever its size."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    return 0 if rotary is None else rotary.inv_freq.numel() * LENGTH


@pytest.mark.parametrize(("family", "name"), ALL)
def test_counts_are_physical(family, name):
    model = build(family, name)
    view = describe(model)
    for seed in range(3):
        masks = random_masks(model, seed)
        costs = [
            parameter_cost(view, masks.layout),
            parameter_cost(view, masks.layout, include_embeddings=True),
            macs_cost(view, masks.layout, LENGTH),
        ]
        small = select(copy.deepcopy(model), as_masks(masks.layout, masks.evaluation_values()).kept())
        counted = count_parameters(small)
        macs = count_macs(small, sample_inputs(view, LENGTH)) - _rotary_products(model)
        expected = [counted["prunable"], counted["prunable"] + counted["embeddings"], macs]
        counts = masks.counts(masks.keep(0.4))
        values = masks.evaluation_values() * 1.0
        units = [
            torch.nonzero(values[part.start : part.stop] * values[part.gate]).flatten()
            for part in masks.layout.sublayers
        ]
        hidden = int((values[: masks.layout.hidden] != 0).sum())
        for cost, wanted in zip(costs, expected, strict=True):
            assert cost.differentiable()(counts).item() == wanted
            assert cost.exact(hidden, units) == wanted
            assert wanted < cost.dense


def test_dense_costs():
    model = build("t5", "T5ForConditionalGeneration")
    view = describe(model)
    layout = random_masks(model).layout
    counted = count_parameters(model)
    assert parameter_cost(view, layout).dense == counted["prunable"]
    assert parameter_cost(view, layout, include_embeddings=True).dense == counted["prunable"] + counted["embeddings"]
    assert macs_cost(view, layout, LENGTH).dense == count_macs(model, sample_inputs(view, LENGTH))


def test_size_gradients_are_the_marginal_costs():
    model = build("gpt2", "GPT2LMHeadModel")
    masks = random_masks(model)
    cost = parameter_cost(describe(model), masks.layout)
    keep = (masks.scores() > 0).float().requires_grad_()
    cost.differentiable()(masks.counts(keep)).backward()
    # One more FFN dim: a column of the first matrix with its bias, a row of the second.
    hidden = int(keep[: masks.layout.hidden].sum())
    part = next(part for part in masks.layout.sublayers if part.kind == "ffn" and keep[part.gate] == 1)
    first = int(keep[part.start : part.stop].argmax()) + part.start
    # Amounts that belong to the sub-layer as a whole are shared among the units that hold it up.
    assert keep.grad[first].item() >= 2 * hidden + 1
    off = int((keep[part.start : part.stop] == 0).nonzero()[0]) + part.start
    assert keep.grad[off].item() == 2 * hidden + 1


def test_too_long_a_sequence_is_refused():
    model = build("bert", "BertModel")
    with pytest.raises(FlexCompressError, match="takes 64 tokens"):
        macs_cost(describe(model), random_masks(model).layout, 65)
