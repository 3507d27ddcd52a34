"""The runtimes that int8 models can be made for. A further one is one entry and one function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import FlexCompressError, nearest


@dataclass(frozen=True)
class Backend:
    """A runtime.

    Attributes:
        name: What the user types.
        description: For people.
        function: `module:function`. It is called as [`optimum_flexcompress.quantization.quantize_folder`] is, with the
            model, the output folder, `mode`, `target` and the keyword arguments after those, refuses what it does not
            know with a `FlexCompressError`, and returns an object with `path` and `summary()`. Its module is imported
            when it is first used, so that a runtime that is not installed disturbs no other.
    """

    name: str
    description: str
    function: str

    @property
    def quantize(self) -> Callable[..., Any]:
        """The function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


BACKENDS = {
    backend.name: backend
    for backend in (Backend("ort", "ONNX Runtime", "optimum_flexcompress.quantization.folder:quantize_folder"),)
}


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        FlexCompressError: The name is not known.
    """
    if name not in BACKENDS:
        raise FlexCompressError(f"{name!r} is no quantization backend.{nearest(name, BACKENDS)}")
    return BACKENDS[name]
