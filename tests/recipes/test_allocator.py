"""Freed memory is kept while a model trains on a CPU, and given back afterwards; in processes with an untouched heap."""

import json
import os
import subprocess
import sys

import pytest
import torch

from optimum_flexcompress.recipes.allocator import keeping_freed_memory


PREAMBLE = """
import json, os, resource
import torch
from optimum_flexcompress.recipes import allocator
from optimum_flexcompress.recipes.allocator import keeping_freed_memory

def make(megabytes=128):
    torch.zeros(megabytes << 18).add_(1)

def faults(megabytes=128):
    "New pages that the kernel finds for something large, the second time that it is made."
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        make(megabytes)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    "In megabytes."
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

found = {}
"""
on_a_cpu = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="the memory of an accelerator is another matter"
)


def found_by(code, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{PREAMBLE}{code}\nprint(json.dumps(found))"],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@on_a_cpu
def test_what_is_freed_is_used_again():
    found = found_by("""
found["before"] = faults()
with keeping_freed_memory():
    found["within"], found["kept"] = faults(), resident()
found["given back"] = resident()
# Larger than the gaps that the heap may have now: in those, glibc keeps what is freed, as ever.
found["after"], found["left"] = faults(512), resident()
""")
    assert found["within"] < found["before"] / 10 and found["given back"] < found["kept"] - 64
    assert found["after"] > 2 * found["before"] and found["left"] < found["given back"] + 64


def test_the_environment_has_the_last_word():
    found = found_by(
        """
found["before"] = faults()
with keeping_freed_memory() as kept:
    found["within"], found["none"] = faults(), kept is None
""",
        MALLOC_ARENA_MAX="2",
    )
    assert found["none"] and found["within"] > found["before"] / 2


@on_a_cpu
def test_what_piles_up_is_given_back():
    found = found_by("""
allocator._SETTLED = 3
with keeping_freed_memory() as kept:
    for _ in range(3):
        kept.step()
    make(2 * resident())
    found["grown"] = resident()
    kept.step()
    found["given back"] = resident()
    # What is needed is found out anew.
    make(2 * resident())
    found["grown again"] = resident()
    for _ in range(4):
        kept.step()
    found["needed"] = resident()
""")
    assert found["given back"] < 0.6 * found["grown"]
    assert found["needed"] > 0.9 * found["grown again"] > 1.5 * found["given back"]


def huge_pages_on_advice():
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return "[madvise]" in file.read()
    except FileNotFoundError:
        return False


@on_a_cpu
@pytest.mark.skipif(not huge_pages_on_advice(), reason="the kernel gives huge pages to all or to nobody")
def test_pages_are_huge():
    found = found_by("""
def huge():
    "Megabytes of huge pages while something large is there."
    piece = torch.zeros(128 << 18).add_(1)
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("AnonHugePages")) >> 10
found["before"] = huge()
with keeping_freed_memory() as kept:
    found["within"] = huge()
    allocator._SETTLED = 1
    kept.step()
    make(4 * resident())
    kept.step()
    # What comes after all was given back.
    found["again"] = huge()
found["after"] = huge()
""")
    # Pages that something small is still in stay as they are.
    assert found["before"] == 0 and found["after"] < 64
    assert found["within"] > 96 and found["again"] > 96


@on_a_cpu
def test_it_ends_with_an_error():
    found = found_by("""
found["before"] = faults()
try:
    with keeping_freed_memory():
        raise KeyError
except KeyError:
    found["after"] = faults()
""")
    assert found["after"] > found["before"] / 2
    with pytest.raises(KeyError), keeping_freed_memory():
        raise KeyError
