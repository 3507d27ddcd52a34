"""Which sub-model a pass trains: LengthDrop and LayerDrop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...architectures import StackView
from ...token_dropping import LengthConfig


FLOOR = 2
"""Tokens that LengthDrop leaves at least, as long as there are so many."""


@dataclass(frozen=True)
class SubModel:
    """A sub-model of an encoder.

    Attributes:
        layers: Layers that run.
        able: Those of them that can drop tokens.
        shares: For each layer that runs, where in its range its length lies: 0 is the lowest, just below 1 the
            longest.
        length_drop: Of what a layer gets, it drops at most this share.
    """

    layers: tuple[int, ...]
    able: frozenset[int]
    shares: tuple[float, ...]
    length_drop: float

    def counts(self, total: int) -> list[int]:
        """Lengths of the layers that run, for an input of `total` tokens.

        Layer by layer uniform over `ceil((1 - length_drop) * l) .. l`, where `l` is the length before it.
        """
        lengths, before = [], total
        for layer, share in zip(self.layers, self.shares, strict=True):
            if layer in self.able:
                # The small number takes back what 0.2 is more than a fifth.
                lowest = min(max(math.ceil(before * (1 - self.length_drop) - 1e-9), FLOOR), before)
                before = lowest + int(share * (before - lowest + 1))
            lengths.append(before)
        return lengths

    def fractions(self, count: int) -> LengthConfig:
        """The same in fractions, for all `count` layers of the encoder: each keeps a uniform share of what it gets."""
        values, before = [], 1.0
        shares = dict(zip(self.layers, self.shares, strict=True))
        for layer in range(count):
            if layer in self.able and layer in shares:
                before *= 1 - self.length_drop * (1 - shares[layer])
            values.append(before)
        return LengthConfig(tuple(values), "fractions")


def smallest_sub_model(stack: StackView, length_drop: float) -> SubModel:
    """The sub-model of all layers, each of which drops as much as it may."""
    layers = tuple(layer.index for layer in stack.layers)
    return SubModel(layers, _able(stack), (0.0,) * len(layers), length_drop)


def draw_sub_model(stack: StackView, length_drop: float, layer_drop: float, generator: torch.Generator) -> SubModel:
    """A random sub-model.

    Args:
        stack: The encoder.
        length_drop: See [`SubModel`].
        layer_drop: Probability with which a layer is skipped. The layer that makes the position bias of the others
            (T5) always runs, and so does the first where none would be left.
        generator: Source of randomness. The number of draws depends on the number of layers alone.
    """
    count = len(stack.layers)
    dropped = torch.rand(count, generator=generator) < layer_drop
    shares = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    owner = bias_layer(stack)
    if owner is not None:
        dropped[owner] = False
    elif dropped.all():
        dropped[0] = False
    layers = tuple(index for index in range(count) if not dropped[index])
    return SubModel(layers, _able(stack), tuple(shares[index] for index in layers), length_drop)


def bias_layer(stack: StackView) -> int | None:
    """The layer that computes the position bias of the stack, if one does."""
    name = stack.table.attention.position_bias
    if name is None:
        return None
    return next((x.index for x in stack.layers if x.attention is not None and hasattr(x.attention.module, name)), None)


def _able(stack: StackView) -> frozenset[int]:
    return frozenset(layer.index for layer in stack.layers if layer.attention is not None)


def skipped(sub_model: SubModel, count: int) -> Sequence[int]:
    """The layers of an encoder of `count` layers that do not run."""
    return [index for index in range(count) if index not in sub_model.layers]
