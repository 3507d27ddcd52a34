"""The masks by themselves: divergence, keep rule, gradients, noise."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from optimum_flexcompress.architectures import describe
from optimum_flexcompress.masking import fold, mask_norm, masked
from optimum_flexcompress.methods.vib.hooks import MaskHooks
from optimum_flexcompress.methods.vib.masks import EPSILON, VIBMasks, as_masks
from optimum_flexcompress.surgery import select
from tests.methods.vib.helpers import KINDS, layout_of, random_masks
from tests.tiny import ALL, build, inputs_for, outputs_of


def _bert():
    return build("bert", "BertForSequenceClassification")


def test_kl_is_the_monte_carlo_estimate():
    masks = VIBMasks(layout_of(_bert()))
    generator = torch.Generator().manual_seed(0)
    size = masks.mu.numel()
    weights = torch.rand(size, generator=generator)
    with torch.no_grad():
        masks.mu.copy_(torch.randn(size, generator=generator))
        masks.log_variance.copy_(torch.rand(size, generator=generator) * 4 - 3)
    mu, sigma = masks.mu.detach().double(), torch.exp(0.5 * masks.log_variance.detach().double())
    posterior = torch.distributions.Normal(mu, sigma)
    prior = torch.distributions.Normal(0.0, (mu**2 + sigma**2).sqrt())
    total = torch.zeros(size, dtype=torch.float64)
    for _ in range(200):
        sample = mu + sigma * torch.randn(100, size, generator=generator, dtype=torch.float64)
        total += (posterior.log_prob(sample) - prior.log_prob(sample)).sum(0)
    estimate = (weights * total / 20_000).sum()
    torch.testing.assert_close(masks.kl(weights).double(), estimate, rtol=5e-3, atol=0)
    # The prior's variance is the best one: any other gives a larger divergence.
    exact = (weights * torch.distributions.kl_divergence(posterior, prior)).sum()
    torch.testing.assert_close(masks.kl(weights).double(), exact, rtol=1e-5, atol=0)
    for factor in (0.9, 1.1):
        other = torch.distributions.Normal(0.0, prior.scale * factor)
        assert (weights * torch.distributions.kl_divergence(posterior, other)).sum() > exact


def test_keep_rule_and_straight_through_gradient():
    masks = VIBMasks(layout_of(_bert()))
    generator = torch.Generator().manual_seed(1)
    size = masks.mu.numel()
    with torch.no_grad():
        masks.mu.copy_(torch.randn(size, generator=generator))
        masks.log_variance.copy_(torch.randn(size, generator=generator))
    beta = 0.4
    keep = masks.keep(beta)
    mu, variance = masks.mu.detach(), masks.log_variance.detach().exp()
    assert torch.equal(keep.detach(), (mu**2 > variance).float())
    assert 0.2 < keep.mean() < 0.8
    keep.sum().backward()
    scores = torch.log(mu**2 + EPSILON) - masks.log_variance.detach()
    slope = beta * torch.sigmoid(beta * scores) * (1 - torch.sigmoid(beta * scores))
    torch.testing.assert_close(masks.log_variance.grad, -slope)
    torch.testing.assert_close(masks.mu.grad, slope * 2 * mu / (mu**2 + EPSILON), rtol=1e-4, atol=1e-6)


def test_masks_start_on_and_the_count_has_a_gradient_there():
    masks = VIBMasks(layout_of(_bert()))
    assert masks.scores().min() > 8.5
    masks.keep(0.4).sum().backward()
    assert masks.log_variance.grad.abs().min() > 1e-3
    # The slope of the published soft count (beta = 10) underflows.
    assert (torch.sigmoid(10 * masks.scores()) == 1).all()


def test_a_sublayer_without_units_and_units_without_a_sublayer_count_as_off():
    masks = VIBMasks(layout_of(_bert()))
    layout = masks.layout
    keep = torch.ones(layout.size)
    first, second = layout.sublayers[:2]
    keep[first.start : first.stop] = 0
    keep[second.gate] = 0
    counts = masks.counts(keep)
    assert counts.units[:2].tolist() == [0, 0] and counts.on[:2].tolist() == [0, 0]
    assert counts.on[2:].tolist() == [1] * (len(layout.sublayers) - 2)
    assert counts.units[2:].tolist() == [part.units for part in layout.sublayers[2:]]
    assert counts.hidden == layout.hidden


def test_structures_without_masks_stay_one():
    model = _bert()
    masks = random_masks(model, kinds=("ffn",))
    values = masks.evaluation_values()
    assert (values[: masks.layout.hidden] == 1).all() and (values[masks.layout.gates] == 1).all()
    assert 0 < (values[masks.layout.units] == 0).float().mean() < 0.5
    found = as_masks(masks.layout, values)
    assert found.hidden is None
    assert all((layer.attention == 1).all() for layer in found.stacks["encoder"])


@pytest.mark.parametrize(("family", "name"), ALL)
def test_evaluation_is_the_finalised_model(family, name):
    model = build(family, name)
    masks = random_masks(model, seed=2)
    inputs = inputs_for(model)
    before = outputs_of(model, inputs)
    hooks = MaskHooks(masks, 0.4, per_token=False)
    hooks.attach(model)
    expected = outputs_of(model, inputs)
    hooks.detach()
    for key, value in outputs_of(model, inputs).items():
        assert torch.equal(value, before[key])
    found = as_masks(masks.layout, masks.evaluation_values())
    with masked(copy.deepcopy(model), found) as other:
        again = outputs_of(other, inputs)
    select(fold(model, found), found.kept())
    actual = outputs_of(model, inputs)
    assert any(not torch.allclose(expected[key], before[key], atol=1e-2) for key in before)
    for key, value in expected.items():
        torch.testing.assert_close(again[key], value, atol=1e-5, rtol=1e-5)
        if value.shape != actual[key].shape:
            value = value[..., found.kept().hidden]
        torch.testing.assert_close(actual[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart", "vit"])
@pytest.mark.parametrize("kinds", [KINDS, ("heads", "ffn")], ids=["all", "plain"])
def test_frozen_ffns_compute_what_they_keep_and_nothing_else(family, kinds):
    model = build(family, dict(ALL)[family])
    masks = random_masks(model, seed=4, kinds=kinds)
    layout = masks.layout
    ffns = [index for index, part in enumerate(layout.sublayers) if part.kind == "ffn"]
    values = (masks.evaluation_values() != 0).to(masks.mu)
    # The first is whole, the second is gone, by its dims here and by its gate below.
    first, second = (layout.sublayers[index] for index in ffns[:2])
    values[first.start : first.stop] = values[first.gate] = 1
    values[second.start : second.stop] = 0
    for part in (layout.sublayers[index] for index in ffns[2:]):
        values[part.start : part.stop][0], values[part.start : part.stop][1], values[part.gate] = 1, 0, 1
    masks.harden(values)
    hooks = MaskHooks(masks, 0.4, per_token=False)
    hooks.attach(model)
    inputs = inputs_for(model)
    widths = {}
    for index in ffns:
        part = layout.sublayers[index]
        down = describe(model).stacks[part.stack].layers[part.layer].ffn.down
        hook = down.register_forward_pre_hook(
            lambda _module, args, index=index: widths.__setitem__(index, args[0].shape[-1])
        )
        hooks._handles.append(hook)

    def trained(model=model):
        model.zero_grad()
        outputs = {key: value for key, value in model(**inputs).items() if torch.is_tensor(value)}
        sum(value.square().sum() for value in outputs.values()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return outputs, {name: value.clone() for name, value in gradients.items() if value is not None}

    # In evaluation mode nothing but the masks differs: there is no dropout, and no noise.
    model.eval()
    wide = trained()
    assert set(widths.values()) == {first.units}
    hooks.frozen = True
    kept = [int(values[layout.sublayers[index].start : layout.sublayers[index].stop].sum()) for index in ffns]
    assert sum(0 < count < first.units for count in kept) == len(ffns) - 2 > 0
    torch.testing.assert_close(trained(), wide, atol=1e-5, rtol=1e-4)
    for mode in (True, False):
        trained(model.train(mode))
        assert [widths[index] for index in ffns] == [count or first.units for count in kept]
    if "hidden" not in kinds:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        # A copy is about its own weights.
        torch.testing.assert_close(trained(copied)[0], wide[0], atol=1e-5, rtol=1e-4)
    hooks.detach()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart", "vit"])
@pytest.mark.parametrize("per_token", [False, True])
def test_training_differs_in_the_noise_alone(family, per_token):
    model = build(family, dict(ALL)[family])
    masks = random_masks(model, seed=3)
    layout = masks.layout
    with torch.no_grad():
        masks.log_variance.fill_(-11.9)
        # Masks that are off are silent in training too, also noisy ones.
        masks.log_variance[masks.evaluation_values() == 0] = 3.0
    inputs = inputs_for(model)
    hooks = MaskHooks(masks, 0.4, per_token)
    hooks.attach(model)
    expected = outputs_of(model, inputs)
    _without_dropout(model.train())
    first, second = (outputs_of(model, inputs) for _ in range(2))
    assert any(not torch.equal(first[key], second[key]) for key in first)
    masks.sigma = lambda: torch.zeros(layout.size)
    for key, value in outputs_of(model, inputs).items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-5)


def _hooks_on_a_layer(per_token=False):
    """A model in training, with masks of which some are off, and the projection of its first FFN."""
    model = build("bert", "BertModel").train()
    masks = VIBMasks(layout_of(model))
    part = masks.layout.sublayers[1]
    with torch.no_grad():
        masks.mu.copy_(1.0 + 0.3 * torch.randn(masks.mu.shape))
        masks.log_variance.fill_(math.log(0.05))
        masks.log_variance[part.start : part.start + 5] = 3.0
        masks.log_variance[part.gate] = -40.0
    hooks = MaskHooks(masks, 0.4, per_token)
    hooks.attach(model)
    return masks, hooks, part, model.encoder.layer[0].output.dense


@pytest.mark.parametrize("per_token", [False, True])
def test_log_variances_get_the_mean_gradient(per_token):
    """In a likelihood, where the mean square of a sample's gradient is the second derivative: against draws."""
    torch.manual_seed(0)
    masks, hooks, part, _ = _hooks_on_a_layer(per_token)
    rows, units = 20_000, part.units
    states = torch.rand(units)
    like = torch.empty(rows, 1, 1)
    z = hooks._factors(part.start, part.stop, like)
    # Labels drawn from what the model says at the means: `-log N(y; z . states, 1)`.
    label = (masks.evaluation_values()[part.start : part.stop] * states).sum() + torch.randn(rows, 1)
    loss = 0.5 * ((z * states).sum(-1) - label).square().mean()
    loss.backward()
    gradient = masks.log_variance.grad[part.start : part.stop]
    variance = masks.log_variance.detach()[part.start : part.stop].exp()
    on = masks.evaluation_values()[part.start : part.stop] != 0
    spread = 1 + (variance * states.square() * on).sum()  # noise of the other units adds to that of the labels
    expected = 0.5 * variance * states.square() * spread * on
    assert not on[:5].any() and on[5:].sum() > 10
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=1e-4)


