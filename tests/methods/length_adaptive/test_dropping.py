"""The dropping encoder against a plain implementation, for every family and head."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from optimum_flexcompress import FlexCompressError, Kept, KeptLayer, keep_layers, select
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.token_dropping import LengthConfig, lengths_of, set_lengths, using_lengths
from tests.methods.length_adaptive import reference
from tests.methods.length_adaptive.families import (
    DECODERS,
    MATRIX,
    assert_close,
    counts_of,
    fractions_of,
    keeps_first,
    length_of,
)
from tests.tiny import build, inputs_for, outputs_of


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# Some families (T5) have no SDPA. Eager models hand their maps over, the others need the second softmax.
IMPLEMENTATIONS = [
    (*entry, kind)
    for entry in MATRIX
    for kind in ("eager", "sdpa")
    if kind == "eager" or getattr(transformers, entry[1])._supports_sdpa
]


@pytest.mark.parametrize("unit", [counts_of, fractions_of])
@pytest.mark.parametrize(("family", "name", "implementation"), IMPLEMENTATIONS)
def test_equals_the_plain_implementation(family, name, unit, implementation):
    model = build(family, name, attn_implementation=implementation)
    inputs = inputs_for(model)
    lengths = unit(family)
    stock = outputs_of(model, inputs)
    expected, survivors = reference.outputs(model, inputs, lengths, keeps_first(family, name))
    assert len(survivors[0][0]) < length_of(family)
    set_lengths(model, lengths)
    actual = outputs_of(model, inputs)
    assert any(not torch.allclose(actual[key], stock[key], atol=1e-3) for key in stock)
    assert_close(actual, expected, inputs, family)
    # And a second time, on a shorter batch, with nothing left over from the first.
    one = {key: value[:1] for key, value in inputs.items()}
    expected, _ = reference.outputs(set_lengths(model, None), one, lengths, keeps_first(family, name))
    set_lengths(model, lengths)
    assert_close(outputs_of(model, one), expected, one, family)


@pytest.mark.parametrize(("family", "name"), MATRIX)
def test_full_lengths_are_the_stock_model(family, name):
    model = build(family, name)
    inputs = inputs_for(model)
    expected, hooks = outputs_of(model, inputs), hooks_of(model)
    total = length_of(family)
    for lengths in ([1.0] * 3, [total] * 3, [500, total, total], "full", None):
        with using_lengths(model, lengths):
            actual = outputs_of(model, inputs)
            if lengths in ([1.0] * 3, "full", None):
                assert hooks_of(model) == hooks
        assert all(torch.equal(actual[key], expected[key]) for key in expected), lengths
    assert hooks_of(model) == hooks


@pytest.mark.parametrize(("family", "name"), [("bert", "BertForTokenClassification"), ("vit", "ViTModel")])
def test_layers_before_the_first_drop_have_no_hooks(family, name):
    model = build(family, name)
    set_lengths(model, [1.0, 1.0, 0.5])
    layers = describe(model).stacks["encoder"].layers
    assert [hooks_of(layer.module) > 0 for layer in layers] == [False, False, True]


@pytest.mark.parametrize("unit", [counts_of, fractions_of])
@pytest.mark.parametrize(("family", "name"), [entry for entry in MATRIX if entry[0] != "vit"])
def test_padding_a_batch_changes_nothing(family, name, unit):
    model = set_lengths(build(family, name), unit(family))
    inputs = inputs_for(model)
    together = outputs_of(model, inputs)
    encoder_only = "decoder_input_ids" not in inputs and model.config.is_encoder_decoder is False
    for row, size in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = {
            key: value[row : row + 1, :size] if key in ("input_ids", "attention_mask") else value[row : row + 1]
            for key, value in inputs.items()
        }
        for key, value in outputs_of(model, alone).items():
            expected = together[key][row : row + 1]
            if encoder_only and expected.dim() > 1 and expected.shape[1] == 9:
                expected = expected[:, :size]
            elif expected.shape != value.shape:  # the decoder of a classifier reads the encoder's input
                expected = expected[:, :size]
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("unit", [counts_of, fractions_of])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "BertModel"),
        ("distilbert", "DistilBertModel"),
        ("vit", "ViTModel"),
        ("t5", "T5EncoderModel"),
        ("bart", "BartModel"),
    ],
)
def test_restore_puts_every_token_back(family, name, unit):
    """Layers that do nothing: then every token must come out where it went in, dropped or not."""
    model = build(family, name)
    inputs = inputs_for(model)
    view = describe(model)
    stack = view.stacks["encoder"]
    for layer in stack.layers:
        for module in (layer.attention.o, layer.ffn.down):
            module.weight.data.zero_()
            if module.bias is not None:
                module.bias.data.zero_()
        if not stack.table.norm_first:
            for norm in (layer.attention.norm, layer.ffn.norm):
                norm.forward = lambda hidden: hidden
    stock = model(**inputs, output_hidden_states=True)
    set_lengths(model, unit(family))
    actual = model(**inputs, output_hidden_states=True)
    key = "encoder_last_hidden_state" if family == "bart" else "last_hidden_state"
    assert torch.equal(actual[key], stock[key])
    key = "encoder_hidden_states" if family == "bart" else "hidden_states"
    assert len(actual[key]) == len(stock[key]) == 4
    for one, other in zip(actual[key][:-1], stock[key][:-1]):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "name"), [("bert", "BertForQuestionAnswering"), ("t5", "T5EncoderModel"), ("vit", "ViTModel")]
)
def test_hidden_states_of_single_layers_are_whole(family, name):
    """Hidden states after layer i are what a model of i + 1 layers returns."""
    model = build(family, name)
    inputs = inputs_for(model)
    lengths = counts_of(family)
    set_lengths(model, lengths)
    for return_dict in (True, False):
        outputs = model(**inputs, output_hidden_states=True, return_dict=return_dict)
        hidden = outputs["hidden_states"] if return_dict else outputs[-1]
        assert [part.shape[1] for part in hidden] == [length_of(family)] * 4
        for index in (0, 1):
            shorter = keep_layers(copy.deepcopy(model), list(range(index + 1)))
            assert lengths_of(shorter).values == tuple(lengths[: index + 1])
            expected = shorter(**inputs, output_hidden_states=True).hidden_states[index + 1]
            if family == "t5":  # what a stack returns went through the final norm
                norm = describe(model).base.encoder.final_layer_norm
                torch.testing.assert_close(norm(hidden[index + 1]), expected)
            else:
                torch.testing.assert_close(hidden[index + 1], expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("t5", "T5ForConditionalGeneration"),
        ("t5-gated-untied", "T5ForConditionalGeneration"),
        ("bart", "BartForConditionalGeneration"),
    ],
)
def test_generation(family, name, beams):
    model = build(family, name)
    inputs = inputs_for(model)
    inputs.pop("decoder_input_ids")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    stock = model.generate(**inputs, **options)
    set_lengths(model, counts_of(family))
    expected = model.generate(**inputs, **options, use_cache=False)
    assert model.generate(**inputs, **options).tolist() == expected.tolist()
    assert expected.tolist() != stock.tolist()
    for row in range(3):
        alone = {key: value[row : row + 1, : 9 - 2 * row] for key, value in inputs.items()}
        assert model.generate(**alone, **options).tolist() == expected[row : row + 1].tolist()


@pytest.mark.parametrize(("family", "name"), MATRIX)
def test_pruned_models_drop_too(family, name):
    """Fewer heads (T5's bias among them), a layer without attention, one without feed-forward network."""
    model = build(family, name)
    stack = next(stack for stack in describe(model).stacks.values() if not stack.is_causal)
    layers = [KeptLayer(0, [1, 2], ffn=[]), KeptLayer(1, []), KeptLayer(2, [0, 1, 3], ffn=range(9))]
    select(model, Kept(stacks={stack.name: layers}))
    inputs = inputs_for(model)
    first, second, third = counts_of(family)
    same_without_it = keep_layers(copy.deepcopy(model), {stack.name: [0, 2]})
    assert hooks_of(set_lengths(same_without_it, [first, third])) > 0
    set_lengths(model, [first, second, third])
    dropper_layers = [hooks_of(layer.module) for layer in describe(model).stacks[stack.name].layers]
    assert dropper_layers[1] <= 2  # hands on mask and tokens, and chooses nothing
    for key, value in outputs_of(model, inputs).items():
        assert value.isfinite().all(), key
    # The heads that are left choose as they did before the others went.
    whole = build(family, name)
    heads = [KeptLayer(0, [1, 2]), KeptLayer(1, [0, 2, 3]), KeptLayer(2, [0, 1, 3])]
    select(whole, Kept(stacks={stack.name: heads}))
    view = describe(whole)
    if view.family != "t5":  # the plain implementation knows no removed columns of the bias
        expected, _ = reference.outputs(whole, inputs, counts_of(family), keeps_first(family, name))
        assert_close(outputs_of(set_lengths(whole, counts_of(family)), inputs), expected, inputs, family)


def test_t5_with_fewer_heads_chooses_by_its_own_columns_of_the_bias():
    """Heads whose output is off, and whose attention is even, choose like heads that are gone."""
    model = build("t5", "T5EncoderModel")
    inputs = inputs_for(model)
    pruned = copy.deepcopy(model)
    select(pruned, Kept(stacks={"encoder": [KeptLayer(i, [0, 3]) for i in range(3)]}))
    narrow = copy.deepcopy(model)
    for layer in describe(narrow).stacks["encoder"].layers:
        # The same heads by hand: the bias loses its columns too, so that no head has to be left out.
        attention = layer.attention.module
        rows = torch.cat([torch.arange(8), torch.arange(24, 32)])
        for part in (attention.q, attention.k, attention.v):
            part.weight.data = part.weight.data[rows]
        attention.o.weight.data = attention.o.weight.data[:, rows]
        attention.n_heads, attention.inner_dim = 2, 16
        if attention.has_relative_attention_bias:
            attention.relative_attention_bias.weight.data = attention.relative_attention_bias.weight.data[:, [0, 3]]
    expected, _ = reference.outputs(narrow, inputs, [7, 4, 2], False)
    assert_close(outputs_of(set_lengths(pruned, [7, 4, 2]), inputs), expected, inputs, "t5")
    uneven = copy.deepcopy(model)
    select(uneven, Kept(stacks={"encoder": [KeptLayer(0, [0, 1, 3]), KeptLayer(1, [3]), KeptLayer(2, [1])]}))
    assert describe(uneven).stacks["encoder"].layers[1].attention.module.pruned_heads
    set_lengths(uneven, [7, 4, 2])
    alone = {key: value[2:, :5] for key, value in inputs.items()}
    together = outputs_of(uneven, inputs)["last_hidden_state"]
    torch.testing.assert_close(outputs_of(uneven, alone)["last_hidden_state"], together[2:, :5], atol=1e-5, rtol=1e-4)


def test_surgery_keeps_lengths():
    model = set_lengths(build("bert", "BertModel"), [7, 5, 3], max_length=9)
    select(model, Kept(range(20), {"encoder": [KeptLayer(0, [0]), KeptLayer(2)]}))
    assert lengths_of(model) == LengthConfig((7, 3), max_length=9)
    assert model.config.length_config["counts"] == [7, 3]
    keep_layers(model, [1, 0])
    assert lengths_of(model).values == (3, 3)


def test_a_copy_drops_by_itself():
    model = set_lengths(build("bert", "BertForTokenClassification"), [7, 5, 3])
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    twin = copy.deepcopy(model)
    assert lengths_of(twin) == lengths_of(model)
    set_lengths(model, None)
    assert torch.equal(outputs_of(twin, inputs)["logits"], expected["logits"])
    set_lengths(twin, None)
    assert torch.equal(outputs_of(twin, inputs)["logits"], outputs_of(model, inputs)["logits"])


def test_lengths_for_one_block_only():
    model = set_lengths(build("bert", "BertModel"), [7, 5, 3])
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    with using_lengths(model, [0.5, 0.5, 0.5]):
        assert lengths_of(model).unit == "fractions"
    assert lengths_of(model).values == (7, 5, 3)
    assert model.config.length_config["counts"] == [7, 5, 3]
    assert torch.equal(outputs_of(model, inputs)["last_hidden_state"], expected["last_hidden_state"])
    with pytest.raises(RuntimeError), using_lengths(model, None):
        raise RuntimeError
    assert lengths_of(model).values == (7, 5, 3)


def test_nothing_of_a_batch_is_held_after_it():
    model = set_lengths(build("bert", "BertForTokenClassification"), [7, 5, 3])
    model(**inputs_for(model))
    dropper = describe(model).stacks["encoder"].module_list._token_dropper
    assert dropper._state is None
    assert dropper._current is None


@pytest.mark.parametrize(("family", "name"), [("bert", "BertForTokenClassification"), ("t5", "T5EncoderModel")])
def test_gradient_checkpointing(family, name):
    inputs = inputs_for(build(family, name))

    def gradients(checkpointing: bool) -> dict:
        model = set_lengths(build(family, name), [7, 5, 3]).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.dropout_rate = 0.0
        for layer in next(iter(describe(model).stacks.values())).layers:
            layer.attention.module.dropout = 0.0 if family == "t5" else layer.attention.module.dropout
            if hasattr(layer.attention.module, "dropout_prob"):
                layer.attention.module.dropout_prob = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        outputs = model(**inputs)
        outputs[0].pow(2).sum().backward()
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, msg=key)


def test_two_forwards_before_a_backward_with_checkpointing_are_refused():
    model = set_lengths(build("bert", "BertForTokenClassification"), [7, 5, 3]).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first = model(**inputs_for(model, seed=0)).logits
    second = model(**inputs_for(model, seed=1)).logits
    with pytest.raises(FlexCompressError, match="backward pass of one batch before"):
        (first.sum() + second.sum()).backward()


@pytest.mark.parametrize(("family", "name"), DECODERS)
def test_decoders_are_refused_with_a_reason(family, name):
    with pytest.raises(FlexCompressError, match=r"decoder, which cannot drop tokens: .* instead"):
        set_lengths(build(family, name), [7, 5, 3])


def test_relative_positions_are_refused_with_a_reason():
    with pytest.raises(FlexCompressError, match=r"relative_key.*absolute positions"):
        set_lengths(build("bert", "BertModel", position_embedding_type="relative_key"), [7, 5, 3])
