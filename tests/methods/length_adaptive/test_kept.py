"""Which tokens a model says it keeps, against dropping written out plainly."""

from __future__ import annotations

import pytest

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.token_dropping import kept_positions, lengths_of, set_lengths
from tests.methods.length_adaptive import reference
from tests.methods.length_adaptive.families import DECODERS, MATRIX, counts_of, fractions_of, keeps_first, length_of
from tests.tiny import build, inputs_for, outputs_of


@pytest.mark.parametrize("choose", [counts_of, fractions_of])
@pytest.mark.parametrize(("family", "name"), MATRIX)
def test_kept_are_those_that_receive_most_attention(family, name, choose):
    model = build(family, name)
    inputs = inputs_for(model)
    _, survivors = reference.outputs(model, inputs, choose(family), keeps_first(family, name))
    set_lengths(model, choose(family))
    before = outputs_of(model, inputs)
    kept = kept_positions(model, inputs)
    assert kept == [list(layer) for layer in zip(*survivors, strict=True)]
    # Looking changes nothing.
    assert all((outputs_of(model, inputs)[key] == value).all() for key, value in before.items())
    assert kept_positions(model, inputs) == kept


@pytest.mark.parametrize("family", ["bert", "vit", "t5", "bart"])
def test_without_dropping_every_token_is_kept(family):
    name = next(name for other, name in MATRIX if other == family)
    model = build(family, name).train()
    inputs = inputs_for(model)
    rows = [list(range(length_of(family)))] * 3
    if "attention_mask" in inputs:
        rows = [list(range(int(row.sum()))) for row in inputs["attention_mask"]]
    assert kept_positions(model, inputs) == [rows] * 3
    # The first layer keeps all; those before a drop are told too.
    set_lengths(model, [1.0, 1.0, 0.5])
    kept = kept_positions(model, inputs)
    assert kept[:2] == [rows] * 2 and all(len(row) == -(-len(all_) // 2) for row, all_ in zip(kept[2], rows))
    assert model.training and lengths_of(model).values == (1.0, 1.0, 0.5)


def test_decoders_have_nothing_to_tell():
    family, name = DECODERS[0]
    model = build(family, name)
    with pytest.raises(FlexCompressError, match="is a decoder, which cannot drop tokens"):
        kept_positions(model, inputs_for(model))
