"""The folders that the pages name, and the Hub of the tests of pushing."""

from __future__ import annotations

import shutil

import pytest

from tests.docs.world import make_world
from tests.hub.conftest import client, hub  # noqa: F401  fixtures


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """See [`make_world`]; not to be written to."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def workplace(world, tmp_path):
    """A copy of it."""
    return shutil.copytree(world, tmp_path / "work")
