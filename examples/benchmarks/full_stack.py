"""VIB pruning, length-adaptive training and int8 in one stack: accuracy and latency against the dense model in int8.

Fine-tunes the 6-layer MiniLM of the `demo` extra, prunes its layers to three tenths of their parameters by VIB with the
fine-tuned model as teacher, trains what is left length-adaptively with the same teacher, and searches for length
configurations on 1,000 examples of the training set that no training saw, by their loss. The picks are those with the
least loss at given shares of the multiply-accumulates. Every step is scored in int8 on examples that nothing was chosen
on, and all of them are timed in one run, interleaved, with the dense model in int8 of the same runtime.

Wanted: at most 1 % of the fine-tuned model's metric lost, at 2.5 times the speed of the dense int8.

Each stage leaves its result in the work folder, and is skipped when it is there; trainings go on from their last
checkpoint. Trains in bfloat16, without dropout on attention maps.

    python examples/benchmarks/full_stack.py --data IMDB                      # about 120 minutes on two cores
    python examples/benchmarks/full_stack.py --data SQUAD --task squad        # 384 tokens, all questions: needs a GPU
    python examples/benchmarks/full_stack.py --data IMDB --stages time        # one stage again
    python examples/benchmarks/full_stack.py --data IMDB --stages rest        # scores the other 20,000 test reviews
    python examples/benchmarks/full_stack.py --data IMDB --rows 192 --trials 4 --work /tmp/try --output /tmp/try.json

`IMDB` holds `train.jsonl` and `test.jsonl` (`text`, `label`), `SQUAD` `train-v1.1.json` and `dev-v1.1.json`, packed
with xz or not.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import length_imdb
import quala_squad
from datasets import DatasetDict
from length_pipeline import ADAPTED, DENSE, DENSE_FP32, LengthExperiment, add_arguments, run
from staged import write_json

from optimum_flexcompress import DistillationConfig, VIBPruningConfig
from optimum_flexcompress.data import take
from optimum_flexcompress.tasks import get_task


SEED, BATCH = 42, 16
MAX_LOSS, LEAST_SPEEDUP = 0.01, 2.5
TASKS = {
    "imdb": ("text-classification", length_imdb.MAX_LENGTH),
    "squad": ("question-answering", quala_squad.MAX_LENGTH),
}
METRICS = {"imdb": "accuracy", "squad": "f1"}
# Shares of what the pruned model costs with all its tokens.
PICKS = {f"stacked, best at {cost:g} of the pruned model's MACs, int8": {"max_cost": cost} for cost in (0.8, 0.7, 0.6)}
# Masks move by their learning rate: in a run cut down to see whether it works they have to move faster.
MASK_RATE, SLOWEST = 0.05, 15.0


def splits(name: str, source: str, rows: int | None) -> DatasetDict:
    """Fixed random parts to train on, to search on and to report on; at most `rows` of each."""
    data = length_imdb.splits(source) if name == "imdb" else quala_squad.splits(source, None)
    return DatasetDict({split: take(part, rows, SEED) for split, part in data.items()})


def steps_of(report: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """What every model in int8 loses and gains: share of the fine-tuned model's metric, and speed over dense int8."""

    def lost_on(part: str) -> dict[str, float]:
        scores = {row["name"]: row[part]["metrics"][metric] for row in report["models"] if row[part]}
        return {name: 1 - value / scores[DENSE_FP32] for name, value in scores.items()} if DENSE_FP32 in scores else {}

    losses, rest = lost_on("score"), lost_on("rest")
    found = []
    for row in report["models"]:
        if row["dtype"] == "int8" and row["name"] in losses and row["latency"]:
            lost = losses[row["name"]]
            speedup = {shape: timing["speedup"][DENSE] for shape, timing in row["latency"].items()}
            met = [shape for shape, value in speedup.items() if lost <= MAX_LOSS and value >= LEAST_SPEEDUP]
            more = {"lost_on_rest": rest[row["name"]]} if row["name"] in rest else {}
            found.append({"name": row["name"], "lost": lost, **more, "speedup": speedup, "met": met})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "full_stack")
    parser.add_argument("--task", choices=list(TASKS), default="imdb", help="which data set it is")
    parser.add_argument("--sparsity", type=float, default=0.7, help="share of the layers' parameters that goes")
    parser.add_argument("--prune-epochs", type=float, default=3)
    parser.add_argument("--adapt-epochs", type=float, default=3)
    parser.add_argument("--rows", type=int, help="bound of every split, to try the script out")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train in bfloat16")
    options = parser.parse_args()
    if options.task != "imdb" and options.output == parser.get_default("output"):
        options.output = options.output.with_name(f"full_stack_{options.task}.json")
    if options.task != "imdb" and options.work == parser.get_default("work"):
        options.work = Path(f"{options.work}_{options.task}")
    data = splits(options.task, options.data, options.rows)
    task, max_length = TASKS[options.task]
    steps = math.ceil(len(data["train"]) / BATCH) * options.prune_epochs
    experiment = LengthExperiment(
        task=get_task(task),
        data=data,
        max_length=max_length,
        prune=[
            VIBPruningConfig(target_sparsity=options.sparsity, mask_learning_rate=max(MASK_RATE, SLOWEST / steps)),
            DistillationConfig(
                temperature=length_imdb.TEMPERATURE,
                task_loss_weight=0.0,
                hidden_states_weight=1.0,
                layer_map="ordered",
            ),
        ],
        adapt=length_imdb.ADAPT,
        distil=length_imdb.DISTIL,
        metric="loss",
        max_cost=0.7,
        picks=PICKS,
        shapes=[(1, max_length), (32, max_length)],
        seed=SEED,
        facts={
            **{name: len(rows) for name, rows in data.items()},
            "data": options.task,
            "max_length": max_length,
            "sparsity": options.sparsity,
            "picks": PICKS,
            "wanted": {"lost": MAX_LOSS, "speedup": LEAST_SPEEDUP},
        },
    )
    report = run(experiment, options)
    report["steps"] = steps_of(report, METRICS[options.task])
    write_json(options.output, report)
    for step in report["steps"]:
        speeds = ", ".join(f"{value:.2f}x at {shape}" for shape, value in step["speedup"].items())
        met = f"meets it at {' and '.join(step['met'])}" if step["met"] else "does not meet it"
        wanted = f"{100 * MAX_LOSS:g} % and {LEAST_SPEEDUP:g}x are wanted: {met}"
        verdict = f"; {wanted}" if step["name"] in (ADAPTED, *PICKS) else ""
        rest = f" ({100 * step['lost_on_rest']:.2f} % on the rest)" if "lost_on_rest" in step else ""
        print(f"{step['name']}: loses {100 * step['lost']:.2f} %{rest}, {speeds} over the dense int8{verdict}")


if __name__ == "__main__":
    main()
