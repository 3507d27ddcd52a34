"""A Hub on loopback, and a process that sees it as the Hugging Face Hub."""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.hub.server import Hub


USERS = {
    "hf_ada": ("ada", "write", ("analysts",)),
    "hf_reader": ("ada", "read", ()),
    "hf_bob": ("bob", "write", ()),
}


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """The server. Its users are `ada`, who is in the organization `analysts` too, and `bob`."""
    server = Hub(USERS)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class Client:
    """Another process, whose `HF_ENDPOINT` is the server: the Hub's client reads it when it is imported."""

    def __init__(self, pool: ProcessPoolExecutor):
        self._pool = pool

    def __call__(self, function: Callable, *arguments: Any, token: str | None = "hf_ada", **more: Any) -> Any:
        """What a function of a test module returns there, for the user with a token."""
        return self._pool.submit(_as_user, token, function, arguments, more).result()

    def cli(self, *arguments: Any, token: str | None = "hf_ada", **more: Any) -> tuple[int, str, str]:
        """Runs `optimum-cli flexcompress` and returns its exit code, its output and its errors."""
        return self(_cli, [str(argument) for argument in arguments], token=token, **more)


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory) -> Iterator[Client]:
    """Runs functions and commands against the Hub, as `ada` unless told otherwise."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf-home")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            assert pool.submit(_endpoint).result() == hub.url
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        yield Client(pool)


def _endpoint() -> str:
    from huggingface_hub.constants import ENDPOINT

    return ENDPOINT


def _as_user(token: str | None, function: Callable, arguments: tuple, more: dict[str, Any]) -> Any:
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    return function(*arguments, **more)


def _cli(arguments: list[str], impatient: bool = False) -> tuple[int, str, str]:
    """Runs one command; `impatient`, the waits between the attempts of the Hub's client are left out."""
    from unittest.mock import patch

    from optimum.commands.flexcompress.group import FlexCompressGroupCommand

    parser = argparse.ArgumentParser("optimum-cli")
    FlexCompressGroupCommand(parser.add_subparsers())
    out, err = io.StringIO(), io.StringIO()
    code = 0
    waits = patch("huggingface_hub.utils._http.time.sleep") if impatient else contextlib.nullcontext()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), waits:
        try:
            args = parser.parse_args(["flexcompress", *arguments])
            args.func(args).run()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()
