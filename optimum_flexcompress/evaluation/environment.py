"""Where a figure was measured: processor, instruction sets that matter to int8, threads, versions."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .formatting import counted


# In the order of what int8 kernels gain from them; the last three are Arm's.
INT8_FLAGS = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
)
# From this many cores on, what other processes take shows in the figures.
BUSY = 0.3
PACKAGES = (
    "optimum-flexcompress",
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "intel-extension-for-pytorch",
    "openvino",
    "nncf",
    "torchao",
    "datasets",
    "numpy",
)


# What one line has room for.
_NAMED = ("torch", "transformers", "onnxruntime", "intel-extension-for-pytorch")


def environment_info(threads: int | None = None) -> dict[str, Any]:
    """Describes this machine and its software, for reports.

    Args:
        threads: Threads that the measurements use; None: PyTorch's present number.

    Returns:
        `cpu`, `flags`, `cores`, `usable_cores`, `threads`, `memory_bytes`, `gpu`, `system`, `python`, `versions`.
    """
    model, flags = _processor()
    return {
        "cpu": model,
        "flags": [flag for flag in INT8_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "threads": threads if threads is not None else torch.get_num_threads(),
        "memory_bytes": _memory(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
    }


def describe_environment(info: dict[str, Any]) -> str:
    """One line for the foot of a table.

    Args:
        info: What [`environment_info`] returned.
    """
    versions = info["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in _NAMED if name in versions)
    flags = " ".join(info["flags"]) or "no int8 instruction sets found"
    cores, threads = counted(info["usable_cores"], "core"), counted(info["threads"], "thread")
    text = f"{info['cpu']} ({cores}; {flags}), {threads}; {named}"
    for lane, other in info.get("lanes", {}).items():
        named = ", ".join(f"{name} {other['versions'][name]}" for name in _NAMED if name in other["versions"])
        text += f"; lane {lane}: {named}"
    if (info.get("busy_cores") or 0.0) > BUSY:
        text += (
            f". Other processes kept {info['busy_cores']:.1f} cores busy before the timing began: times and speed-ups "
            "are not to be relied on"
        )
    return text


def busy_cores(seconds: float = 0.5) -> float | None:
    """How many cores other processes keep busy, looked at while this one waits.

    Args:
        seconds: How long to look.

    Returns:
        Cores' worth of time, 0 on an idle machine; None where the system does not tell.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def ticks() -> tuple[int, int]:
        values = [int(value) for value in stat.read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
        return sum(values), values[3] + values[4]  # all, and idle or waiting for the disk

    before = ticks()
    time.sleep(seconds)
    after = ticks()
    total = after[0] - before[0]
    return (os.cpu_count() or 1) * (1 - (after[1] - before[1]) / total) if total else None


def _usable_cores() -> int:
    """Cores this process may run on, which a container or `taskset` may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> tuple[str, set[str]]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    # Arm kernels write "Features" and no model name.
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), flags


def _memory() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # absent packages are simply not listed
    return versions
