"""Length configurations: what they mean, what is refused, and how they are kept."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers

from optimum_flexcompress import FlexCompressError, Kept, KeptLayer, ModelStructure, select
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.model_card import write_model_card
from optimum_flexcompress.token_dropping import LengthConfig, lengths_of, set_lengths
from optimum_flexcompress.token_dropping.lengths import kept_of, numerator
from tests.methods.length_adaptive.families import MATRIX, counts_of, fractions_of
from tests.tiny import build, inputs_for, outputs_of


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([7, 8, 2], r"layer 1 is 8, more than the 7 .* fall or stay equal"),
        ([0.5, 0.6, 0.2], r"layer 1 is 0.6, more than the 0.5"),
        ([7, 0, 0], r"layer 1 is 0: counts are whole numbers of at least 1"),
        ([0.5, 0.0, 0.0], r"layer 1 is 0.0: fractions are above 0 and at most 1"),
        ([1.5, 1.0, 0.5], r"layer 0 is 1.5: fractions are above 0"),
        ([128, 0.5, 0.2], r"mix counts and fractions: give whole numbers alone, or fractions of at most 1"),
        ([4, 3.0, 2], r"The lengths \[4, 3.0, 2\] mix counts and fractions"),
        ([7, -1, -2], r"layer 1 is -1"),
        ([True, 1, 1], r"layer 0 is True"),
        (["7", 5, 3], r"layer 0 is '7'"),
        ([float("nan"), 0.5, 0.5], r"layer 0 is nan"),
        ([7, 5], r"for 2 layers, the encoder of BertModel has 3: give one length for each layer"),
        ([7, 5, 3, 2], r"for 4 layers"),
        ([], r"give a count or a fraction for each layer"),
        (7, r"give a list such as"),
        ("7,5,3", r"give a list such as"),
        ({"unit": "count", "counts": [7, 5, 3]}, r'unit "count"|has no "count"'),
        ({"unit": "counts"}, r'has no "counts"'),
        ({"count": [7, 5, 3]}, r'key "count"\. Did you mean "counts"'),
    ],
)
def test_bad_lengths_are_refused_and_change_nothing(lengths, message):
    model = set_lengths(build("bert", "BertModel"), [6, 4, 2])
    with pytest.raises(FlexCompressError, match=message):
        set_lengths(model, lengths)
    assert lengths_of(model).values == (6, 4, 2)
    assert model.config.length_config["counts"] == [6, 4, 2]


def test_units():
    counts = LengthConfig((315, 251, 33), max_length=384)
    assert counts.in_fractions().in_counts() == counts
    assert counts.in_fractions().at(384) == [315, 251, 33]
    assert counts.at(100) == [100, 100, 33]
    assert LengthConfig.parse([1.0, 0.5, 0.25]).at(10) == [10, 5, 3]
    assert LengthConfig.parse([1, 0.5, 0.25]).unit == "fractions"
    assert LengthConfig.parse([1, 1, 1]).unit == "counts"
    assert LengthConfig.parse([np.int64(7), np.int32(5), 3]) == LengthConfig((7, 5, 3))
    assert LengthConfig.parse([np.float32(0.5), np.float64(0.25)]) == LengthConfig((0.5, 0.25), "fractions")
    assert all(type(value) is int for value in LengthConfig.parse([np.int64(7)]).to_dict()["counts"])
    assert LengthConfig.parse("full") is None
    assert LengthConfig.parse(json.loads(json.dumps(counts.to_dict()))) == counts
    assert counts.to_dict()["fractions"] == [315 / 384, 251 / 384, 33 / 384]
    with pytest.raises(FlexCompressError, match="give max_length"):
        LengthConfig((7, 5)).in_fractions()


def test_fractions_round_up_exactly():
    """No float error turns a whole number into the next one, in ints and in tensors."""
    for denominator in (3, 7, 10, 20, 128, 256, 384, 512):
        for part in range(1, denominator + 1):
            for tokens in (1, 2, 9, 20, 128, 256, 384, 511, 512):
                expected = math.ceil(Fraction(part, denominator) * tokens)
                assert kept_of(tokens, numerator(part / denominator)) == expected, (part, denominator, tokens)
    tokens = torch.arange(1, 513)
    assert kept_of(tokens, numerator(0.55)).tolist() == [math.ceil(Fraction(55, 100) * n) for n in range(1, 513)]


@pytest.mark.parametrize("unit", [counts_of, fractions_of])
@pytest.mark.parametrize(("family", "name"), MATRIX)
def test_saved_lengths_are_loaded_and_can_be_replaced(family, name, unit, tmp_path):
    model = build(family, name)
    inputs = inputs_for(model)
    stock = outputs_of(model, inputs)
    set_lengths(model, unit(family), max_length=9)
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert lengths_of(loaded) == lengths_of(model) == LengthConfig.parse(unit(family), 9)
    assert all(torch.equal(value, expected[key]) for key, value in outputs_of(loaded, inputs).items())
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        assert not hasattr(loaded, mark)

    full = type(model).from_pretrained(tmp_path / "model", length_config="full")
    assert lengths_of(full) is None
    assert all(torch.equal(value, stock[key]) for key, value in outputs_of(full, inputs).items())
    full.save_pretrained(tmp_path / "full")
    again = type(model).from_pretrained(tmp_path / "full", length_config=unit(family))
    assert all(torch.equal(value, expected[key]) for key, value in outputs_of(again, inputs).items())
    with pytest.raises(FlexCompressError, match="more than"):
        type(model).from_pretrained(tmp_path / "full", length_config=[3, 4, 5])


def test_auto_classes_and_other_heads(tmp_path):
    set_lengths(build("bert", "BertForSequenceClassification"), [7, 5, 3]).save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", length_config=[0.9, 0.5, 0.25]
    )
    assert lengths_of(loaded).values == (0.9, 0.5, 0.25)
    tokens = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "model")
    assert tokens(**inputs_for(tokens)).logits.shape == (3, 9, 3)  # this head needs all of them back
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").length_config["counts"] == [7, 5, 3]


def test_pruned_and_dropping(tmp_path):
    model = build("bert", "BertForSequenceClassification")
    select(model, Kept(range(20), {"encoder": [KeptLayer(0, [0]), KeptLayer(1, [1, 2]), KeptLayer(2, ffn=range(7))]}))
    set_lengths(model, [7, 5, 3])
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)["logits"]
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert ModelStructure.of(loaded) == ModelStructure.of(model)
    assert torch.equal(outputs_of(loaded, inputs)["logits"], expected)
    assert loaded.config.quantization_config == model.config.quantization_config
    assert lengths_of(type(model).from_pretrained(tmp_path / "model", length_config=None)) is None
    # Sizes that a stock configuration can express leave the lengths loadable.
    uniform = set_lengths(build("bert", "BertForSequenceClassification"), [7, 5, 3])
    select(uniform, Kept(range(16), {"encoder": [KeptLayer(i, [0, 1]) for i in range(3)]}))
    assert uniform.config.quantization_config == {"quant_method": "flexcompress"}
    uniform.save_pretrained(tmp_path / "uniform")
    loaded = type(model).from_pretrained(tmp_path / "uniform")
    assert torch.equal(outputs_of(loaded, inputs)["logits"], outputs_of(uniform, inputs)["logits"])


def test_without_the_plugin_all_tokens_stay(tmp_path):
    """The weights are stock ones, so such a folder loads without the plugin, at full lengths and with a warning."""
    model = build("bert", "BertForSequenceClassification")
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)["logits"]
    set_lengths(model, [7, 5, 3]).save_pretrained(tmp_path / "model")
    torch.save({"inputs": inputs, "logits": expected}, tmp_path / "expected.pt")
    script = (
        "import sys, torch, transformers\n"
        "model = transformers.BertForSequenceClassification.from_pretrained(sys.argv[1] + '/model')\n"
        "saved = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(model(**saved['inputs']).logits, saved['logits'])\n"
        "assert 'optimum_flexcompress' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "got flexcompress" in done.stderr


def test_a_model_without_lengths_is_not_marked():
    model = build("bert", "BertModel")
    before = model.config.to_dict()
    set_lengths(model, None)
    set_lengths(model, "full")
    assert model.config.to_dict() == before
    assert not hasattr(describe(model).stacks["encoder"].module_list, "_token_dropper")


def test_the_card_says_what_is_needed(tmp_path):
    model = set_lengths(build("bert", "BertForSequenceClassification"), [0.9, 0.5, 0.25])
    card = write_model_card(tmp_path, model).read_text()
    assert "import optimum_flexcompress" in card
    assert "without any plugin, it loads in Transformers at full lengths." in card
    assert "these fractions of tokens: [0.9, 0.5, 0.25]" in card
    assert "Lengths" not in write_model_card(tmp_path, build("bert", "BertModel")).read_text()
