"""The space of length configurations, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optimum_flexcompress import FlexCompressError, Kept, KeptLayer, LengthConfig, select, using_lengths
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.evaluation import count_macs
from optimum_flexcompress.search.length_macs import LengthMacs
from tests.methods.length_adaptive.families import MATRIX, length_of
from tests.search.toys import cost, space_of
from tests.tiny import build, inputs_for


def assert_valid(candidate, space) -> None:
    assert len(candidate) == len(space.full)
    assert all(2 <= count <= space.max_length for count in candidate)
    assert list(candidate) == sorted(candidate, reverse=True)
    space.config(candidate)


@pytest.mark.parametrize("max_length", [3, 20, 384])
def test_genes_stand_for_every_candidate_exactly(max_length):
    space = space_of(6, max_length)
    rng = np.random.default_rng(0)
    for _ in range(200):
        candidate = space.random(rng)
        assert_valid(candidate, space)
        genes = space.genes(candidate)
        assert all(space.distributions[name]._contains(value) for name, value in genes.items())
        assert space.decode(genes) == candidate


def test_children_are_valid_and_near_their_parents():
    space = space_of(6, 100)
    rng = np.random.default_rng(0)
    moved = 0
    for _ in range(200):
        one, other = space.random(rng), space.random(rng)
        child = space.mutate(one, rng)
        assert_valid(child, space)
        moved += sum(a != b for a, b in zip(one, child))
        assert_valid(space.cross(one, other), space)
        assert space.cross(one, one) == one
    # Half of the genes are drawn anew; some land where they were.
    assert 0.3 < moved / (200 * 6) < 0.5
    assert space.cross((100,) * 6, (50, 50, 50, 50, 50, 50)) == (75,) * 6


@pytest.mark.parametrize(("layers", "max_length"), [(1, 2), (1, 9), (2, 2), (2, 6), (3, 5)])
def test_size_counts_all_candidates(layers, max_length):
    space = space_of(layers, max_length)
    candidates = list(space.all())
    assert len(candidates) == len(set(candidates)) == space.size
    assert candidates[0] == space.full == (max_length,) * layers
    for candidate in candidates:
        assert_valid(candidate, space)
        assert space.decode(space.genes(candidate)) == candidate


# Twenty-four layers that keep four fifths each cost less than a quarter.
@pytest.mark.parametrize(("layers", "max_length"), [(6, 384), (12, 128), (1, 200), (24, 512)])
def test_the_start_has_equal_steps_in_cost(layers, max_length):
    space = space_of(layers, max_length)
    start = space.start(20)
    assert start[0] == space.full and len(start) == 20 == len(set(start))
    costs = np.array([cost(candidate) for candidate in start])
    share = min(0.25, cost(space._constant(0.8)) / cost(space.full))
    assert np.abs(costs - np.linspace(1, share, 20) * cost(space.full)).max() <= 0.5 * layers
    assert (np.diff(costs) < 0).all()


def test_a_start_with_more_than_there_is():
    assert space_of(1, 4).start(20) == [(4,), (3,), (2,)]
    assert space_of(2, 2).start(5) == [(2, 2)]
    assert space_of(3, 20).start(1) == [(20, 20, 20)]


def test_layers_without_attention_pass_on_what_they_get():
    space = space_of(able=[False, True, False, True], max_length=10)
    assert list(space.distributions) == ["layer_1", "layer_3"]
    rng = np.random.default_rng(0)
    for candidate in [*space.all(), space.random(rng), space.mutate((10, 7, 7, 2), rng)]:
        assert candidate[0] == 10 and candidate[1] == candidate[2]
    assert space.size == len(list(space.all())) == 45
    with pytest.raises(FlexCompressError, match="nothing to search"):
        space_of(able=[False, False])


def test_units():
    assert space_of(max_length=20).config((20, 10, 5)) == LengthConfig((20, 10, 5), "counts", 20)
    fractions = space_of(max_length=20, unit="fractions").config((20, 10, 5))
    assert fractions == LengthConfig((1.0, 0.5, 0.25), "fractions", 20)
    for max_length in (7, 100, 384):
        space = space_of(max_length=max_length, unit="fractions")
        for candidate in map(space.random, [np.random.default_rng(seed) for seed in range(50)]):
            assert tuple(space.config(candidate).at(max_length)) == candidate


# With their padding mask some families weigh the queries in one more small product.
def assert_macs(model, inputs, length, configurations) -> None:
    macs = LengthMacs(describe(model), length, count_macs(model, inputs))
    assert macs([length] * len(configurations[0])) == macs.full
    for counts in configurations:
        for config in (
            LengthConfig(counts, max_length=length),
            LengthConfig(counts, max_length=length).in_fractions(),
        ):
            with using_lengths(model, config):
                counted = count_macs(model, inputs)
            assert counted < macs.full
            heads = sum(layer.attention.num_heads for layer in macs._layers if layer.attention is not None)
            assert 0 <= counted - macs(counts) <= heads * length**2, (counts, config.unit)


@pytest.mark.parametrize(("family", "name"), MATRIX)
def test_closed_form_against_counted(family, name):
    model = build(family, name)
    length = length_of(family)
    inputs = inputs_for(model, batch=1, length=length)
    assert_macs(model, inputs, length, [(length, length, 2), (4, 4, 3), (3, 2, 2), (length, 3, 3)])


def test_closed_form_of_a_pruned_model():
    model = build("bert", "BertForSequenceClassification")
    select(model, Kept(range(20), {"encoder": [KeptLayer(0, [0]), KeptLayer(1, []), KeptLayer(2, [1, 3], range(7))]}))
    inputs = inputs_for(model, batch=1)
    assert [layer.attention is not None for layer in describe(model).stacks["encoder"].layers] == [True, False, True]
    assert_macs(model, inputs, 9, [(6, 6, 3), (9, 9, 2)])
    assert torch.isfinite(model(**inputs).logits).all()
