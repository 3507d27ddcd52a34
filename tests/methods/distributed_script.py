"""Trains toy models and writes weights and logs; run with one process, or with several of `accelerate launch`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForTokenClassification

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressConfig,
    FlexCompressTrainer,
    LengthAdaptiveConfig,
    MiniLMConfig,
    ModularConfig,
)
from optimum_flexcompress.methods.distillation import make_student
from tests.methods.length_adaptive.families import wide
from tests.methods.toys import arguments, data_of, model_of


def cases():
    """Name, student, teacher, data, methods, arguments."""
    teacher = model_of("bert", layers=4, hidden=24)
    student = model_of("bert", layers=2, hidden=16, seed=1)
    layered = [DistillationConfig(hidden_states_weight=1.0, attention_weight=1.0), MiniLMConfig()]
    yield "every term", student, teacher, data_of("bert", rows=32), layered, {}

    # Labels are unevenly spread over processes: each divides by the labels of all. The stock task loss of this head
    # does not, and is left out.
    data = data_of("bert", rows=32)
    labels = torch.randint(3, (32, 9), generator=torch.Generator().manual_seed(0))
    labels[::2, 2:] = -100
    data = data.remove_columns("labels").add_column("labels", labels.tolist()).with_format("torch")
    tokens = [DistillationConfig(hidden_states_weight=1.0, task_loss_weight=0)]
    models = [
        model_of("bert", layers=layers, hidden=hidden, seed=layers, auto_class=AutoModelForTokenClassification)
        for layers, hidden in ((2, 16), (4, 24))
    ]
    yield "tokens", *models, data, tokens, {"gradient_accumulation_steps": 2}

    # Most of the last layer gets no gradient here.
    headless = [model_of("bert", layers=layers, seed=layers, auto_class=AutoModel) for layers in (2, 4)]
    relations = [MiniLMConfig(task_loss_weight=0)]
    yield "headless", *headless, data_of("bert", rows=32).remove_columns("labels"), relations, {}

    checkpointing = {"gradient_checkpointing": True}
    teacher = model_of("gpt2", layers=4)
    methods = [DistillationConfig(), MiniLMConfig()]
    student = make_student(teacher, layers=2)
    yield "checkpointing", student, teacher, data_of("gpt2", rows=32), methods, checkpointing

    # The last pass, the one that synchronises, skips layers that earlier ones have used.
    adaptive = [DistillationConfig(task_loss_weight=0), LengthAdaptiveConfig(length_drop=0.4, layer_drop=0.4)]
    for family, extra in (("bert", {"gradient_accumulation_steps": 2}), ("bart", checkpointing)):
        teacher, student = model_of(family, layers=4, seed=1), wide(family, layers=3)
        data = data_of(family, rows=32)
        yield f"adaptive {family}", student, teacher, data, adaptive, extra

    # Modules are no part of the model that is wrapped; with frozen originals nothing of it is trained. Labels are
    # unevenly spread here too.
    for family, freeze, extra in (("t5", True, {"gradient_accumulation_steps": 2}), ("bart", False, checkpointing)):
        modular = [ModularConfig(granularities=[2, 4], freeze_originals=freeze, task_loss_weight=0)]
        yield f"modular {family}", model_of(family, layers=4), None, data_of(family, rows=32), modular, extra


def main(output: str, batch_size: int) -> None:
    for name, student, teacher, data, methods, extra in cases():
        folder = Path(output) / name
        accumulation = extra.get("gradient_accumulation_steps", 1)
        args = arguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=batch_size // accumulation,
            optim="sgd",
            learning_rate=0.1,
            **extra,
        )
        trainer = FlexCompressTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=data,
            compression_config=FlexCompressConfig(methods=methods),
        )
        trainer.train()
        if trainer.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(
                {
                    "processes": trainer.accelerator.num_processes,
                    "weights": trainer.model.state_dict(),
                    "methods": [method.modules.state_dict() for method in trainer._runner.methods],
                    "logs": trainer.state.log_history,
                },
                folder / "result.pt",
            )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
