"""What every test starts from."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from optimum_flexcompress.architectures import ARCHITECTURES


@pytest.fixture(autouse=True)
def own_mixed_precision(monkeypatch):
    """`TrainingArguments(bf16=True)` sets a variable that all later trainers of the process would follow."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(autouse=True)
def own_verbosity():
    """`compress` makes Transformers quiet, and with it what this package logs."""
    logging.set_verbosity_warning()


@pytest.fixture(autouse=True)
def own_architectures():
    """A page of the documentation registers a family, which no other test is to find."""
    before = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)
