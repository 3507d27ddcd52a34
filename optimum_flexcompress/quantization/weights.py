"""Rounds weights to 8 bits."""

from __future__ import annotations

import numpy as np


def quantize_symmetric(
    weight: np.ndarray, axis: int | None, reduce_range: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a matrix to int8 with zero at zero.

    Args:
        weight: `(rows, columns)`, single precision.
        axis: The axis along which every slice has a scale of its own (1: each output feature of a linear layer,
            0: each row of an embedding table); None for one scale.
        reduce_range: Whether only 7 bits are used: processors without VNNI add pairs of products in 16 bits, which
            overflows with 8.

    Returns:
        The int8 matrix, and its scales, `(weight.shape[axis],)` or `()`.
    """
    # -64..64: two products with an activation of 255 stay below 2 ** 15.
    largest = 64 if reduce_range else 127
    over = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=over) / largest
    # Columns of zeros stay zeros whatever the scale is; a scale of 0 would make them nan.
    scale = np.where(scale == 0, 1.0, scale).astype(np.float32)
    spread = scale if axis is None else np.expand_dims(scale, over)
    return np.clip(np.rint(weight / spread), -largest, largest).astype(np.int8), scale


def unsigned_range(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point that map `[low, high]`, widened to hold zero, onto 0..255."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1.0)
    return scale, np.uint8(np.clip(round(-low / scale), 0, 255))
