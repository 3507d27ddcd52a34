"""What the tests of training share."""

from __future__ import annotations

import pytest

from optimum_flexcompress.methods.length_adaptive import LengthAdaptiveMethod


@pytest.fixture
def drawn(monkeypatch):
    """The sub-models of every pass, as `(step, pass name, sub-model)`."""
    seen = []
    original = LengthAdaptiveMethod.sub_model

    def sub_model(self, step):
        seen.append((step.global_step, step.pass_name, original(self, step)))
        return seen[-1][2]

    monkeypatch.setattr(LengthAdaptiveMethod, "sub_model", sub_model)
    return seen
