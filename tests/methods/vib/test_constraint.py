"""The size follows its ramp, and what goes is what matters least."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, TrainingArguments

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.methods.base import FULL_PASS, PrepareContext, Step
from optimum_flexcompress.methods.groups import MethodGroups
from optimum_flexcompress.methods.vib import VIBPruningMethod
from optimum_flexcompress.methods.vib.constraint import SizeConstraint, movable
from optimum_flexcompress.methods.vib.schedule import Schedule, minimum_steps
from tests.methods.vib.helpers import config_of
from tests.tiny import build, inputs_for


TARGET, STEPS = 0.7, 400


def _run_toy(tmp_path, scale: float):
    """Trains the masks of a model on a loss that charges each of them its known importance.

    Returns:
        The sparsities wanted and reached in each step, the method, and the importances per unit of cost.
    """
    config = BertConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=4, num_attention_heads=16, intermediate_size=512
    )
    model = BertModel(config).train()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    settings = {"warmup_fraction": 0.05, "ramp_fraction": 0.6, "hold_fraction": 0.35, "mask_learning_rate": 0.05}
    # Whole sub-layers are steps of several percent each, which no constraint can follow closely.
    method = VIBPruningMethod(config_of(target_sparsity=TARGET, prune=["hidden", "heads", "ffn"], **settings))
    torch.manual_seed(0)
    method.prepare(PrepareContext(model, None, arguments))
    method.start(STEPS)
    method.attach(model)
    masks = method.modules["masks"]
    layout = masks.layout
    keep = torch.ones(layout.size, requires_grad=True)
    (share,) = torch.autograd.grad(-method._sparsity(keep), keep)
    relative = torch.rand(layout.size) ** 2
    importance = scale * relative * share / share[share > 0].mean()
    groups = MethodGroups([method])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    groups.add_to(optimizer, arguments)
    wanted, reached = [], []
    for step in range(STEPS):
        method._hooks._applied = None
        terms = method.loss_terms(Step(model, {}, step, STEPS, 0, FULL_PASS, 0, {}))
        z = method._hooks._factors(0, layout.size, torch.empty(8, 1))
        # The negative logarithm of a likelihood: the gradients of samples vary as much as it bends.
        chance = (2 * importance).sqrt() * torch.randn(8, layout.size)
        loss = (importance * (z - 1) ** 2 + chance * (z - 1)).sum(-1).mean()
        (loss + sum(term.weight * term.value for term in terms.values())).backward()
        groups.before_step(optimizer, step, STEPS, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(method._schedule.sparsity(step))
        reached.append(method._hard_sparsity())
        if step + 1 < STEPS:
            method.on_step(step + 1, STEPS)
    return torch.tensor(wanted), torch.tensor(reached), method, relative


@pytest.mark.parametrize(("scale", "largest"), [(1e-2, 0.02), (1e-1, 0.03)])
def test_the_size_follows_its_ramp_and_lands(tmp_path, scale, largest):
    wanted, reached, method, relative = _run_toy(tmp_path, scale)
    gaps = (reached - wanted).abs()
    # At first the KL term alone can remove what does not matter at all, before there is any pressure.
    assert gaps[wanted > 0.1].max() < largest
    assert gaps[wanted > 0.1].mean() < 0.015
    assert gaps[-20:].max() < 0.01
    masks = method.modules["masks"]
    kept = masks.scores() > 0
    for part in (slice(0, masks.layout.hidden), masks.layout.units):
        on, important = kept[part], relative[part]
        assert important[on].mean() > 3 * important[~on].mean()
    method.on_step(STEPS, STEPS)
    values = masks.evaluation_values()
    assert abs(float(method._sparsity(values)) - TARGET) <= 0.01 * (1 - TARGET)
    assert method.is_ready()


def test_the_multiplier_ascends_outside_the_band_and_stays_in_bounds():
    constraint = SizeConstraint(bound=5.0)
    sparsity = torch.tensor(0.2, requires_grad=True)
    constraint(sparsity, 0.5).backward()
    assert constraint.raw.grad.item() == 1.0 and sparsity.grad.item() == 0.0
    with torch.no_grad():
        constraint.raw.fill_(1.0)
    sparsity.grad = None
    term = constraint(sparsity, 0.5)
    term.backward()
    assert term.item() == pytest.approx(0.3)
    torch.testing.assert_close(sparsity.grad, -torch.sinh(torch.tensor(1.0)))
    constraint.raw.grad = None
    constraint(sparsity, 0.2).backward()
    assert constraint.raw.grad.item() == -1.0
    for value, expected in ((100.0, 5.0), (-100.0, 0.0)):
        with torch.no_grad():
            constraint.raw.fill_(value)
        constraint.clamp()
        assert constraint.multiplier.item() == pytest.approx(expected)


def test_the_multiplier_waits_for_what_is_due():
    """The constraint pushes ahead of the ramp: as long as the ramp is met there is no reason to push harder."""
    constraint = SizeConstraint(bound=5.0)
    for reached, drive in ((0.2, 1.0), (0.29, 1.0), (0.31, -1.0), (0.4, -1.0), (0.42, 1.0)):
        constraint.raw.grad = None
        constraint(torch.tensor(reached), 0.4, due=0.3).backward()
        assert constraint.raw.grad.item() == pytest.approx(drive), reached


def test_only_the_nearest_masks_move():
    scores = torch.tensor([5.0, 0.5, -1.0, 2.0, -0.2, torch.inf])
    keep = (scores > 0).float()
    marginal = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert movable(scores, keep, marginal, torch.tensor(0.15)).tolist() == [0, 1, 0, 1, 0, 0]
    assert movable(scores, keep, marginal, torch.tensor(0.1)).tolist() == [0, 1, 0, 0, 0, 0]
    assert movable(scores, keep, marginal, torch.tensor(-0.06)).tolist() == [0, 0, 0, 0, 1, 0]
    assert not movable(scores, keep, marginal, torch.tensor(0.0)).any()
    # What is worth more than twice the gap would only turn it around, and others take its place.
    assert not movable(scores, keep, marginal, torch.tensor(0.04)).any()
    marginal[1] = 0.3
    assert movable(scores, keep, marginal, torch.tensor(0.1)).tolist() == [0, 0, 0, 1, 0, 0]


def test_phases_and_halts():
    config = config_of(
        target_sparsity=0.8, warmup_fraction=0.1, ramp_fraction=0.4, hold_fraction=0.3, save_at_sparsities=[0.2, 0.6]
    )
    schedule = Schedule.of(config, 0.8, [0.2, 0.6], 1000)
    assert [(halt.start, halt.stop) for halt in schedule.halts] == [(200, 300), (500, 600), (700, 800)]
    assert schedule.fold == 800
    for step, sparsity in ((0, 0), (100, 0), (150, 0.1), (250, 0.2), (400, 0.4), (599, 0.6), (650, 0.7), (900, 0.8)):
        assert schedule.sparsity(step) == pytest.approx(sparsity), step
    assert [step for step in range(1001) if schedule.level_due(step) is not None] == [300, 600]
    # The constraint pushes ahead of the ramp, but never beyond a halt before its checkpoint.
    assert schedule.pressure(150) > schedule.sparsity(150)
    assert schedule.pressure(299) == pytest.approx(0.2)
    assert schedule.pressure(799) == pytest.approx(0.8)
    rates = [schedule.learning_rate(step) for step in (0, 699, 750, 800)]
    assert rates[:2] == [1, 1] and 0.1 < rates[2] < 1 and rates[3] == pytest.approx(0.1)


def test_faster_holds_to_the_end():
    schedule = Schedule.of(config_of(mode="faster"), 0.5, [], 200)
    assert schedule.fold == 200 and schedule.halts[-1].start == 100


@pytest.mark.parametrize("mode", ["vtrans", "faster"])
def test_too_few_steps_name_how_many_it_takes(mode):
    config = config_of(mode=mode, mask_learning_rate=0.05)
    with pytest.raises(FlexCompressError, match=r"nine nats.*need about 100") as error:
        Schedule.of(config, 0.5, [], 60)
    needed = int(str(error.value).split("at least ")[1].split(" steps")[0])
    Schedule.of(config, 0.5, [], needed + 2)
    assert minimum_steps(config) == 100


class _NoWaiting(TorchDispatchMode):
    """Fails where a value would be read back from the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert "_local_scalar_dense" not in name and "nonzero" not in name, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(tmp_path):
    model = build("vit", "ViTForImageClassification").train()
    method = VIBPruningMethod(config_of())
    method.prepare(PrepareContext(model, None, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])))
    method.start(100)
    method.attach(model)
    inputs = inputs_for(model)
    with _NoWaiting():
        for step in (0, 60):
            output = model(**inputs)
            terms = method.loss_terms(Step(model, inputs, step, 100, 0, FULL_PASS, 0, {}))
            (output.logits.sum() + sum(term.weight * term.value for term in terms.values())).backward()
            method.on_step(step + 1, 100)
    with pytest.raises(AssertionError, match="waits"), _NoWaiting():
        method.log_values()
