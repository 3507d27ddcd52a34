"""How the C library handles freed memory while a model trains on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# What glibc's own, dynamic thresholds come to once something large has been freed, and its default.
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
# Batches of all lengths have been seen by then.
_SETTLED = 20
_GROWTH = 1.25


class KeptMemory:
    """What [`keeping_freed_memory`] keeps."""

    def __init__(self):
        self._steps, self._settled = 0, 0

    def step(self) -> None:
        """To be called after each training step: gives all back where pieces of many sizes have come to take more
        than steps need, a quarter more than after the first of them.
        """
        self._steps += 1
        if self._steps == _SETTLED:
            self._settled = _resident_pages()
        elif self._steps > _SETTLED and _resident_pages() > _GROWTH * self._settled:
            ctypes.CDLL(None).malloc_trim(0)
            self._steps = 0


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[KeptMemory | None]:
    """Lets the process keep, while the block runs, what it frees.

    A training step frees what the next one allocates again. By default glibc hands large pieces back to the kernel, which
    then has to find and clear every page anew (examples/benchmarks/cpu_training.py says what that costs). Yields None,
    and changes nothing, where [`keeps_freed_memory`] is false.
    """
    if not keeps_freed_memory():
        yield None
        return
    libc = ctypes.CDLL(None)
    for parameter, value in _KEPT.items():
        libc.mallopt(parameter, value)
    try:
        yield KeptMemory()
    finally:
        for parameter, value in _USUAL.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def keeps_freed_memory() -> bool:
    """Whether freed memory can be kept: on Linux with glibc, where no accelerator trains, and unless the environment
    says how memory is to be handled (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    import torch

    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform != "linux" or told or torch.accelerator.is_available():
        return False
    # musl has neither.
    return all(hasattr(ctypes.CDLL(None), name) for name in ("mallopt", "malloc_trim"))


def _resident_pages() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1])
