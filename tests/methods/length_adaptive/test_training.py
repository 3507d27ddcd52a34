"""Length-adaptive training in the trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    Trainer,
    TrainerCallback,
)

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressError,
    LengthAdaptiveConfig,
    MiniLMConfig,
    lengths_of,
    set_lengths,
)
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.token_dropping import LengthConfig
from tests.methods.length_adaptive.families import wide
from tests.methods.length_adaptive.runs import CASES, Grab, train
from tests.methods.length_adaptive.test_dropping import hooks_of
from tests.methods.toys import arguments, assert_same, data_of, model_of, twin, weights


FAMILIES = ["bert", "roberta", "distilbert", "vit", "t5", "bart"]


def test_every_distillation_term_beside_it(tmp_path):
    """Hidden states, attention maps and relations are read in the full pass alone."""
    teacher, model = model_of("bert", layers=4, seed=1), model_of("bert", layers=2)
    methods = [
        DistillationConfig(hidden_states_weight=1.0, attention_weight=1.0),
        MiniLMConfig(relation_heads=4),
        LengthAdaptiveConfig(length_drop=0.5),
    ]
    trainer = train(tmp_path, model, data_of("bert"), *methods, teacher=teacher)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


SETTINGS = [(family, extra) for family in FAMILIES for extra in ({}, {"gradient_checkpointing": True})]
# The trainer smooths labels of encoder-decoder models only with a collator that prepares decoder inputs.
SETTINGS += [(family, {"label_smoothing_factor": 0.1}) for family in FAMILIES[:4]]


@pytest.mark.parametrize(("family", "extra"), SETTINGS)
def test_every_family_trains_and_is_stock_afterwards(tmp_path, family, extra):
    model, data = model_of(family, layers=3), data_of(family)
    hooks, before = hooks_of(model), weights(model)
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen.append(hooks_of(describe(model).stacks["encoder"].module_list))

    trainer = train(
        tmp_path / "run",
        model,
        data,
        LengthAdaptiveConfig(length_drop=0.4),
        eval_dataset=data,
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[Look()],
        **extra,
    )
    assert seen == [0, 0]
    assert hooks_of(model) == hooks
    assert any(not torch.equal(before[name], value) for name, value in weights(model).items())
    trainer.save_model(tmp_path / "out")
    batch = dict(data[:4].items())
    full = type(model).from_pretrained(tmp_path / "out")
    assert lengths_of(full) is None
    model.eval()
    assert torch.equal(full(**batch).logits, model(**batch).logits)
    short = type(model).from_pretrained(tmp_path / "out", length_config=[0.5, 0.5, 0.5])
    expected = set_lengths(twin(model), [0.5, 0.5, 0.5])(**batch).logits
    assert torch.equal(short(**batch).logits, expected)
    assert not torch.allclose(expected, model(**batch).logits, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_gradient_checkpointing_changes_nothing(tmp_path, family):
    gradients = []
    for checkpointing in (False, True):
        grab = Grab()
        train(
            tmp_path,
            wide(family, layers=3),
            data_of(family),
            LengthAdaptiveConfig(length_drop=0.4),
            callbacks=[grab],
            gradient_checkpointing=checkpointing,
        )
        gradients.append(grab.gradients[0])
    assert_same(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", ["bert", "tokens", "t5"])
def test_accumulation(tmp_path, case):
    """1 x 8 equals 4 x 2: the sub-models of a step are those of all its batches.

    The model's own loss is left out: the trainer averages it over batches, whatever their numbers of labels.
    """
    make, data, _ = CASES[case]
    gradients = []
    for batch, accumulation in ((8, 1), (2, 4)):
        grab = Grab()
        train(
            tmp_path,
            make(layers=3),
            data(rows=8),
            DistillationConfig(task_loss_weight=0.0),
            LengthAdaptiveConfig(length_drop=0.4),
            teacher=make(layers=4, seed=1),
            callbacks=[grab],
            max_steps=1,
            max_grad_norm=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        gradients.append(grab.gradients[0])
    assert_same(*gradients, atol=1e-5, rtol=1e-3)


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def test_killed_and_resumed_equals_not_killed(tmp_path, drawn):
    model, data = wide("bert", layers=3, dropout=0.1), data_of("bert", rows=20)
    config = LengthAdaptiveConfig(length_drop=0.4)
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = train(tmp_path / "whole", twin(model), data, config, **settings)
    expected = [entry for entry in drawn if entry[0] >= 3]
    assert len({entry[2] for entry in drawn if entry[1] == "random_0"}) > 3
    with pytest.raises(Killed):
        train(tmp_path / "killed", twin(model), data, config, callbacks=[KillAt(5)], **settings)
    drawn.clear()
    stranger = model_of("bert", layers=3, dropout=0.1, seed=9)
    resumed = train(tmp_path / "killed", stranger, data, config, resume=True, **settings)
    assert drawn == expected
    assert_same(weights(whole.model), weights(resumed.model))


def test_a_pass_that_fails_leaves_the_model_whole(tmp_path):
    model, data = model_of("bert", layers=3), data_of("bert")
    layers = list(describe(model).stacks["encoder"].module_list)
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) > 3:
            raise Killed

    handle = model.bert.encoder.layer[-1].register_forward_hook(fail)
    with pytest.raises(Killed):
        train(tmp_path, model, data, LengthAdaptiveConfig(layer_drop=0.5), max_steps=20)
    handle.remove()
    assert list(describe(model).stacks["encoder"].module_list) == layers
    assert hooks_of(model) == 0


class _Live:
    """Counts the bytes that autograd holds for the backward pass."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        return _Held(self, tensor)

    def unpack(self, held):
        return held.tensor


