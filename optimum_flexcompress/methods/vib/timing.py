"""How long the sub-layers of a model take, timed where they are.

A few copies of the model run, of which every layer has other sizes, and hooks note when a sub-layer starts and ends.
What is left of the time of a forward pass, which is embeddings, residual sums, post-LN norms and the head, depends on
the width alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...architectures import ModelView, describe
from ...kept import Kept, KeptLayer
from ...surgery import select
from .layout import ATTENTION, CROSS_ATTENTION, FFN
from .probe import sample_inputs, sample_length


HEADS = (0.0, 0.25, 0.5, 0.75, 1.0)
DIMS = (0.02, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
"""The sizes that are timed, as shares of the dense ones."""

WARMUP_RUNS, FEWEST_RUNS, MOST_RUNS, SECONDS = 2, 5, 200, 2.0
"""Runs of a copy: untimed, and as many timed ones as fit into some seconds, within bounds."""

KINDS = (ATTENTION, CROSS_ATTENTION, FFN)

Place = tuple[str, int, str]
"""Stack, layer and kind of a sub-layer."""


@dataclass(frozen=True)
class Workload:
    """What is timed, and where.

    Attributes:
        batch_size: Samples in a forward pass.
        sequence_length: Tokens of each; `None` for images.
        device: `cpu` or `cuda`, with an index.
        threads: PyTorch's threads on the CPU.
    """

    batch_size: int
    sequence_length: int | None
    device: str
    threads: int

    @classmethod
    def of(cls, view: ModelView, batch_size: int, sequence_length: int | None, device: torch.device) -> Workload:
        """The workload for a model, its default length filled in."""
        return cls(batch_size, sample_length(view, sequence_length), str(device), torch.get_num_threads())

    def __str__(self) -> str:
        length = "" if self.sequence_length is None else f" x {self.sequence_length} tokens"
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        return f"{self.batch_size}{length} on {where}"


def time_forward(model: PreTrainedModel, workload: Workload) -> float:
    """How long a forward pass takes, in milliseconds."""
    return typical([total for total, _ in _runs(copy.deepcopy(model), workload)])


def typical(milliseconds: list[float]) -> float:
    """The lower quartile of several times: what else goes on on a machine only ever adds to them."""
    return float(np.percentile(milliseconds, 25))


def grid(size: int, shares: tuple[float, ...], step: int = 1) -> list[int]:
    """Shares of a size, in steps, ascending."""
    found = {min(max(round(share * size / step) * step, min(step, size)), size) for share in shares}
    return sorted(found)


def plan_copies(view: ModelView) -> list[dict[Place, int]]:
    """Sizes for the layers of as many copies of the model as it takes to see every size of the grids once."""
    apart = _apart(view)
    plans: list[dict[Place, int]] = []
    for name, stack in view.stacks.items():
        for kind in (ATTENTION, CROSS_ATTENTION, FFN):
            layers = [layer for layer in stack.layers if getattr(layer, kind) is not None]
            if not layers:
                continue
            most = max(_units(layer, kind) for layer in layers)
            sizes = grid(most, DIMS, 8 if most >= 64 else 1) if kind == FFN else grid(most, HEADS)
            queue = sizes[::-1]
            layers = [layer for layer in layers if (name, layer.index, kind) not in apart] or layers
            for number in range(-(-len(queue) // len(layers))):
                if number == len(plans):
                    plans.append({})
                for index, layer in enumerate(layers):
                    size = queue[(number * len(layers) + index) % len(queue)]
                    plans[number][name, layer.index, kind] = min(size, _units(layer, kind))
    return plans


def _units(layer: Any, kind: str) -> int:
    part = getattr(layer, kind)
    return part.size if kind == FFN else part.num_kv_heads


def _apart(view: ModelView) -> set[Place]:
    """The first self-attentions of stacks with a position bias, which they compute too."""
    found = set()
    for name, stack in view.stacks.items():
        layers = [layer.index for layer in stack.layers if layer.attention is not None]
        if stack.table.attention.position_bias is not None and len(layers) > 1:
            found.add((name, layers[0], ATTENTION))
    return found


@dataclass
class Times:
    """What runs of copies at one width took, in milliseconds.

    Attributes:
        sublayers: For `<stack>.<kind>` and units, all times.
        others: For every run what its other parts took, together with those sub-layers, by the same key, whose times
            say more than their sizes do.
    """

    sublayers: dict[tuple[str, int], list[float]]
    others: list[tuple[float, list[tuple[str, int]]]]


def time_copy(model: PreTrainedModel, width: int, plan: dict[Place, int], workload: Workload, times: Times) -> None:
    """Runs a copy of a model with the sizes of a plan, and adds to `times`."""
    view = describe(model)
    stacks = {
        name: [
            KeptLayer(layer.index, *(_range(plan.get((name, layer.index, kind))) for kind in KINDS))
            for layer in stack.layers
        ]
        for name, stack in view.stacks.items()
    }
    small = select(copy.deepcopy(model), Kept(range(width), stacks))
    apart = _apart(view)
    for total, parts in _runs(small, workload):
        left = []
        for place, (units, milliseconds) in parts.items():
            key = (f"{place[0]}.{place[2]}", units)
            if place in apart:
                left.append(key)
            else:
                times.sublayers.setdefault(key, []).append(milliseconds)
                total -= milliseconds
        times.others.append((total, left))


def _range(size: int | None) -> range | None:
    return None if size is None else range(size)


@torch.no_grad()
def _runs(model: PreTrainedModel, workload: Workload) -> Iterator[tuple[float, dict]]:
    """Runs a model and yields milliseconds: of the whole pass, and of every sub-layer with its units."""
    device = torch.device(workload.device)
    model = model.eval().to(device)
    view = describe(model)
    inputs = sample_inputs(view, workload.sequence_length, workload.batch_size)
    clock = _Clock(device)
    handles = [handle for name, part in _sublayers(view) for handle in clock.watch(name, *part)]
    try:
        for _ in range(WARMUP_RUNS):
            model(**inputs)
        began, count = time.perf_counter(), 0
        while count < FEWEST_RUNS or (count < MOST_RUNS and time.perf_counter() - began < SECONDS):
            clock.parts = {}
            start = clock.now()
            model(**inputs)
            yield 1e3 * (clock.now() - start), clock.parts
            count += 1
    finally:
        for handle in handles:
            handle.remove()


def _sublayers(view: ModelView) -> Iterator[tuple[Place, tuple]]:
    """For every sub-layer: which modules may run first, which runs last, and its units."""
    for name, stack in view.stacks.items():
        for layer in stack.layers:
            for kind in KINDS:
                part = getattr(layer, kind)
                if part is None:
                    continue
                first = [part.norm] if stack.table.norm_first else part.up if kind == FFN else [part.module]
                last = part.down if kind == FFN else part.o
                yield (name, layer.index, kind), (first, last, _units(layer, kind))


class _Clock:
    """Notes when sub-layers start and end."""

    def __init__(self, device: torch.device):
        self.parts: dict[Place, tuple[int, float]] = {}
        self._started: dict[Place, float] = {}
        self.now: Callable[[], float] = time.perf_counter
        if device.type == "cuda":
            self.now = self._synchronised
            self._device = device

    def _synchronised(self) -> float:
        torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def watch(self, key: Place, first: list, last: torch.nn.Module, units: int) -> list:
        def start(_module, _args) -> None:
            self._started.setdefault(key, self.now())

        def end(_module, _args, _output) -> None:
            self.parts[key] = (units, 1e3 * (self.now() - self._started.pop(key)))

        return [*(module.register_forward_pre_hook(start) for module in first), last.register_forward_hook(end)]
