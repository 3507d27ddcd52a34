"""These run where IPEX is: `make test-ipex` makes that environment and says so."""

from __future__ import annotations

import os

import pytest
import torch


collect_ignore_glob = [] if os.environ.get("FLEXCOMPRESS_LANE") == "ipex" else ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