class _Held:
    def __init__(self, live, tensor):
        # Detached: a node that saves its own output would keep itself alive.
        self.live, self.tensor = live, tensor.detach()
        self.size = 0 if isinstance(tensor, nn.Parameter) else tensor.numel() * tensor.element_size()
        live.now += self.size
        live.peak = max(live.peak, live.now)

    def __del__(self):
        self.live.now -= self.size


@pytest.mark.parametrize("family", ["bert", "vit", "t5"])
def test_activations_of_one_pass_are_live_at_a_time(tmp_path, family):
    peaks = []
    for methods in ([], [LengthAdaptiveConfig(length_drop=0.2, num_sandwich=3)]):
        live = _Live()
        with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
            train(tmp_path, model_of(family, layers=4), data_of(family), *methods)
        peaks.append(live.peak)
        assert live.now == 0
    assert 0 < peaks[1] <= 1.15 * peaks[0]


@pytest.mark.parametrize("lengths", [[6, 3], [0.6, 0.3]])
def test_one_fixed_configuration(tmp_path, lengths):
    """PoWER-BERT: what the stock trainer does with a model that drops tokens."""
    model, data = model_of("bert", dropout=0.1), data_of("bert")
    plain = Trainer(
        model=set_lengths(twin(model), lengths, max_length=9),
        args=arguments(tmp_path / "plain", max_steps=4),
        train_dataset=data,
    )
    plain.train()
    config = LengthAdaptiveConfig(lengths=lengths, max_length=9)
    ours = train(tmp_path / "ours", twin(model), data, config, max_steps=4)
    assert_same(weights(plain.model), weights(ours.model))
    assert lengths_of(ours.model) == LengthConfig.parse(lengths, 9)
    ours.save_model(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert lengths_of(loaded) == lengths_of(ours.model)
    with pytest.raises(FlexCompressError, match="for 3 layers, the encoder of BertForSequenceClassification has 2"):
        train(tmp_path / "wrong", twin(model), data, LengthAdaptiveConfig(lengths=[6, 5, 4]))


def test_lengths_that_the_model_had_do_not_hold_in_training(tmp_path):
    model, data = model_of("bert", layers=3), data_of("bert")
    config = LengthAdaptiveConfig()
    expected = train(tmp_path, twin(model), data, config)
    actual = train(tmp_path, set_lengths(twin(model), [5, 3, 2]), data, config)
    assert_same(weights(expected.model), weights(actual.model))
    assert lengths_of(actual.model) is None


def test_models_that_cannot_learn_to_drop_are_refused(tmp_path):
    for family in ("gpt2", "llama"):
        with pytest.raises(FlexCompressError, match="decoder, which cannot drop tokens"):
            train(tmp_path, model_of(family), data_of(family), LengthAdaptiveConfig())
    with pytest.raises(FlexCompressError, match=r"no head whose output .* AutoModelForSequenceClassification"):
        train(tmp_path, model_of("bert", auto_class=AutoModel), data_of("bert"), LengthAdaptiveConfig())
    bart = model_of("bart")
    bart.config.encoder_layerdrop = 0.1
    with pytest.raises(FlexCompressError, match=r"encoder_layerdrop=0.1.*set it to 0"):
        train(tmp_path, bart, data_of("bart"), LengthAdaptiveConfig())
