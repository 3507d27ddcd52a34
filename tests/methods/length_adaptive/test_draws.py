"""LengthDrop and LayerDrop."""

from __future__ import annotations

import collections

import pytest
import torch

from optimum_flexcompress import FlexCompressConfig, FlexCompressError, Kept, KeptLayer, LengthAdaptiveConfig, select
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.methods.length_adaptive import SubModel, draw_sub_model, smallest_sub_model
from tests.methods.toys import model_of


def stack_of(family: str = "bert", layers: int = 6):
    return describe(model_of(family, layers=layers)).stacks["encoder"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(6, [308, 247, 198, 159, 128, 103]), (12, [308, 247, 198, 159, 128, 103, 83, 67, 54, 44, 36, 29])],
)
def test_the_smallest_sub_model_of_the_paper(layers, expected):
    sub_model = smallest_sub_model(stack_of(layers=layers), 0.2)
    assert sub_model.counts(384) == expected
    assert sub_model.counts(2) == [2] * layers
    assert sub_model.counts(1) == [1] * layers
    assert smallest_sub_model(stack_of(layers=4), 0.9).counts(100) == [10, 2, 2, 2]
    assert sub_model.fractions(layers).values == pytest.approx([0.8 ** (i + 1) for i in range(layers)])


def test_lengths_are_uniform_between_the_bounds():
    seen = collections.Counter()
    stack = stack_of(layers=2)
    for seed in range(4000):
        first, second = draw_sub_model(stack, 0.2, 0.0, generator(seed)).counts(10)
        assert first in (8, 9, 10)
        # ceil(0.8 * l) .. l
        assert second in {8: (7, 8), 9: (8, 9), 10: (8, 9, 10)}[first]
        seen[first, second] += 1
    for first, seconds in {8: (7, 8), 9: (8, 9), 10: (8, 9, 10)}.items():
        for second in seconds:
            expected = 4000 / 3 / len(seconds)
            assert abs(seen[first, second] - expected) < 5 * expected**0.5, (first, second)


def test_layers_are_skipped_with_the_probability_asked_for():
    stack = stack_of(layers=5)
    counts = collections.Counter()
    for seed in range(2000):
        sub_model = draw_sub_model(stack, 0.2, 0.3, generator(seed))
        assert sub_model.layers
        assert list(sub_model.layers) == sorted(sub_model.layers)
        counts.update(sub_model.layers)
        lengths = sub_model.counts(100)
        assert len(lengths) == len(sub_model.layers)
        assert all(0.8 * before <= after <= before for before, after in zip([100, *lengths], lengths))
    for layer in range(1, 5):
        assert abs(counts[layer] - 1400) < 5 * (2000 * 0.21) ** 0.5
    assert draw_sub_model(stack, 0.2, 0.3, generator(3)) == draw_sub_model(stack, 0.2, 0.3, generator(3))
    assert draw_sub_model(stack_of(layers=1), 0.2, 0.999, generator(3)).layers == (0,)


def test_the_layer_with_the_position_bias_always_runs():
    stack = stack_of("t5", layers=4)
    drawn = [draw_sub_model(stack, 0.2, 0.9, generator(seed)).layers for seed in range(50)]
    assert all(0 in layers for layers in drawn)
    assert (0,) in drawn


def test_layers_without_attention_drop_nothing():
    model = select(
        model_of("bert", layers=3), Kept(stacks={"encoder": [KeptLayer(0), KeptLayer(1, []), KeptLayer(2)]})
    )
    sub_model = smallest_sub_model(describe(model).stacks["encoder"], 0.5)
    assert sub_model.counts(16) == [8, 8, 4]
    assert sub_model.fractions(3).values == (0.5, 0.5, 0.25)


def test_fractions_of_a_drawn_sub_model():
    sub_model = SubModel((0, 2), frozenset({0, 1, 2}), (0.0, 0.5), 0.2)
    assert sub_model.fractions(3).values == pytest.approx((0.8, 0.8, 0.72))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length_drop": 0.0}, "length_drop is 0.0: give a number above 0 and below 1"),
        ({"length_drop": 1.0}, "length_drop is 1.0"),
        ({"layer_drop": 1.0}, "layer_drop is 1.0: give a number of at least 0 and below 1"),
        ({"layer_drop": "0.2"}, "layer_drop is '0.2'"),
        ({"num_sandwich": -1}, "num_sandwich is -1"),
        ({"num_sandwich": 1.5}, "num_sandwich is 1.5: give an integer"),
        ({"divergence": "backward"}, 'divergence is "backward".*Known: forward, reverse'),
        ({"unit": "count"}, 'Did you mean "counts"'),
        ({"max_length": 1}, "max_length is 1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"lengths": [5, 6]}, "more than the 5 of the layer before"),
        ({"lengths": [5, 0]}, "layer 1 is 0"),
        ({"lengths": "full"}, "keeps all tokens"),
    ],
)
def test_bad_configs(values, message):
    with pytest.raises(FlexCompressError, match=message.replace("(", r"\(")):
        LengthAdaptiveConfig(**values)
    with pytest.raises(FlexCompressError, match=r'"num_sandwitch".*Did you mean "num_sandwich"'):
        FlexCompressConfig(methods=[{"method_type": "length_adaptive", "num_sandwitch": 2}])


def test_config_round_trip(tmp_path):
    config = FlexCompressConfig(methods=[LengthAdaptiveConfig(num_sandwich=3, unit="fractions", max_length=384)])
    config.save_pretrained(tmp_path)
    assert FlexCompressConfig.from_pretrained(tmp_path) == config
    fixed = FlexCompressConfig(methods=[LengthAdaptiveConfig(lengths=[0.5, 0.25])])
    fixed.save_pretrained(tmp_path)
    assert FlexCompressConfig.from_pretrained(tmp_path).methods[0].lengths == [0.5, 0.25]
