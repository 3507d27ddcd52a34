"""A search without a model: lengths of three layers, and a score that says which of them matter."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from optimum_flexcompress.search.evolution import Evolution, key_of
from optimum_flexcompress.search.length_space import LengthSpace
from optimum_flexcompress.search.store import Score, open_storage


MAX_LENGTH = 20
TRIALS = 20


def cost(candidate) -> float:
    return float(sum(candidate))


def space_of(layers: int = 3, max_length: int = MAX_LENGTH, unit: str = "counts", able=None) -> LengthSpace:
    return LengthSpace([True] * layers if able is None else able, max_length, unit, cost)


def score(candidate) -> Score:
    """The first layer matters most; what is kept beyond half of the tokens matters little."""
    weights = range(len(candidate), 0, -1)
    quality = sum(weight * min(count, 10 + count / 10) for weight, count in zip(weights, candidate))
    return Score(quality, cost(candidate) / (MAX_LENGTH * len(candidate)), {})


def evolution_of(url: str, space=None, **options) -> Evolution:
    options = {"population": 5, "trials": TRIALS, "patience": 0, "seed": 1, **options}
    return Evolution(space or space_of(), open_storage(url), "toy", **options)


def main() -> None:
    """A worker: `toys.py URL LOG DELAY`. Logs what it starts to score and what it has scored."""
    url, log, delay = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

    def logged(candidate) -> Score:
        with log.open("a") as file:
            print("start", key_of(candidate), file=file, flush=True)
        time.sleep(delay)
        with log.open("a") as file:
            print("end", key_of(candidate), file=file, flush=True)
        return score(candidate)

    evolution_of(url).run(logged, progress=False)


if __name__ == "__main__":
    main()
