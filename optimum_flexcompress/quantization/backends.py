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
        target_function: `module:function`, called with a target and a mode; refuses what the runtime does not have, and
            returns the target as an object with a `name` (`auto` resolved).
        function: `module:function`. It is called as [`optimum_flexcompress.quantization.quantize_folder`] is, with the
            model, the output folder, `mode`, `target` and the keyword arguments after those, refuses what it does not
            know with a `FlexCompressError`, and returns an object with `path` and `summary()`. Its module is imported
            when it is first used, so that a runtime that is not installed disturbs no other.
    """

    name: str
    description: str
    target_function: str
    function: str

    @property
    def find_target(self) -> Callable[[str, str], Any]:
        """What checks a target and a mode, before any long work."""
        return _load(self.target_function)

    @property
    def quantize(self) -> Callable[..., Any]:
        """What makes the int8 model."""
        return _load(self.function)


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "ort",
            "ONNX Runtime",
            "optimum_flexcompress.quantization.targets:find_target",
            "optimum_flexcompress.quantization.folder:quantize_folder",
        ),
        Backend(
            "ipex",
            "Intel Extension for PyTorch",
            "optimum_flexcompress.quantization.ipex_config:find_ipex_target",
            "optimum_flexcompress.quantization.ipex:quantize_ipex",
        ),
        Backend(
            "openvino",
            "OpenVINO",
            "optimum_flexcompress.quantization.openvino:find_target",
            "optimum_flexcompress.quantization.openvino:quantize_openvino",
        ),
        Backend(
            "torchao",
            "PyTorch on CUDA, through torchao",
            "optimum_flexcompress.quantization.torchao_int8:find_target",
            "optimum_flexcompress.quantization.torchao_int8:quantize_torchao",
        ),
    )
}


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        FlexCompressError: The name is not known.
    """
    if name == "tensorrt":
        raise FlexCompressError("TensorRT runs what ONNX Runtime runs: choose --backend ort --target tensorrt.")
    if name not in BACKENDS:
        raise FlexCompressError(f"{name!r} is no quantization backend.{nearest(name, BACKENDS)}")
    return BACKENDS[name]
