"""Distillation while layers drop tokens by one fixed configuration: logits can be compared then, layers cannot."""

from __future__ import annotations

import pytest
import torch

from optimum_flexcompress import DistillationConfig, LengthAdaptiveConfig, MiniLMConfig, lengths_of, set_lengths
from optimum_flexcompress.errors import FlexCompressError
from tests.methods.length_adaptive.runs import train
from tests.methods.toys import assert_same, data_of, model_of, twin, weights


FIXED = LengthAdaptiveConfig(lengths=[6, 3])
COMPARING = [
    MiniLMConfig(relation_heads=4),
    MiniLMConfig(version=1),
    DistillationConfig(hidden_states_weight=1.0),
    DistillationConfig(attention_weight=1.0),
]


@pytest.fixture
def pair():
    return model_of("bert", layers=2), model_of("bert", layers=4, seed=1)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("config", COMPARING, ids=["minilm", "minilm v1", "hidden states", "attention"])
def test_layers_cannot_be_compared(tmp_path, pair, config, order):
    model, teacher = pair
    message = rf"{config.method_type} compares .* token by token, .* distil first and set the lengths afterwards"
    with pytest.raises(FlexCompressError, match=message):
        train(tmp_path, model, data_of("bert"), *[FIXED, config][::order], teacher=teacher)
    assert lengths_of(model) is None


def test_lengths_that_were_set_before_are_no_different(tmp_path, pair):
    model, teacher = pair
    with pytest.raises(FlexCompressError, match="minilm compares"):
        train(tmp_path, set_lengths(model, [6, 3]), data_of("bert"), COMPARING[0], teacher=teacher)


def test_length_adaptive_training_compares_at_full_lengths(tmp_path, pair):
    model, teacher = pair
    methods = [LengthAdaptiveConfig(), COMPARING[0]]
    expected = train(tmp_path, twin(model), data_of("bert"), *methods, teacher=teacher)
    actual = train(tmp_path, set_lengths(twin(model), [6, 3]), data_of("bert"), *methods, teacher=teacher)
    assert_same(weights(expected.model), weights(actual.model))


def test_logits_can_be_compared(tmp_path, pair):
    model, teacher = pair
    trainer = train(tmp_path, model, data_of("bert"), DistillationConfig(), FIXED, teacher=teacher)
    assert lengths_of(trainer.model).values == (6, 3)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
