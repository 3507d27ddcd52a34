"""LoRA recovery after pruning with frozen weights."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from transformers import TrainerCallback

from optimum_flexcompress import ModelStructure
from optimum_flexcompress.errors import FlexCompressError, MissingExtraError
from optimum_flexcompress.methods.base import PrepareContext
from optimum_flexcompress.methods.vib import VIBPruningMethod
from optimum_flexcompress.methods.vib.recovery import LoRARecovery
from optimum_flexcompress.structure import count_parameters
from tests.methods.toys import FAMILIES, arguments, assert_same, data_of, model_of, twin, weights
from tests.methods.vib.helpers import config_of, trainer_of


SETTINGS = {
    "mode": "faster",
    "recovery": "lora",
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "data_fraction": 1.0,
    "target_sparsity": 0.4,
}


class _Watch(TrainerCallback):
    """What the model of a trainer computes on a batch at the end of some steps, and its weights."""

    def __init__(self, steps, batch):
        self.steps, self.batch, self.seen = steps, batch, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            training = model.training
            with torch.no_grad():
                self.seen[state.global_step] = (model.eval()(**self.batch).logits, weights(model))
            model.train(training)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_and_are_merged(family, tmp_path):
    batch = data_of(family, 4)[:]
    watch = _Watch((61, 80), batch)
    trainer = trainer_of(tmp_path, family, settings=SETTINGS, callbacks=[watch], learning_rate=1e-2)
    dense = count_parameters(trainer.model)["prunable"]
    names = list(weights(trainer.model))
    trainer.train()
    (folded, weights_then), (recovered, weights_last) = watch.seen[61], watch.seen[80]
    # The weights stay as the fold left them, and nothing is added to the model, until the merge.
    assert list(weights_then) == names
    assert_same(weights_then, weights_last)
    assert not torch.allclose(folded, recovered, atol=1e-3)
    trainer.save_model(str(tmp_path / "out"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, recovered, atol=1e-4, rtol=1e-4)
    assert abs(1 - count_parameters(loaded)["prunable"] / dense - 0.4) <= 0.01 * 0.6
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert not any("lora" in name for name in weights(loaded))
    assert not any("forward" in vars(module) for module in trainer.model.modules())


def test_recovery_lowers_the_loss(tmp_path):
    losses = {}
    for recovery in (None, "lora"):
        settings = {**SETTINGS, "recovery": recovery, "lora": {}, "target_sparsity": 0.6}
        if recovery is None:
            settings.update(ramp_fraction=0.6)
        trainer = trainer_of(tmp_path / str(recovery), settings=settings, steps=160, teacher=None, learning_rate=1e-2)
        trainer.train()
        losses[recovery] = trainer.evaluate()["eval_loss"]
    assert losses["lora"] < 0.9 * losses[None]


@pytest.mark.parametrize("stop", [20, 70])
def test_killed_and_resumed_is_not_killed(tmp_path, stop):
    settings = {"save_strategy": "steps", "save_steps": stop, "learning_rate": 1e-2, "settings": SETTINGS}
    model = model_of("bert", layers=2, hidden=32, heads=4, dropout=0.1)
    whole = trainer_of(tmp_path / "whole", model=twin(model), **settings)
    whole.train()

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    killed = trainer_of(tmp_path / "killed", model=twin(model), callbacks=[Kill()], **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer_of(tmp_path / "killed", model=twin(model), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert ModelStructure.of(resumed.model) == ModelStructure.of(whole.model)
    assert_same(weights(resumed.model), weights(whole.model))


def test_saving_on_the_way_merges_a_copy_and_changes_nothing(tmp_path):
    """With dropout, so that a random number drawn on the way would show."""

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 75:
                saving.save_model(str(tmp_path / "copy"))

    model = model_of("bert", layers=2, hidden=32, heads=4, dropout=0.1)
    settings = {"settings": SETTINGS, "learning_rate": 1e-2}
    watch = _Watch((75,), data_of("bert", 4)[:])
    saving = trainer_of(tmp_path / "a", model=twin(model), callbacks=[Save(), watch], **settings)
    saving.train()
    other = trainer_of(tmp_path / "b", model=twin(model), **settings)
    other.train()
    assert_same(weights(saving.model), weights(other.model))
    loaded = type(model).from_pretrained(tmp_path / "copy").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**watch.batch).logits, watch.seen[75][0], atol=1e-4, rtol=1e-4)


def test_the_rate_rises_and_falls():
    rates = [LoRARecovery.rate(step, 60, 80) for step in range(80)]
    assert not any(rates[:60]) and max(rates) > 0.9
    assert rates[60] < rates[61] and all(a > b > 0 for a, b in pairwise(rates[62:]))


def test_without_peft(tmp_path, monkeypatch):
    method = VIBPruningMethod(config_of(**SETTINGS))
    context = PrepareContext(model_of("bert"), None, arguments(tmp_path))
    method.validate(context)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"optimum-flexcompress\[lora\]"):
        method.validate(context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recovery": "qlora"}, 'give "lora"'),
        ({"mode": "vtrans"}, 'goes with mode="faster"'),
        ({"recovery": None}, 'recovery="lora"'),
        ({"lora": {"rank": 4}}, "Known: lora_alpha"),
        ({"lora": {"r": 0}}, "at least 1"),
        ({"lora": {"lora_dropout": 1.0}}, "below 1"),
        ({"ramp_fraction": 0.75}, "no steps for the"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(FlexCompressError, match=message):
        config_of(**{**SETTINGS, **settings})
