"""What a benchmark can be asked for. Imports nothing heavy: recipes are checked by this before PyTorch is needed."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import FlexCompressError


# Fewer give no median and spread.
FEWEST_ROUNDS = 3


def check_timing(
    batch_sizes: Sequence[int], lengths: Sequence[int] | None, rounds: int, stream_rows: int, max_seconds: float
) -> None:
    """Raises FlexCompressError for what cannot be timed, which would else be found after models have been evaluated."""
    for name, values in (("batch_sizes", batch_sizes), ("lengths", lengths)):
        if values is not None and (not values or min(values) < 1):
            raise FlexCompressError(f"{name} must be one or more numbers from 1, not {list(values)}.")
    check_rounds(rounds)
    if stream_rows < 0:
        raise FlexCompressError(f"stream_rows must be at least 0, not {stream_rows}.")
    if not max_seconds > 0:
        raise FlexCompressError(f"max_seconds must be more than 0, not {max_seconds}.")


def check_rounds(rounds: int) -> None:
    """Raises FlexCompressError for too few rounds."""
    if rounds < FEWEST_ROUNDS:
        raise FlexCompressError(
            f"rounds must be at least {FEWEST_ROUNDS}, not {rounds}: fewer give no median and spread."
        )


def check_threads(threads: int | None) -> None:
    """Raises FlexCompressError for a number that no computation can have; None leaves it to the runtime."""
    if threads is not None and threads < 1:
        raise FlexCompressError(f"threads must be at least 1, not {threads}.")
