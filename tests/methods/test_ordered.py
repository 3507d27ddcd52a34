"""Layer matching while a model loses layers (CoFi)."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_flexcompress import DistillationConfig, FlexCompressConfig, FlexCompressError
from optimum_flexcompress.methods.distillation.hidden_states import hidden_state_loss
from optimum_flexcompress.methods.distillation.ordered import (
    identity_projection,
    match_layers,
    ordered_loss,
    spread_layers,
)
from tests.methods.toys import data_of, model_of, train, twin
from tests.methods.vib.helpers import config_of


def _reference(distances, existing):
    """The matching in plain Python."""
    last, found = len(distances[0]), []
    for row in reversed(distances):
        allowed = [i for i in range(len(row)) if i < last and existing[i]]
        last = min(allowed, key=lambda i: row[i]) if allowed else last
        found.insert(0, last)
    return found


def test_matching_is_in_order_and_skips_what_is_gone():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        distances = torch.rand(4, 7, generator=generator)
        existing = torch.rand(7, generator=generator) < 0.6
        existing[3] = True
        matches = match_layers(distances, existing).tolist()
        assert matches == _reference(distances.tolist(), existing.tolist())
        assert matches == sorted(matches) and all(existing[i] for i in matches)
    assert match_layers(distances, None).tolist() == _reference(distances.tolist(), [True] * 7)
    assert match_layers(distances, torch.zeros(7, dtype=torch.bool)).tolist() == [6] * 4


def test_a_teacher_teaches_itself_nothing():
    states = list(torch.randn(7, 2, 5, 8).unbind())
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    wanted = [states[i - 1] for i in spread_layers(7)]
    projection = identity_projection(8, 8)
    assert ordered_loss(states, wanted, valid, projection, None).item() == 0
    existing = torch.tensor([1, 0, 1, 0, 1, 0, 1]).bool()
    moved = ordered_loss(states, wanted, valid, projection, existing)
    states = [torch.where(valid[..., None], state, 99.0) for state in states]
    torch.testing.assert_close(ordered_loss(states, wanted, valid, projection, existing), moved)


def test_the_loss_is_that_of_the_matched_pairs():
    generator = torch.Generator().manual_seed(1)
    student = [torch.randn(2, 5, 6, generator=generator, requires_grad=True) for _ in range(5)]
    teacher = [torch.randn(2, 5, 8, generator=generator) for _ in range(2)]
    projection = identity_projection(6, 8)
    pairs = [[hidden_state_loss(projection(s), t, None).detach() for s in student] for t in teacher]
    matches = match_layers(torch.tensor(pairs), None)
    expected = sum(pairs[i][j] for i, j in enumerate(matches)) / 2
    loss = ordered_loss(student, teacher, None, projection, None)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert {i for i, state in enumerate(student) if state.grad.any()} == set(matches.tolist())
    assert projection.weight.grad.any()


def test_teacher_layers_are_spread():
    assert spread_layers(12) == [3, 6, 9, 12]
    assert spread_layers(6) == [2, 3, 5, 6]
    assert spread_layers(3) == [1, 2, 3]


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert "_local_scalar_dense" not in name and "nonzero" not in name, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def test_matching_never_waits_for_the_device():
    student, teacher = list(torch.randn(5, 2, 4, 8).unbind()), list(torch.randn(2, 2, 4, 8).unbind())
    valid, existing = torch.ones(2, 4).bool(), torch.tensor([1, 1, 0, 1, 0]).bool()
    projection = identity_projection(8, 8)
    with _NoWaiting():
        ordered_loss(student, teacher, valid, projection, existing).backward()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_model_that_is_pruned_learns_layer_by_layer(tmp_path, family):
    teacher = model_of(family, layers=3)
    methods = [config_of(), DistillationConfig(hidden_states_weight=1.0, layer_map="ordered")]
    trainer = train(tmp_path, twin(teacher), teacher, data_of(family, 32), methods, max_steps=80)
    terms = [name for name in trainer.state.log_history[0] if name.startswith("loss_hidden_states")]
    assert len(terms) == (2 if family == "t5" else 1)
    for name in terms:
        values = [entry[name] for entry in trainer.state.log_history if name in entry]
        # The student starts as its teacher, with a little noise.
        assert values[0] < 0.1 * max(values) and values[-1] < max(values)


def test_what_ordered_matching_cannot_do():
    with pytest.raises(FlexCompressError, match="hidden_states_weight above 0"):
        DistillationConfig(layer_map="ordered")
    with pytest.raises(FlexCompressError, match="attention_weight=0"):
        DistillationConfig(layer_map="ordered", hidden_states_weight=1.0, attention_weight=1.0)
    with pytest.raises(FlexCompressError, match='give "uniform", "ordered"'):
        DistillationConfig(layer_map="order")
    config = FlexCompressConfig(methods=[DistillationConfig(layer_map="ordered", hidden_states_weight=1.0)])
    assert FlexCompressConfig(methods=config.to_dict()["methods"]) == config
