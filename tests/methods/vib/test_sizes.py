"""The exact search of final sizes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel

from optimum_flexcompress import ModelStructure, VIBPruningConfig
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.methods.vib.cost import macs_cost, parameter_cost
from optimum_flexcompress.methods.vib.masks import as_masks
from optimum_flexcompress.methods.vib.sizes import Scores, choose_sizes, threshold_sizes
from optimum_flexcompress.methods.vib.target import Target
from optimum_flexcompress.structure import count_parameters
from optimum_flexcompress.surgery import select, with_weights
from tests.methods.vib.helpers import config_of, layout_of
from tests.tiny import build


_BART = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def _model():
    return BertModel(
        BertConfig(vocab_size=50, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, intermediate_size=512)
    )


def _scores(layout, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(layout.size, generator=generator) + 0.5
    scores[layout.gates] += 2
    return scores


@pytest.mark.parametrize("align", [1, 8, 16, 32])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("macs", [False, True])
def test_the_request_is_met_in_aligned_sizes(align, sparsity, macs):
    model = _model()
    layout = layout_of(model)
    cost = (macs_cost if macs else parameter_cost)(describe(model), layout)
    wanted = round((1 - sparsity) * cost.dense)
    selection = choose_sizes(cost, Scores.of(layout, _scores(layout)), wanted, align)
    assert abs(selection.cost - wanted) <= 0.01 * wanted
    small = select(copy.deepcopy(model), as_masks(layout, selection.values(layout)).kept())
    structure = ModelStructure.of(small)
    if not macs:
        assert count_parameters(small)["prunable"] == selection.cost
    assert structure.hidden_size % align == 0
    for layer in structure.stacks["encoder"].layers:
        assert layer.ffn is None or layer.ffn % align == 0
        assert layer.attention is None or layer.attention.heads * 16 % align == 0


def test_the_best_scores_stay():
    model = _model()
    layout = layout_of(model)
    cost = parameter_cost(describe(model), layout)
    scores = Scores.of(layout, _scores(layout))
    selection = choose_sizes(cost, scores, round(0.4 * cost.dense), 1)
    assert scores.hidden[selection.hidden].min() >= np.delete(scores.hidden, selection.hidden).max()
    for kind in ("attention", "ffn"):
        kept, gone = [], []
        for part, values, units in zip(layout.sublayers, scores.units, selection.units, strict=True):
            if part.kind == kind:
                kept += values[units].tolist()
                gone += np.delete(values, units).tolist()
        assert min(kept) >= max(gone)


def test_sizes_that_already_fit_are_left_alone():
    model = _model()
    layout = layout_of(model)
    cost = parameter_cost(describe(model), layout)
    scores = Scores.of(layout, _scores(layout))
    selection = threshold_sizes(cost, scores, 1)
    assert set(selection.hidden) == set(np.flatnonzero(scores.hidden > 0))
    for values, units in zip(scores.units, selection.units, strict=True):
        assert set(units) == set(np.flatnonzero(values > 0))


def test_every_stack_keeps_an_attention():
    model = build("t5", "T5ForConditionalGeneration")
    layout = layout_of(model)
    cost = parameter_cost(describe(model), layout)
    scores = -torch.rand(layout.size) - 1
    selection = threshold_sizes(cost, Scores.of(layout, scores), 1)
    kinds = {(p.stack, p.kind) for p, units in zip(layout.sublayers, selection.units, strict=True) if len(units)}
    assert {("encoder", "attention"), ("decoder", "attention"), ("decoder", "cross_attention")} <= kinds
    select(model, as_masks(layout, selection.values(layout)).kept())


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "gpt2", "llama", "t5", "t5-gated-untied", "bart", "vit"]
)
def test_uniform_sizes_load_without_the_package(family):
    names = {
        "gpt2": "GPT2LMHeadModel",
        "llama": "LlamaForCausalLM",
        "t5": "T5ForConditionalGeneration",
        "t5-gated-untied": "T5ForConditionalGeneration",
        "distilbert": "DistilBertModel",
        "vit": "ViTModel",
        "bert": "BertModel",
        "roberta": "RobertaModel",
    }
    if family == "bart":
        model = BartForConditionalGeneration(BartConfig(**_BART)).eval()
    else:
        model = build(family, names[family])
    target = Target(config_of(uniform=True, target_sparsity=0.4), model)
    layout = target.layout
    assert ("hidden" in layout.kinds) == (family != "t5")
    scores = torch.where(layout.active(), _scores(layout), torch.inf)
    selection = target.select(scores, 0.4)
    assert target.meets(selection, 0.4)
    select(model, as_masks(layout, selection.values(layout)).kept())
    assert not hasattr(model.config, "quantization_config")
    assert ModelStructure.of(model).is_uniform
    assert count_parameters(model)["prunable"] == selection.cost
    rebuilt = type(model)(model.config)
    rebuilt.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_sparsity": 0.999}, r"cannot be reached with align=1.*nearest is 0\.9[0-9]+"),
        ({"target_sparsity": 0.98, "align": 16}, r"cannot be reached with align=16.*nearest is 0\.[0-9]+"),
        (
            {"target_sparsity": 0.6, "prune": ["heads"]},
            r"nearest is 0\.5533; ask for that, or add .* or ffn or .* to prune\.",
        ),
        (
            {"target_sparsity": None, "target_macs": 0.02, "align": 16},
            r"multiply-accumulates \(0\.0200 of all\) cannot be reached with align=16.*nearest is [0-9,]+ multiply",
        ),
        ({"target_sparsity": 0.02, "prune": ["sublayers"]}, "nearest is 0.0000; add hidden or heads or ffn to prune"),
        ({"target_sparsity": 0.999, "uniform": True}, "uniform=True and .*; ask for that, or leave out uniform=True"),
    ],
)
def test_unreachable_targets_name_the_nearest(settings, message):
    model = build("bert", "BertModel")
    target = Target(config_of(**settings), model)
    with pytest.raises(FlexCompressError, match=message) as caught:
        target.check_reachable()
    assert "smaller align" not in str(caught.value) or settings.get("align", 1) > 1


def test_a_mask_on_the_whole_takes_the_whole():
    model = build("bert", "BertModel")
    target = Target(config_of(target_sparsity=0.4, prune=["sublayers"]), model)
    scores = torch.where(target.layout.active(), _scores(target.layout), torch.inf)
    selection = target.select(scores, 0.4)
    kept = [len(units) for units in selection.units]
    assert 0 in kept and all(count in (0, part.units) for count, part in zip(kept, target.layout.sublayers))


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.3, 0.35])
def test_uniform_sizes_of_two_stacks_far_from_what_the_masks_want(sparsity):
    model = BartForConditionalGeneration(BartConfig(**_BART))
    target = Target(config_of(uniform=True, target_sparsity=sparsity, prune=["heads", "ffn"]), model)
    selection = target.select(torch.where(target.layout.active(), 1.0, torch.inf), sparsity)
    assert target.meets(selection, sparsity)


def _without_a_head() -> BertModel:
    """A model whose first layer has one head less."""
    model = build("bert", "BertModel")
    layout = layout_of(model)
    values = torch.ones(layout.size)
    values[layout.sublayers[0].start] = 0
    return select(model, as_masks(layout, values).kept())


def test_models_without_weights_can_be_asked():
    """As a recipe asks before any stage has run."""
    model = _without_a_head()
    made = with_weights(copy.deepcopy(model).to("meta"))
    assert made.device.type == "cpu" and ModelStructure.of(made) == ModelStructure.of(model)
    assert with_weights(model) is model


def test_targets_in_macs():
    model = build("bert", "BertModel")
    dense = Target(config_of(target_sparsity=None, target_macs=0.5, sequence_length=9), model).cost.dense
    assert Target(config_of(target_sparsity=None, target_macs=dense // 4, sequence_length=9), model).sparsity == (
        pytest.approx(0.75, abs=1e-4)
    )
    with pytest.raises(FlexCompressError, match="give a smaller number"):
        Target(config_of(target_sparsity=None, target_macs=dense + 1, sequence_length=9), model)


def test_models_of_unlike_layers_cannot_become_uniform():
    model = _without_a_head()
    with pytest.raises(FlexCompressError, match="layers are all alike"):
        Target(config_of(uniform=True), model)


def test_a_sublayer_without_units_goes_without_a_mask_of_its_own():
    model = build("bert", "BertModel")
    layout = layout_of(model, VIBPruningConfig(target_sparsity=0.5).prune)
    cost = parameter_cost(describe(model), layout)
    assert not layout.active()[layout.gates].any()
    scores = torch.where(layout.active(), 1.0, torch.inf)
    gone = layout.sublayers[-1]
    scores[gone.start : gone.stop] = -1.0
    split = Scores.of(layout, scores)
    selection = threshold_sizes(cost, split, 1)
    assert [len(units) for units in selection.units] == [*(part.units for part in layout.sublayers[:-1]), 0]
