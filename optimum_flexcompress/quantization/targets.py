"""What int8 has to look like for a processor, and which one this is."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlexCompressError, nearest


@dataclass(frozen=True)
class Target:
    """A kind of processor.

    Attributes:
        name: What the user types.
        description: For `--help`.
        reduce_range: Whether weights must be 7-bit, because products of 8-bit numbers overflow.
        qdq: Whether the graph is written with QuantizeLinear and DequantizeLinear pairs around standard operators, for
            a runtime that chooses its own int8 kernels, instead of with ONNX Runtime's int8 operators.
        symmetric: Whether activations are int8 around zero instead of uint8.
        modes: What it can run.
    """

    name: str
    description: str
    reduce_range: bool = False
    qdq: bool = False
    symmetric: bool = False
    modes: tuple[str, ...] = ("dynamic", "static")


TARGETS = {
    target.name: target
    for target in (
        Target("avx2", "x86 without AVX-512: 7-bit weights", reduce_range=True),
        Target("avx512", "x86 with AVX-512 but without VNNI: 7-bit weights", reduce_range=True),
        Target("avx512_vnni", "x86 with VNNI (AVX-512 VNNI or AVX-VNNI): full 8 bits"),
        Target("arm64", "64-bit Arm"),
        Target(
            "tensorrt",
            "NVIDIA GPUs through TensorRT: static only, symmetric, QuantizeLinear/DequantizeLinear pairs",
            qdq=True,
            symmetric=True,
            modes=("static",),
        ),
    )
}
AUTO = "auto"
SLOW = (
    "This target has neither VNNI nor AMX: weights are 7-bit, against overflow, and int8 takes a quarter of the memory "
    "but hardly less time than single precision."
)


def find_target(name: str, mode: str) -> Target:
    """The target of that name.

    Args:
        name: A key of `TARGETS`, or `auto` for the processor of this machine.
        mode: `dynamic` or `static`.

    Raises:
        FlexCompressError: The name or the mode is not known, or they do not go together.
    """
    if mode not in ("dynamic", "static"):
        raise FlexCompressError(f"{mode!r} is no quantization mode.{nearest(mode, ('dynamic', 'static'))}")
    if name == AUTO:
        name = detect_target()
    if name not in TARGETS:
        raise FlexCompressError(f"{name!r} is no quantization target.{nearest(name, [*TARGETS, AUTO])}")
    target = TARGETS[name]
    if mode not in target.modes:
        raise FlexCompressError(f"The target {name} runs static int8 only: choose --mode static, and give --dataset.")
    return target


def detect_target() -> str:
    """The target that fits the processor of this machine."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    flags = cpu_flags()
    if flags & {"avx512_vnni", "avx_vnni"}:
        return "avx512_vnni"
    return "avx512" if "avx512f" in flags else "avx2"


def cpu_flags() -> set[str]:
    """The instruction sets that the operating system reports; empty where it reports none (macOS, Windows)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
