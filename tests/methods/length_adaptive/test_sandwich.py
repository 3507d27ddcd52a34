"""The gradients of a step are those of its passes, each computed by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimum_flexcompress import DistillationConfig, LengthAdaptiveConfig, set_lengths
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.token_dropping import LengthConfig
from tests.methods.length_adaptive.families import wide
from tests.methods.length_adaptive.runs import CASES, Grab, classes, train
from tests.methods.toys import assert_same, data_of, twin


def separate_passes(model, batch, sub_models, loss_of, unit="counts", reverse=False, task=None) -> dict:
    """Gradients of the passes, each computed by itself: layers taken out by hand, lengths set as a user would."""
    share = 1 / (len(sub_models) + 1)
    full = model(**batch)
    (share * (full.loss if task is None else task(full))).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    alone = dict(gradients)
    fixed = {key: value.detach() for key, value in full.items() if isinstance(value, torch.Tensor)}
    fixed = type(full)(**fixed)
    parameters = dict(model.named_parameters())
    view = describe(model)
    stack = view.stacks["encoder"]
    path, _, attribute = stack.table.layers.rpartition(".")
    parent = view.base.get_submodule(path)
    original = getattr(parent, attribute)
    for sub_model in sub_models:
        model.zero_grad()
        total = {"pixel_values": 5}.get(next(iter(batch)), 9)
        lengths = sub_model.counts(total)
        if unit == "fractions":
            values = sub_model.fractions(len(stack.layers)).values
            lengths = LengthConfig(tuple(values[layer] for layer in sub_model.layers), "fractions")
        setattr(parent, attribute, nn.ModuleList([original[layer] for layer in sub_model.layers]))
        set_lengths(model, lengths)
        (share * loss_of(fixed, model(**batch), batch, reverse)).backward()
        set_lengths(model, None)
        setattr(parent, attribute, original)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad
    # Were sub-models to add next to nothing, a comparison would show nothing.
    moved = sum((gradients[name] - value).norm() ** 2 for name, value in alone.items()) ** 0.5
    assert moved > 1e-2 * sum(value.norm() ** 2 for value in alone.values()) ** 0.5
    return gradients


@pytest.mark.parametrize("unit", ["counts", "fractions"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_sum_of_the_separate_passes(tmp_path, drawn, case, unit):
    make, data, loss_of = CASES[case]
    model, data = make(layers=4), data(rows=4)
    if case == "several labels":
        model.config.problem_type = "multi_label_classification"
    grab = Grab()
    reference = twin(model)
    config = LengthAdaptiveConfig(layer_drop=0.4, length_drop=0.4, unit=unit)
    train(tmp_path, model, data, config, callbacks=[grab], max_steps=1, max_grad_norm=0.0)
    assert [name for _, name, _ in drawn] == ["smallest", "random_0", "random_1"]
    assert len({sub_model for _, _, sub_model in drawn}) == 3
    assert any(len(sub_model.layers) < 4 for _, _, sub_model in drawn)
    expected = separate_passes(reference, data[:4], [sub_model for _, _, sub_model in drawn], loss_of, unit)
    assert_same(grab.gradients[0], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", ["bert", "spans", "tokens", "t5"])
def test_reverse_divergence(tmp_path, drawn, case):
    make, data, loss_of = CASES[case]
    model, data = make(layers=3), data(rows=4)
    gradients = []
    for divergence in ("forward", "reverse"):
        drawn.clear()
        grab = Grab()
        config = LengthAdaptiveConfig(length_drop=0.5, divergence=divergence, num_sandwich=1)
        train(tmp_path, twin(model), data, config, callbacks=[grab], max_steps=1, max_grad_norm=0.0)
        sub_models = [sub_model for _, _, sub_model in drawn]
        expected = separate_passes(twin(model), data[:4], sub_models, loss_of, reverse=divergence == "reverse")
        assert_same(grab.gradients[0], expected, atol=1e-5, rtol=1e-3)
        gradients.append(grab.gradients[0])
    assert any(not torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])


def test_an_outer_teacher_acts_on_the_full_pass(tmp_path, drawn):
    teacher, model, data = wide("bert", layers=4, seed=1), wide("bert", layers=3), data_of("bert", rows=4)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    grab = Grab()
    distillation = DistillationConfig(logits_weight=0.7, task_loss_weight=0.4, temperature=3.0)
    trainer = train(
        tmp_path,
        twin(model),
        data,
        distillation,
        LengthAdaptiveConfig(length_drop=0.5),
        teacher=teacher,
        callbacks=[grab],
        max_steps=1,
        max_grad_norm=0.0,
    )
    assert len(calls) == 1
    batch = data[:4]
    with torch.no_grad():
        target = (teacher(**batch).logits / 3).log_softmax(-1)

    def task(full):
        divergence = F.kl_div((full.logits / 3).log_softmax(-1), target, reduction="batchmean", log_target=True)
        return 0.4 * full.loss + 0.7 * 9 * divergence

    expected = separate_passes(twin(model), batch, [entry[2] for entry in drawn], classes, task=task)
    assert_same(grab.gradients[0], expected, atol=1e-5, rtol=1e-3)
    entry = trainer.state.log_history[0]
    assert {"loss_task", "loss_logits", "loss_smallest", "loss_random"} <= entry.keys()
    total = 0.4 * entry["loss_task"] + 0.7 * entry["loss_logits"] + entry["loss_smallest"] + 2 * entry["loss_random"]
    assert entry["loss"] == pytest.approx(total / 4, abs=1e-4)