def test_batches_of_a_step_and_the_scale_of_the_loss_do_not_matter():
    torch.manual_seed(0)
    masks, hooks, part, down = _hooks_on_a_layer()
    inputs, direction = torch.randn(8, 3, part.units), torch.randn(8, 3, down.out_features)

    def gradients(batches: int, scale: float) -> list[torch.Tensor]:
        masks.zero_grad()
        torch.manual_seed(1)
        noise = torch.randn(8, 1, part.units)
        draws = iter(noise.chunk(batches))
        hooks.batches, hooks.loss_scale = batches, scale
        for states, target in zip(inputs.chunk(batches), direction.chunk(batches)):
            hooks._applied = None
            with pytest.MonkeyPatch.context() as patch:
                # The noise of everything else is nil.
                drawn = lambda *shape, **_: next(draws) if shape[-1] == part.units else torch.zeros(shape)  # noqa: E731
                patch.setattr(torch, "randn", drawn)
                loss = (down(states) * target).sum((1, 2)).mean() / batches
            (scale * loss).backward()
        return [parameter.grad / scale for parameter in (masks.mu, masks.log_variance)]

    whole = gradients(1, 1.0)
    assert whole[1][part.start : part.stop].abs().max() > 0
    for batches, scale in ((4, 1.0), (2, 1024.0)):
        for expected, found in zip(whole, gradients(batches, scale)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_one_draw_for_the_residual_stream():
    model = build("bert", "BertModel").train()
    _without_dropout(model)
    masks = VIBMasks(layout_of(model))
    with torch.no_grad():
        masks.log_variance.fill_(math.log(0.25))
    hooks = MaskHooks(masks, 0.4, per_token=False)
    hooks.attach(model)
    seen = []
    for module in (model.encoder.layer[0].output.dense, model.encoder.layer[1].output.dense):
        module.register_forward_hook(lambda module, args, output: seen.append(output / nn_linear(module, args[0])))
    model(**inputs_for(model))
    torch.testing.assert_close(seen[0][:, 0], seen[1][:, 0], rtol=1e-3, atol=1e-3)


def nn_linear(module, states):
    return torch.nn.functional.linear(states, module.weight, module.bias)


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("per_token", [False, True])
def test_noise_is_drawn_per_sequence_or_token(per_token):
    model = build("bert", "BertModel").train()
    masks = VIBMasks(layout_of(model))
    with torch.no_grad():
        masks.mu.fill_(1.0)
        masks.log_variance.fill_(math.log(0.25))
    hooks = MaskHooks(masks, 0.4, per_token)
    hooks.attach(model)
    part = masks.layout.sublayers[1]
    down = model.encoder.layer[0].output.dense
    seen = []
    down.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    down(torch.ones(4, 5, part.units))
    (states,) = seen
    assert (states[:, 0] != states[:, 1]).any() == per_token
    assert (states[0] != states[1]).all()
    # A unit's own noise and that of its sub-layer, both with a standard deviation of 0.5.
    assert 0.4 < states.std() < 1.0


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(4), LlamaRMSNorm(4)])
def test_a_norm_over_no_dims_at_all_is_nothing_not_nan(norm):
    """Masks that learn may turn off the whole residual stream for a step."""
    keep, states = torch.zeros(4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    handle = mask_norm(norm, lambda: keep)
    output = norm(states)
    output.sum().backward()
    handle.remove()
    assert (output == 0).all() and torch.isfinite(states.grad).all() and torch.isfinite(keep.grad).all()
