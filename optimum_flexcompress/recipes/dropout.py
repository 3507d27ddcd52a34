"""Dropout that takes little time on a CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional


# Each element takes 16 bits of a random word: rates are multiples of 1 / 65,536.
_LEVELS = 1 << 16


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, dropped: int) -> torch.Tensor:
        ctx.scale = _LEVELS / (_LEVELS - dropped)
        kept = _draw(values.shape, dropped)
        ctx.save_for_backward(kept)
        return _keep(values, kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _keep(gradient, ctx.saved_tensors[0], ctx.scale), None


def _draw(shape: torch.Size, dropped: int) -> torch.Tensor:
    """Whether each element stays."""
    elements = shape.numel()
    words = torch.empty((elements + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    return (words.view(torch.int16)[:elements] >= dropped - _LEVELS // 2).view(shape)


def _keep(values: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    # Multiplying by Booleans, or converting them, takes several times as long.
    return values.mul(kept.view(torch.uint8).to(values.dtype)).mul_(scale)


def dropout(values: torch.Tensor, p: float) -> torch.Tensor:
    """Like `torch.nn.functional.dropout`, from PyTorch's generator of random numbers, too, but with other numbers.

    PyTorch draws a number for every element, one by one; this takes four from each random word.

    Args:
        values: On the CPU, of any floating point type.
        p: Share that becomes zero, at least 0 and below 1, rounded to 1 / 65,536; the others are scaled up by what it
            is then.
    """
    dropped = round(p * _LEVELS)
    # A rate so near to 1 that nothing would stay has no scale.
    return _Drop.apply(values, min(dropped, _LEVELS - 1)) if dropped else values


@contextlib.contextmanager
def fast_dropout() -> Iterator[None]:
    """Replaces `torch.nn.functional.dropout`, and with it `torch.nn.Dropout`, by [`dropout`] for CPU tensors while the
    block runs, where no accelerator trains (examples/benchmarks/cpu_training.py says what that saves).
    """
    if torch.accelerator.is_available():
        yield
        return
    usual = functional.dropout

    @functools.wraps(usual)
    def replacement(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if training and not inplace and 0 < p < 1 and input.device.type == "cpu" and input.is_floating_point():
            return dropout(input, p)
        return usual(input, p, training, inplace)

    # A TorchFunctionMode would not be asked where activations are computed again in a backward pass.
    functional.dropout = replacement
    try:
        yield
    finally:
        functional.dropout = usual
