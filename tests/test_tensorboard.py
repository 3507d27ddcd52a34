"""What the methods show over time in TensorBoard, read back from its event files."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer, LengthAdaptiveConfig, ModularConfig
from optimum_flexcompress.architectures import describe
from tests.methods.toys import arguments, data_of, model_of
from tests.methods.vib.helpers import config_of as vib_config


def curves(folder, model, data, method, steps, **kwargs):
    """The model after training, and its scalars: by name, the values by step."""
    args = arguments(folder, max_steps=steps, report_to=["tensorboard"], logging_dir=str(folder / "logs"), **kwargs)
    trainer = FlexCompressTrainer(
        model=model, args=args, train_dataset=data, compression_config=FlexCompressConfig(methods=[method])
    )
    trainer.train()
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    found = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    return trainer.model, {name.removeprefix("train/"): values for name, values in found.items()}


def test_masks(tmp_path):
    """Shares of what the masks keep, from all of it to what the finished model has."""
    model = model_of("bert", layers=4, hidden=32, heads=4)
    before = describe(model)
    (stack,) = before.stacks.values()
    dense = [(layer.attention.num_heads, layer.ffn.size) for layer in stack.layers]
    width = before.hidden_size
    settings = {"target_sparsity": 0.6, "mask_learning_rate": 0.2}
    pruned, shown = curves(tmp_path, model, data_of("bert"), vib_config(**settings), steps=80)
    kinds = ("heads", "ffn", "hidden", "sublayers")
    assert {f"vib_kept_{kind}" for kind in kinds} | {"vib_sparsity", "vib_multiplier", "vib_target"} <= set(shown)
    for kind in kinds:
        values = shown[f"vib_kept_{kind}"]
        assert values[1] == 1.0 and len(values) == 80
    after = describe(pruned)
    (stack,) = after.stacks.values()
    layers = stack.layers
    heads = sum(layer.attention.num_heads for layer in layers if layer.attention is not None)
    dims = sum(layer.ffn.size for layer in layers if layer.ffn is not None)
    there = sum((layer.attention is not None) + (layer.ffn is not None) for layer in layers)
    assert shown["vib_kept_heads"][80] == pytest.approx(heads / sum(size for size, _ in dense), rel=1e-6)
    assert shown["vib_kept_ffn"][80] == pytest.approx(dims / sum(size for _, size in dense), rel=1e-6)
    assert shown["vib_kept_hidden"][80] == pytest.approx(after.hidden_size / width, rel=1e-6)
    assert shown["vib_kept_sublayers"][80] == pytest.approx(there / 8, rel=1e-6)
    assert shown["vib_sparsity"][80] == pytest.approx(0.6, abs=0.01)
    assert shown["vib_target"][1] < shown["vib_target"][80] == pytest.approx(0.6)
    assert any(value != 0 for value in shown["vib_multiplier"].values())


@pytest.mark.parametrize("unit", ["counts", "fractions"])
def test_lengths(tmp_path, unit):
    """Means over the random sub-models: with a fifth dropped at most, and half of the layers skipped."""
    model = model_of("bert", layers=4)
    config = LengthAdaptiveConfig(unit=unit, length_drop=0.2, layer_drop=0.5)
    _, shown = curves(tmp_path, model, data_of("bert"), config, steps=20, logging_steps=10)
    for name in ("length_kept", "length_kept_last", "length_layers"):
        assert list(shown[name]) == [10, 20], name
    assert shown["length_kept"][10] != shown["length_kept"][20]
    for step in (10, 20):
        assert 0.8**4 < shown["length_kept_last"][step] < shown["length_kept"][step] < 1.0
        # A binomial of 4 layers in 20 passes: within three standard errors of 2.
        assert 1.3 < shown["length_layers"][step] < 2.7


def test_lengths_that_keep_all_tokens(tmp_path):
    """Two tokens are the least that LengthDrop leaves."""
    data = data_of("bert").map(lambda row: {name: row[name][:2] for name in ("input_ids", "attention_mask")})
    config = LengthAdaptiveConfig(layer_drop=0.0)
    _, shown = curves(tmp_path, model_of("bert", layers=4), data, config, steps=2)
    assert shown["length_kept"] == {1: 1.0, 2: 1.0} and shown["length_layers"] == {1: 4.0, 2: 4.0}


def test_routes(tmp_path):
    """From fine to coarse, at a rate that rises to 1; in the end the fewest layers."""
    config = ModularConfig(granularities=[2, 4], uniform_fraction=0.0, attention_weight=0.0, blocks_weight=0.0)
    _, shown = curves(tmp_path, model_of("bert", layers=4), data_of("bert"), config, steps=40, logging_steps=4)
    rates, sizes, layers = (list(shown[f"modular_{name}"].values()) for name in ("rate", "granularity", "layers"))
    assert rates == sorted(rates) and rates[0] < 0.5 and rates[-1] == 1.0
    assert sizes[0] == 2.0 and 2.0 < sizes[-1] < 4.0
    # At rate 1 a route of four layers is one coarse module or two fine ones.
    assert 1.0 < layers[-1] < 2.0 < layers[0] <= 3.0
