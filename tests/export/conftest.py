"""Exports every model once for all tests that look at it."""

from __future__ import annotations

import functools

import pytest
import torch

from optimum_flexcompress.export import export_onnx
from tests.export.exported import make


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """`exported(family, class name, kind) -> (PyTorch model, folder)`."""
    root = tmp_path_factory.mktemp("exported")

    @functools.cache
    def export(family: str, name: str, kind: str):
        model = make(family, name, kind)
        folder = root / f"{family}-{name}-{kind}"
        # The tests compare by themselves, at other lengths.
        export_onnx(model, folder, validate=False)
        return model, folder

    return export
