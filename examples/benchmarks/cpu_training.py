"""What makes a training step on a CPU faster: plain attention, dropout from whole random words, and kept memory.

Times forward and backward passes of the 6-layer MiniLM's shape (384 wide, 12 heads, dropout of 0.1) with PyTorch's fused
attention (`sdpa`) and with plain attention (`eager`), while glibc handles freed memory as usual and while it keeps it,
with PyTorch's dropout and with that of the recipes, which is what they add last. All of them take turns; ratios are of
one round. Attention maps have no dropout, as in plans, and as much as the rest, as most models have it. Weights and
inputs are random.

    python examples/benchmarks/cpu_training.py
    python examples/benchmarks/cpu_training.py --shapes 8x64 --rounds 2 --precisions bf16 --output /tmp/try.json     # a quick look
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer
from train_overhead import MINILM, build_data
from transformers import BertConfig, BertForSequenceClassification

from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.evaluation.formatting import text_table
from optimum_flexcompress.recipes.allocator import keeping_freed_memory
from optimum_flexcompress.recipes.dropout import fast_dropout


ATTENTION = ("sdpa", "eager")
MEMORY = {"as usual": contextlib.nullcontext, "kept": keeping_freed_memory}
DROPOUT = {"PyTorch's": contextlib.nullcontext, "fast": fast_dropout}
# Attention, memory, dropout.
BASELINE = ("sdpa", "as usual", "PyTorch's")
VARIANTS = (
    BASELINE,
    ("eager", "as usual", "PyTorch's"),
    ("sdpa", "kept", "PyTorch's"),
    ("eager", "kept", "PyTorch's"),
    ("sdpa", "kept", "fast"),
    ("eager", "kept", "fast"),
)
CALLS = 2


def build_model(attention: str, length: int, map_dropout: float) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        **MINILM,
        max_position_embeddings=max(512, length),
        num_labels=2,
        attention_probs_dropout_prob=map_dropout,
        attn_implementation=attention,
    )
    return BertForSequenceClassification(config).train()


def step(model: BertForSequenceClassification, batch: dict[str, torch.Tensor], bf16: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()


def measure(
    batch_size: int, length: int, bf16: bool, map_dropout: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a step and ratios, for one shape."""
    batch = build_data(length, batch_size)[:batch_size]
    batch["labels"] = batch["labels"] % 2
    seconds: dict[tuple[str, str, str], list[float]] = {variant: [] for variant in VARIANTS}
    models = {kind: build_model(kind, length, map_dropout) for kind in ATTENTION}
    timers = {
        kind: Timer(
            "step(model, batch, bf16)",
            globals={"step": step, "model": model, "batch": batch, "bf16": bf16},
            num_threads=options.threads,
        )
        for kind, model in models.items()
    }
    for _ in range(options.rounds):
        for (kind, memory, dropout), samples in seconds.items():
            with MEMORY[memory](), DROPOUT[dropout]():
                # The first of them fills what is kept. The timer has a warm-up of its own.
                samples.append(timers[kind].timeit(CALLS).mean)
    ratios = {
        variant: [own / base for own, base in zip(samples, seconds[BASELINE], strict=True)]
        for variant, samples in seconds.items()
    }
    return {
        "batch_size": batch_size,
        "length": length,
        "precision": "bf16" if bf16 else "fp32",
        "map_dropout": map_dropout,
        "variants": [
            {
                "attention": kind,
                "memory": memory,
                "dropout": dropout,
                "seconds": samples,
                "ratio": statistics.median(ratios[kind, memory, dropout]),
                "ratios": ratios[kind, memory, dropout],
            }
            for (kind, memory, dropout), samples in seconds.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32x64", "32x128", "16x256", "8x512"], metavar="ROWSxTOKENS")
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--map-dropout", nargs="+", type=float, default=[0.0, 0.1], metavar="SHARE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu_training.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = environment_info(options.threads)
    results = []
    for precision, map_dropout, shape in product(options.precisions, options.map_dropout, options.shapes):
        results.append(measure(*map(int, shape.split("x")), precision == "bf16", map_dropout, options))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"environment": environment, "results": results}, indent=2) + "\n")
    print(describe_environment(environment))
    titles = [f"{kind}, memory {memory}, {dropout} dropout" for kind, memory, dropout in VARIANTS]
    rows = [
        [
            f"{result['precision']}, {result['map_dropout']:g} on maps, {result['batch_size']} x {result['length']}",
            *(
                f"{1000 * statistics.median(variant['seconds']):.0f} ms, {variant['ratio']:.2f}"
                for variant in result["variants"]
            ),
        ]
        for result in results
    ]
    print("forward and backward pass, and its share of the first column's time (medians)")
    print(text_table(["", *titles], rows))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
