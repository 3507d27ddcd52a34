"""QuaLA-MiniLM on SQuAD v1.1: a 6-layer MiniLM, length-adaptive, in int8, against BERT-base in PyTorch.

Fine-tunes the MiniLM of the `demo` extra at 384 tokens, trains it length-adaptively, and searches for length
configurations on 1,000 questions of the training set that neither training saw. The chosen ones are scored on the whole
development set, in int8, and timed at batch 32 in one run with the dense int8 model and with BERT-base in PyTorch (SDPA,
random weights, which change no timing). Each stage leaves its result in the work folder, and is skipped when it is
there; trainings go on from their last checkpoint.

    python examples/benchmarks/quala_squad.py --data DIR --train 12000 --adapt-epochs 1 --bf16   # 2 cores, 2 hours
    python examples/benchmarks/quala_squad.py --data DIR                # all data, the paper's epochs: needs a GPU

`DIR` holds `train-v1.1.json` and `dev-v1.1.json`, packed with xz or not.
"""

from __future__ import annotations

import argparse

import torch
from datasets import DatasetDict
from length_pipeline import LengthExperiment, add_arguments, run
from transformers import BertConfig, BertForQuestionAnswering

from optimum_flexcompress import LengthAdaptiveConfig
from optimum_flexcompress.data import load_data, take
from optimum_flexcompress.tasks import get_task


MAX_LENGTH, SEED, HELD_OUT = 384, 42, 1000
PICKS = {
    "cheapest within 0.5 % of the fine-tuned model, int8": {"within": 0.005},
    "cheapest within 1 % of the fine-tuned model, int8": {"within": 0.01},
    "cheapest within 1.2 % of the fine-tuned model, int8": {"within": 0.012},
    "cheapest within 1 % of its own F1 with all tokens, int8": {"max_drop": 0.01},
}


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


def bert_base() -> BertForQuestionAnswering:
    """BERT-base with random weights."""
    torch.manual_seed(0)
    return BertForQuestionAnswering(BertConfig(attn_implementation="sdpa")).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "quala_squad")
    parser.add_argument("--train", type=int, help="questions to train on; all but the held-out ones by default")
    parser.add_argument("--adapt-epochs", type=float, default=5)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="train in bfloat16")
    options = parser.parse_args()
    data = splits(options.data, options.train)
    experiment = LengthExperiment(
        task=get_task("question-answering"),
        data=data,
        max_length=MAX_LENGTH,
        adapt=LengthAdaptiveConfig(num_sandwich=2, length_drop=0.2, layer_drop=0.2, max_length=MAX_LENGTH),
        picks=PICKS,
        shapes=[(32, MAX_LENGTH)],
        reference=bert_base,
        reference_name="BERT-base, PyTorch fp32, SDPA, random weights",
        seed=SEED,
        facts={name: len(rows) for name, rows in data.items()} | {"max_length": MAX_LENGTH, "picks": PICKS},
    )
    run(experiment, options)


if __name__ == "__main__":
    main()
