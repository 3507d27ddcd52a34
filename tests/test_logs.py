"""Messages follow the verbosity of Transformers and of Optimum."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from optimum.utils import logging as optimum_logging
from transformers.utils import logging as transformers_logging

import optimum_flexcompress  # noqa: F401


OURS = logging.getLogger("optimum_flexcompress.somewhere")


@pytest.fixture(autouse=True)
def verbosity():
    libraries = (transformers_logging, optimum_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_warning()
    yield
    for library, level in zip(libraries, before):
        library.set_verbosity(level)
    logging.getLogger("optimum_flexcompress").setLevel(logging.NOTSET)


@pytest.mark.parametrize("library", [transformers_logging, optimum_logging])
def test_the_quieter_library_counts(library, caplog):
    OURS.warning("seen")
    OURS.info("not seen")
    library.set_verbosity_error()
    OURS.warning("too quiet")
    assert caplog.messages == ["seen"]


def test_both_have_to_ask_for_more(caplog):
    transformers_logging.set_verbosity_info()
    OURS.info("not yet")
    optimum_logging.set_verbosity_info()
    OURS.info("now")
    assert caplog.messages == ["now"]


def test_a_level_that_was_set_for_a_while_leaves_nothing_behind(caplog):
    with caplog.at_level(logging.INFO, logger="optimum_flexcompress"):
        OURS.info("seen")
    transformers_logging.set_verbosity_error()
    OURS.warning("too quiet")
    assert caplog.messages == ["seen"]


def test_a_level_of_its_own_wins(caplog):
    transformers_logging.set_verbosity_error()
    logging.getLogger("optimum_flexcompress").setLevel(logging.INFO)
    OURS.info("seen")
    assert caplog.messages == ["seen"]


PROGRAM = """
import logging, optimum_flexcompress
logger = logging.getLogger("optimum_flexcompress.somewhere")
logger.warning("a warning")
logger.info("an info")
logging.basicConfig(format="mine %(message)s")
logger.error("an error")
"""


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [("info", ["a warning", "an info", "mine an error"]), ("error", ["mine an error"])],
)
def test_the_variable_and_what_is_shown(verbosity, shown, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", verbosity)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300)
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.endswith(("a warning", "an info", "an error"))] == shown
