"""What can be done to an assembled model next: pruning, token dropping, export, int8."""

from __future__ import annotations

import pytest
import torch

from optimum_flexcompress import (
    Assembly,
    FlexCompressConfig,
    FlexCompressTrainer,
    FlexORTModelForSeq2SeqLM,
    LengthAdaptiveConfig,
    ModelStructure,
    ModularConfig,
    ModularModel,
    set_lengths,
)
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.methods.modular import Piece
from optimum_flexcompress.quantization import quantize_folder
from tests.methods.modular.helpers import deep, mixed, toy, with_modules
from tests.methods.toys import arguments, data_of
from tests.methods.vib.helpers import config_of
from tests.quantization.test_families import examples
from tests.tiny import inputs_for, outputs_of


def train(folder, model, data, method, **kwargs):
    trainer = FlexCompressTrainer(
        model=model,
        args=arguments(folder, **kwargs),
        train_dataset=data,
        compression_config=FlexCompressConfig(methods=[method]),
    )
    trainer.train()
    trainer.save_model(folder / "out")
    return trainer.model.eval()


def assembled(family):
    """Two of four layers: a module at the bottom, a module at the top."""
    modular = ModularModel(toy(family, hidden=32, heads=4), ModularConfig(granularities=[2]))
    return modular.assemble(modular.smallest())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_assembled_model_can_be_pruned(tmp_path, family):
    small = assembled(family)
    before = small.num_parameters()
    pruned = train(tmp_path, small, data_of(family, rows=32), config_of(target_sparsity=0.4), max_steps=80)
    assert pruned.num_parameters() < before
    loaded = type(pruned).from_pretrained(tmp_path / "out")
    assert ModelStructure.of(loaded) == ModelStructure.of(pruned)
    batch = dict(data_of(family)[:4].items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, pruned(**batch).logits)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_encoder_of_an_assembled_model_can_drop_tokens(tmp_path, family):
    data = data_of(family)
    adapted = train(tmp_path, assembled(family), data, LengthAdaptiveConfig(length_drop=0.4))
    short = type(adapted).from_pretrained(tmp_path / "out", length_config=[0.6, 0.4])
    batch = dict(data[:4].items())
    with torch.no_grad():
        expected = set_lengths(adapted, [0.6, 0.4])(**batch).logits
        torch.testing.assert_close(short(**batch).logits, expected)
    ids = short.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4)
    assert ids.shape[0] == 4


def test_bert_too(tmp_path):
    adapted = train(tmp_path, assembled("bert"), data_of("bert"), LengthAdaptiveConfig(length_drop=0.4))
    assert len(describe(adapted).stacks["encoder"].layers) == 2


CASES = [("t5", "T5ForConditionalGeneration"), ("bart", "BartForConditionalGeneration")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_an_assembled_model_can_be_exported(tmp_path, family, name):
    model = deep(family, name)
    modular = with_modules(model)
    uneven = Assembly({"encoder": mixed(modular)[3].stacks["encoder"], "decoder": (Piece(3, 0), Piece(3, 1))})
    small = modular.assemble(uneven).eval()
    export_onnx(small, tmp_path / "onnx")
    inputs = {key: value for key, value in inputs_for(model).items() if key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = {beams: small.generate(**inputs, num_beams=beams, **options) for beams in (1, 3)}
    session = FlexORTModelForSeq2SeqLM.from_pretrained(tmp_path / "onnx")
    for beams, ids in expected.items():
        assert torch.equal(session.generate(**inputs, num_beams=beams, **options), ids)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_an_assembled_model_becomes_int8_in_one_call(tmp_path, family, name, mode):
    """Static int8 is that of the two decoders, calibrated on what the model generates; merged graphs are dynamic."""
    modular = with_modules(deep(family, name))
    uneven = Assembly({"encoder": mixed(modular)[3].stacks["encoder"], "decoder": (Piece(3, 0), Piece(3, 1))})
    small = modular.assemble(uneven).eval()
    quantize_folder(small, tmp_path / "int8", mode, calibration_dataset=examples(small) if mode == "static" else None)
    decoders = sorted(file.stem for file in (tmp_path / "int8").glob("decoder*.onnx"))
    assert (
        decoders
        == {
            "dynamic": ["decoder_model_merged"],
            "static": ["decoder_model", "decoder_with_past_model"],
        }[mode]
    )
    session = FlexORTModelForSeq2SeqLM.from_pretrained(tmp_path / "int8")
    inputs = {key: value for key, value in inputs_for(small).items() if key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        expected = small.generate(**inputs, num_beams=beams, **options)
        assert session.generate(**inputs, num_beams=beams, **options).shape == expected.shape
    # What the model says itself: ranges were taken there.
    spoken = {**inputs, "decoder_input_ids": small.generate(**inputs, num_beams=1, **options)[:, :-1]}
    logits, reference = session(**spoken).logits, outputs_of(small, spoken)["logits"]
    assert (logits - reference).norm() < 0.2 * reference.norm()
    # The same token by token: what goes on from a cache has a graph, or a branch, of its own.
    cache, steps = None, []
    for token in spoken["decoder_input_ids"].split(1, dim=1):
        output = session(**inputs, decoder_input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    assert (torch.cat(steps, 1) - reference).norm() < 0.2 * reference.norm()
