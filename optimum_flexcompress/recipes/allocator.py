"""How the C library handles freed memory while a model trains on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


# Parameters of glibc's mallopt, and pieces of advice of Linux' madvise.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_HUGE, _USUAL_PAGES = 14, 15
# What glibc's own, dynamic thresholds come to once something large has been freed, and its default.
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
# Nothing is mapped by itself, and the top of the heap is never given back.
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
# Of the memory that is available, what the heap may grow to in huge pages.
_RESERVED = 0.8
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
            _reserve_huge_pages()
            self._steps = 0


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[KeptMemory | None]:
    """Lets the process keep, while the block runs, what it frees.

    A training step frees what the next one allocates again. By default glibc hands large pieces back to the kernel, which
    then has to find and clear every page anew (examples/benchmarks/cpu_training.py says what that costs), and scattered
    ones in the end, so pages are huge where the kernel has such (`transparent_hugepage`). Yields None, and changes nothing,
    where [`keeps_freed_memory`] is false.
    """
    if not keeps_freed_memory():
        yield None
        return
    libc = ctypes.CDLL(None)
    for parameter, value in _KEPT.items():
        libc.mallopt(parameter, value)
    _reserve_huge_pages()
    try:
        yield KeptMemory()
    finally:
        for parameter, value in _USUAL.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
        _advise_heap(_USUAL_PAGES)


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


def _reserve_huge_pages() -> None:
    """Has the heap grow, in addresses only: pages come when they are written to, and huge ones where that was advised
    before.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    room = int(_RESERVED * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    # Where that is too much, the heap stays as it is.
    piece = libc.malloc(room)
    _advise_heap(_HUGE)
    libc.free(piece)


def _advise_heap(advice: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open("/proc/self/maps", encoding="utf-8") as file:
        heaps = [line.split()[0] for line in file if line.rstrip().endswith("[heap]")]
    for heap in heaps:
        start, stop = (int(address, 16) for address in heap.split("-"))
        # A kernel without huge pages says no, and nothing is lost.
        libc.madvise(start, stop - start, advice)


def _resident_pages() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1])
