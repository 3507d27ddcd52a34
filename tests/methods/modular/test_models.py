"""What a full model routed through an assembly computes is what the assembled model computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from optimum_flexcompress import Assembly, FlexCompressError, ModularConfig, ModularModel
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.methods.modular import MODULES_NAME, Piece
from tests.methods.modular.helpers import deep, mixed, with_modules
from tests.methods.toys import weights
from tests.tiny import ALL, GENERATIVE, inputs_for, is_encoder_decoder, outputs_of


def assert_equal(first, second):
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("family", "name"), ALL)
def test_routed_equals_assembled(family, name):
    model = deep(family, name)
    modular, inputs, before = with_modules(model), inputs_for(model), weights(model)
    stock = outputs_of(model, inputs)
    different = []
    for assembly in mixed(modular):
        small = modular.assemble(assembly)
        with modular.routed(assembly) as routed:
            expected = outputs_of(routed, inputs)
        assert_equal(expected, outputs_of(small, inputs))
        assert {key: len(stack.layers) for key, stack in describe(small).stacks.items()} == {
            key: len(pieces) for key, pieces in assembly.stacks.items()
        }
        key = next(iter(stock))
        different.append(not torch.allclose(stock[key], expected[key], atol=1e-3))
    assert sum(different) >= len(different) - 1  # with one stack, one of them is the whole model
    assert_equal(stock, outputs_of(model, inputs))
    assert weights(model).keys() == before.keys()


@pytest.mark.parametrize(("family", "name"), GENERATIVE)
def test_generation_with_and_without_cache(family, name):
    """Greedy and beams, routed and assembled, with padding on the left where there is one stack."""
    model = deep(family, name)
    modular = with_modules(model)
    inputs = inputs_for(model)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if not is_encoder_decoder(model):
        inputs = {key: value.flip(1) for key, value in inputs.items()}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for assembly in mixed(modular)[:2]:
        small = modular.assemble(assembly)
        for beams in (1, 3):
            results = [
                small.generate(**inputs, num_beams=beams, use_cache=cache, **options) for cache in (True, False)
            ]
            with modular.routed(assembly) as routed:
                results.append(routed.generate(**inputs, num_beams=beams, **options))
            assert all(torch.equal(results[0], other) for other in results[1:])
            assert len({tuple(row) for row in results[0][:, -6:].tolist()}) > 1


@pytest.mark.parametrize("initialization", ["first", "middle", "last", "mean"])
def test_initialization(initialization):
    model = deep("t5", "T5ForConditionalGeneration")
    modular = ModularModel(model, ModularConfig(granularities=[2, 3, 6], initialization=initialization))
    layers = [weights(layer.module) for layer in describe(model).stacks["decoder"].layers]
    for granularity, block, start in ((2, 1, 2), (3, 1, 3), (6, 0, 0)):
        module = weights(modular.modules[f"decoder_{granularity}_{block}"])
        span = layers[start : start + granularity]
        place = {"first": 0, "middle": (granularity - 1) // 2, "last": granularity - 1}
        for name, value in module.items():
            expected = torch.stack([layer[name] for layer in span]).mean(0)
            if initialization in place:
                expected = span[place[initialization]][name]
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("initialization", ["first", "last"])
def test_the_relative_bias_of_t5_is_inherited(initialization):
    model = deep("t5", "T5ForConditionalGeneration")
    modular = with_modules(model, initialization=initialization)
    assert not any("relative_attention_bias" in name for name in modular.modules.state_dict())
    bottom = Assembly({"encoder": (Piece(2, 0), Piece(2, 1), Piece(2, 2)), "decoder": (Piece(3, 0), Piece(3, 1))})
    inputs = inputs_for(model)
    before = outputs_of(modular.assemble(bottom), inputs)["logits"]
    small = modular.assemble(bottom)
    for name in ("encoder", "decoder"):
        owners = [key for key in small.state_dict() if "relative_attention_bias" in key and name in key]
        assert owners == [f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        original = model.state_dict()[owners[0]]
        assert torch.equal(small.state_dict()[owners[0]], original)
        assert small.get_parameter(owners[0]).data_ptr() != original.data_ptr()
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(std=2.0)
    assert not torch.allclose(before, outputs_of(modular.assemble(bottom), inputs)["logits"], atol=1e-3)
    with modular.routed(bottom) as routed:
        assert_equal(outputs_of(routed, inputs), outputs_of(modular.assemble(bottom), inputs))


def test_a_deeper_decoder_is_refused_where_transformers_cannot_generate_with_it():
    deeper = Assembly({"encoder": (Piece(3, 0), Piece(3, 1))})
    with pytest.raises(FlexCompressError, match="6 decoder layers over 2 encoder layers: Transformers cannot"):
        with_modules(deep("t5", "T5ForConditionalGeneration")).assemble(deeper)
    model = deep("bart", "BartForConditionalGeneration")
    small = with_modules(model).assemble(deeper)
    ids = inputs_for(model)["input_ids"]
    results = [small.generate(ids, max_new_tokens=5, min_new_tokens=5, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*results)


CASES = [("t5", "T5ForConditionalGeneration"), ("bart", "BartForConditionalGeneration"), ("qwen2", "Qwen2ForCausalLM")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_assembled_models_load_without_the_plugin(tmp_path, family, name):
    model = deep(family, name)
    modular = with_modules(model)
    inputs = inputs_for(model)
    small = modular.assemble(mixed(modular)[0])
    small.save_pretrained(tmp_path / "small")
    torch.save({"inputs": inputs, "logits": outputs_of(small, inputs)["logits"]}, tmp_path / "expected.pt")
    assert "quantization_config" not in json.loads((tmp_path / "small" / "config.json").read_text())
    script = (
        "import sys, torch, transformers\n"
        f"model = transformers.{name}.from_pretrained(sys.argv[1] + '/small').eval()\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "with torch.no_grad(): logits = model(**expected['inputs']).logits\n"
        "torch.testing.assert_close(logits, expected['logits'], rtol=1e-5, atol=1e-5)\n"
        "assert 'optimum_flexcompress' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_modular_checkpoint_loads_with_its_modules_and_as_the_full_model(tmp_path, family, name):
    model = deep(family, name)
    modular = with_modules(model)
    modular.save_pretrained(tmp_path)
    loaded = ModularModel.from_pretrained(tmp_path)
    assert loaded.config == modular.config and loaded.depths == modular.depths
    inputs, assembly = inputs_for(model), mixed(modular)[1]
    assert_equal(outputs_of(modular.assemble(assembly), inputs), outputs_of(loaded.assemble(assembly), inputs))
    full = getattr(transformers, name).from_pretrained(tmp_path)
    assert_equal(outputs_of(model, inputs), outputs_of(full, inputs))


def test_damaged_checkpoints(tmp_path):
    with pytest.raises(FlexCompressError, match="There is no folder"):
        ModularModel.from_pretrained(tmp_path / "nowhere")
    modular = with_modules(deep("bert", "BertModel"))
    modular.model.save_pretrained(tmp_path)
    with pytest.raises(FlexCompressError, match="is no modular checkpoint: train one with ModularConfig"):
        ModularModel.from_pretrained(tmp_path)
    (tmp_path / MODULES_NAME).touch()
    with pytest.raises(
        FlexCompressError, match=r"holds no readable flexcompress_config.json: give a folder that a Flex"
    ):
        ModularModel.from_pretrained(tmp_path)
    modular.save_pretrained(tmp_path)
    (tmp_path / "flexcompress_config.json").write_text('{"methods": [{"method_type": "distillation"}]}')
    with pytest.raises(FlexCompressError, match="was not trained with ModularConfig"):
        ModularModel.from_pretrained(tmp_path)
    text = '{"methods": [{"method_type": "modular", "granularities": [2, 3, 6]}]}'
    (tmp_path / "flexcompress_config.json").write_text(text)
    with pytest.raises(FlexCompressError, match="missing: encoder_6_0; beyond it: none"):
        ModularModel.from_pretrained(tmp_path)
    modular.save_pretrained(tmp_path)
    (tmp_path / MODULES_NAME).write_bytes((tmp_path / MODULES_NAME).read_bytes()[:200])
    with pytest.raises(FlexCompressError, match="is damaged"):
        ModularModel.from_pretrained(tmp_path)
    (tmp_path / MODULES_NAME).unlink()
    with pytest.raises(FlexCompressError, match="is no modular checkpoint"):
        ModularModel.from_pretrained(tmp_path)
