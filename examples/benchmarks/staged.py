"""What the longer benchmarks share: stages that are skipped when they are done, and trainings that resume."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer
from optimum_flexcompress.evaluation import (
    count_macs,
    environment_info,
    evaluate_artifact,
    file_size,
    measure_side_by_side,
    open_artifact,
)
from optimum_flexcompress.evaluation.inputs import example_batch
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.quantization import quantize_folder
from optimum_flexcompress.tasks.base import Prepared, Task
from optimum_flexcompress.token_dropping import LengthConfig, using_lengths


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
    teacher: str | Path | None = None,
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
        teacher: The model that teaches meanwhile.
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
    # Dropout inside attention keeps PyTorch from its flash kernel on CPUs: a step would take twice as long.
    dropout = {"attention_probs_dropout_prob": 0.0}
    checkpoints = folder.with_name(f"{folder.name}-checkpoints")
    trainer = FlexCompressTrainer(
        model=task.load_model(start, **prepared.model_kwargs, **dropout),
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
        teacher_model=task.load_model(teacher) if teacher is not None else None,
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
        "arguments": arguments | dropout,
        "methods": config.to_dict() if config is not None else None,
    }
    trainer.save_model(str(folder))
    write_json(record, facts)
    print(f"{folder.name}: {facts['steps']} steps in {facts['seconds'] / 60:.1f} minutes")
    return facts


def make_int8(folder: Path, model: str | Path, lengths: LengthConfig | None = None) -> None:
    """Dynamic int8 for ONNX Runtime, in `folder`; nothing is done where that is there."""
    if folder.is_dir():
        print(f"{folder.name}: done before")
        return
    with tempfile.TemporaryDirectory() as between:
        export_onnx(model, between, length_config="full" if lengths is None else lengths, overwrite=True)
        quantize_folder(between, folder)


def score(record: Path, model: Path, task: Task, prepared: Prepared, split: str, threads: int) -> dict[str, float]:
    """Metrics of a model on a split, and its size; kept in `record`, which is read where it is there."""
    if not record.is_file():
        artifact = open_artifact(model, task, threads=threads)
        metrics = evaluate_artifact(artifact, prepared, split).metrics
        write_json(record, {"metrics": metrics, "examples": len(prepared.dataset[split]), "bytes": file_size(model)})
        print(f"{model.name} on {split}: {metrics}")
    return read_json(record)


def macs_of(model: str | Path, task: Task, length: int, lengths: LengthConfig | None = None) -> int:
    """Multiply-accumulates of one input of `length` tokens, with the lengths given."""
    loaded = task.load_model(model)
    with using_lengths(loaded, lengths):
        return count_macs(loaded, example_batch(loaded.config, task, 1, length))


def time_models(
    models: dict[str, Any], task: Task, shapes: list[tuple[int, int]], *, rounds: int, threads: int
) -> dict[str, Any]:
    """Times models side by side in one run.

    Args:
        models: Name -> folder, or a PyTorch model in memory.
        task: What they are for.
        shapes: Batch sizes and lengths.
        rounds: Interleaved rounds.
        threads: Threads.

    Returns:
        The environment, and for each shape the timings by name.
    """
    opened = {
        name: model if isinstance(model, torch.nn.Module) else open_artifact(model, task, threads=threads)
        for name, model in models.items()
    }

    def runner(model: Any, shape: tuple[int, int]) -> Any:
        batch = example_batch(model.config, task, *shape)
        if not isinstance(model, torch.nn.Module):
            return lambda: model.forward(batch)

        @torch.inference_mode()
        def run() -> None:
            model(**batch)

        return run

    found: dict[str, Any] = {"environment": environment_info(threads), "shapes": {}}
    for shape in shapes:
        name = f"{shape[0]}x{shape[1]}"
        timings = measure_side_by_side(
            {label: runner(model, shape) for label, model in opened.items()},
            rounds=rounds,
            threads=threads,
            description=name,
        )
        found["shapes"][name] = {
            label: {**timing.to_dict(), "milliseconds": 1e3 * timing.median} for label, timing in timings.items()
        }
    return found


def ratio(timings: dict[str, Any], slow: str, fast: str) -> float:
    """How many times faster `fast` is than `slow`: the median over rounds, whose parts were timed side by side."""
    pairs = zip(timings[slow]["seconds"], timings[fast]["seconds"], strict=True)
    return statistics.median(one / other for one, other in pairs)
