"""Dropout from whole random words: what `torch.nn.functional.dropout` does, by other random numbers."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from optimum_flexcompress.recipes.dropout import dropout, fast_dropout


on_a_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="nothing is replaced beside an accelerator")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_shares_and_scale(dtype, p):
    torch.manual_seed(0)
    values = torch.ones(1 << 20, dtype=dtype)
    dropped = dropout(values, p)
    assert dropped.dtype == dtype and dropped.shape == values.shape
    gone, scale = dropped.double().unique().tolist()
    assert gone == 0 and scale == pytest.approx(1 / (1 - p), rel=0.01)
    # Six standard deviations, in all and in each part of the random words.
    for lane in (dropped, *dropped.view(-1, 4).unbind(1)):
        share = (lane == 0).double().mean().item()
        assert share == pytest.approx(p, abs=6 * (p * (1 - p) / lane.numel()) ** 0.5)
    assert dropped.double().mean().item() == pytest.approx(1, abs=0.02)


def test_neighbours_are_independent():
    torch.manual_seed(0)
    gone = (dropout(torch.ones(1 << 20), 0.5) == 0).double() - 0.5
    for distance in (1, 2, 3, 4, 8):
        assert (gone[distance:] * gone[:-distance]).mean().item() == pytest.approx(0, abs=6 * 0.25 / 2**10)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0), (2, 3, 4, 7)])
def test_gradients_go_where_values_go(shape):
    torch.manual_seed(0)
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    result = dropout(values, 0.3)
    result.sum().backward()
    torch.testing.assert_close(values.grad * values, result)
    assert values.grad.unique().numel() <= 2


def test_layout_of_the_input_does_not_matter():
    values = torch.randn(64, 32).t().requires_grad_()
    torch.manual_seed(0)
    one = dropout(values, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(dropout(values.contiguous(), 0.5), one, rtol=0, atol=0)


def test_seeds_and_states_of_the_generator_decide():
    values = torch.ones(100)
    torch.manual_seed(0)
    first, state = dropout(values, 0.5), torch.get_rng_state()
    second = dropout(values, 0.5)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dropout(values, 0.5), second)


def test_rates_at_the_ends():
    values = torch.ones(1000)
    assert dropout(values, 1e-6) is values
    assert torch.isfinite(dropout(values, 1 - 1e-9)).all()


@on_a_cpu
def test_it_is_replaced_within_the_block_alone(monkeypatch):
    calls = []
    monkeypatch.setattr("optimum_flexcompress.recipes.dropout.dropout", lambda values, p: calls.append(p) or values)
    values, layer = torch.ones(8), nn.Dropout(0.2)
    with fast_dropout():
        layer(values)
        functional.dropout(values, p=0.3)
        functional.dropout(values, 0.4, True)
    assert calls == [0.2, 0.3, 0.4]
    layer(values)
    assert len(calls) == 3


@on_a_cpu
@pytest.mark.parametrize(
    "call",
    [
        lambda values: functional.dropout(values, 0.5, training=False),
        lambda values: functional.dropout(values, 0.0),
        lambda values: functional.dropout(values, 1.0),
        lambda values: functional.dropout(values.clone(), 0.5, inplace=True),
        lambda values: functional.dropout(values.to("meta"), 0.5),
        lambda values: functional.dropout1d(values[None, None], 0.5),
    ],
    ids=["evaluation", "nothing", "everything", "in place", "elsewhere", "channels"],
)
def test_the_rest_is_as_it_was(call, monkeypatch):
    values = torch.ones(8)
    torch.manual_seed(0)
    expected = call(values)
    monkeypatch.setattr("optimum_flexcompress.recipes.dropout.dropout", None)
    torch.manual_seed(0)
    with fast_dropout():
        found = call(values)
    assert found.device == expected.device and (found.is_meta or torch.equal(found, expected))


@on_a_cpu
def test_autocast_and_recomputed_activations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    values = torch.randn(16, 8)

    def gradient(recompute):
        torch.manual_seed(1)
        model.zero_grad()
        with fast_dropout(), torch.autocast("cpu", dtype=torch.bfloat16):
            if recompute:
                result = torch.utils.checkpoint.checkpoint(model, values, use_reentrant=False)
            else:
                result = model(values)
            result.sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for one, two in zip(gradient(False), gradient(True), strict=True):
        torch.testing.assert_close(one, two)
