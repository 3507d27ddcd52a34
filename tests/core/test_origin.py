"""Original head numbers survive removal after removal, saving and loading."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from optimum_flexcompress import FlexCompressError, ModelStructure
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.kept import Kept, KeptLayer
from optimum_flexcompress.methods.distillation import make_student
from optimum_flexcompress.origin import ORIGIN_KEY, Origin
from optimum_flexcompress.surgery import keep_layers, select
from tests.tiny import build, inputs_for, outputs_of


def test_head_numbers_are_those_of_the_first_model():
    model = build("bert", "BertForSequenceClassification")
    layers = [KeptLayer(0, attention=[1, 2, 3], ffn=[0, 5]), KeptLayer(1, attention=[]), KeptLayer(2)]
    select(model, Kept(range(1, 32), {"encoder": layers}))
    select(model, Kept(None, {"encoder": [KeptLayer(0, attention=[0, 2]), KeptLayer(1), KeptLayer(2)]}))
    keep_layers(model, [0, 2])
    select(model, Kept(None, {"encoder": [KeptLayer(0), KeptLayer(1, attention=[3])]}))
    origin = Origin.of(describe(model))
    assert (origin.hidden_size, origin.stacks["encoder"].heads, origin.stacks["encoder"].ffn) == (
        32,
        [4, 4, 4],
        [40, 40, 40],
    )
    assert [(left.layer, left.heads) for left in origin.stacks["encoder"].left] == [(0, [1, 3]), (2, [3])]
    assert origin.matches(describe(model))


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "LlamaForCausalLM"), ("t5", "T5ForConditionalGeneration"), ("gpt2", "GPT2LMHeadModel")],
)
def test_saved_and_loaded(family, name, tmp_path):
    model = build(family, name)
    groups = describe(model).stacks["decoder"].layers[0].attention.num_kv_heads
    layers = [KeptLayer(0, attention=[groups - 1], cross_attention=[0]), KeptLayer(1), KeptLayer(2, attention=[0])]
    select(model, Kept(None, {"decoder": layers}))
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, name).from_pretrained(tmp_path)
    origin = Origin.of(describe(loaded))
    assert origin == Origin.of(describe(model)) and origin.matches(describe(loaded))
    left = origin.stacks["decoder"].left
    assert [layer.heads for layer in left] == [[groups - 1], list(range(groups)), [0]]
    assert [layer.cross_heads for layer in left] == ([[0], [0, 1, 2, 3], [0, 1, 2, 3]] if family == "t5" else [[]] * 3)
    assert set(origin.stacks) == set(describe(model).stacks)


def test_a_uniform_model_keeps_the_numbers_and_stays_stock(tmp_path):
    model = build("llama", "LlamaForCausalLM")
    select(model, Kept(None, {"decoder": [KeptLayer(index, attention=[1]) for index in range(3)]}))
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert [layer.heads for layer in Origin.of(describe(loaded)).stacks["decoder"].left] == [[1]] * 3
    inputs = inputs_for(model)
    torch.testing.assert_close(outputs_of(loaded, inputs), outputs_of(model.eval(), inputs))


def test_models_that_lose_whole_layers_or_are_made_anew_have_no_entry():
    model = build("bert", "BertForSequenceClassification")
    assert not hasattr(keep_layers(copy.deepcopy(model), [0, 2]).config, ORIGIN_KEY)
    pruned = select(
        copy.deepcopy(model), Kept(None, {"encoder": [KeptLayer(0, attention=[2]), *map(KeptLayer, (1, 2))]})
    )
    structure = ModelStructure.of(pruned)
    assert not hasattr(make_student(model, structure=structure).config, ORIGIN_KEY)
    # Its leading heads are no longer those that the entry names.
    smaller = select(
        copy.deepcopy(pruned), Kept(None, {"encoder": [KeptLayer(0), KeptLayer(1, attention=[3]), KeptLayer(2)]})
    )
    assert not hasattr(make_student(pruned, structure=ModelStructure.of(smaller)).config, ORIGIN_KEY)


def test_a_damaged_entry():
    model = build("bert", "BertForSequenceClassification")
    setattr(model.config, ORIGIN_KEY, {"hidden_size": 32, "stacks": {"encoder": {"heads": [4]}}})
    with pytest.raises(FlexCompressError, match='The entry "pruned_from" of config.json is malformed .*: remove it'):
        Origin.of(describe(model))
