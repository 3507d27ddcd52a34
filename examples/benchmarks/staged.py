"""What the longer benchmarks share: stages that are skipped when they are done, and trainings that resume."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer
from optimum_flexcompress.tasks.base import Task


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def train(
    folder: Path,
    start: str | Path,
    task: Task,
    data: DatasetDict,
    *,
    max_length: int,
    seed: int,
    config: FlexCompressConfig | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Trains `start` on `data["train"]`, from the last checkpoint on if there is one.

    Args:
        folder: Gets the model, and `training.json` with the time it took; nothing is done where that is there.
        start: The model to start from.
        task: Its task.
        data: With the splits `train`, and `validation` to report on.
        max_length: Longest input in tokens.
        seed: For order, dropout and what the methods draw.
        config: What to compress with; `None` for plain training.
        **arguments: For `TrainingArguments`.

    Returns:
        What `training.json` holds.
    """
    record = folder / "training.json"
    if record.is_file():
        print(f"{folder.name}: done before, in {folder}")
        return read_json(record)
    set_seed(seed)
    processor = task.load_processor(start)
    prepared = task.prepare(data, processor, max_length=max_length)
    checkpoints = folder.with_name(f"{folder.name}-checkpoints")
    trainer = FlexCompressTrainer(
        model=task.load_model(start, **prepared.model_kwargs),
        args=TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=16,
            group_by_length=True,
            warmup_ratio=0.06,
            weight_decay=0.01,
            save_steps=50,
            save_total_limit=1,
            logging_steps=25,
            report_to="none",
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            **arguments,
        ),
        compression_config=config,
        train_dataset=prepared.dataset["train"],
        data_collator=prepared.collator,
        processing_class=processor,
    )
    last = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    facts = {
        "seconds": time.perf_counter() - started,
        "resumed": last is not None,
        "steps": trainer.state.global_step,
        "examples": len(data["train"]),
        "max_length": max_length,
        "seed": seed,
        "arguments": arguments,
        "methods": config.to_dict() if config is not None else None,
    }
    trainer.save_model(str(folder))
    write_json(record, facts)
    print(f"{folder.name}: {facts['steps']} steps in {facts['seconds'] / 60:.1f} minutes")
    return facts
