"""Training on data that is streamed: `datasets.IterableDataset`, of which nobody knows the length."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import load_dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressConfig,
    FlexCompressTrainer,
    LengthAdaptiveConfig,
    MiniLMConfig,
    ModularConfig,
)
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.methods.distillation import make_student
from tests.methods.toys import arguments, assert_same, data_of, logs_of, model_of, twin, weights
from tests.methods.vib.helpers import config_of as vib_config


class InOrder(FlexCompressTrainer):
    """Takes a data set in its order, as a stream comes."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class SeedSteps(TrainerCallback):
    """The noise of masks in a step, whatever the loader has drawn before it."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


CASES = {
    "distillation": ("bert", [DistillationConfig(hidden_states_weight=1.0), MiniLMConfig(relation_heads=4)], 6),
    "vib_pruning": ("bert", [vib_config(mask_learning_rate=0.5)], 24),
    "faster": ("bert", [vib_config(mask_learning_rate=0.5, mode="faster", data_fraction=1.0)], 24),
    "length_adaptive": ("bert", [LengthAdaptiveConfig()], 6),
    "modular": ("t5", [ModularConfig(granularities=[2])], 6),
}


def run(folder, case, data, **kwargs):
    family, methods, steps = CASES[case]
    model, teacher = model_of(family, layers=4, hidden=32, heads=4), None
    if case == "distillation":
        teacher, model = model, make_student(model, layers=2)
    trainer = InOrder(
        model=model,
        teacher_model=teacher,
        args=arguments(folder, max_steps=steps, **kwargs),
        train_dataset=data,
        eval_dataset=data,
        compression_config=FlexCompressConfig(methods=copy.deepcopy(methods)),
        callbacks=[SeedSteps()],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_a_stream_trains_as_the_same_rows_in_memory(tmp_path, case):
    """Over the end of the data, which comes round again, and with accumulated batches."""
    data = data_of(CASES[case][0])
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    whole = run(tmp_path, case, data, **settings)
    stream = run(tmp_path, case, data.to_iterable_dataset(), **settings)
    assert_same(weights(whole.model), weights(stream.model))
    # The trainer counts epochs by the length of the data.
    without_epochs = [[{**entry, "epoch": 0} for entry in logs_of(trainer)] for trainer in (whole, stream)]
    assert without_epochs[0] == without_epochs[1]
    assert any("eval_loss" in entry for entry in without_epochs[1])


def test_a_streamed_run_that_is_resumed(tmp_path):
    """The stream is read again up to where the run was."""
    stream = data_of("bert").to_iterable_dataset()
    whole = run(tmp_path / "a", "vib_pruning", stream, save_strategy="steps", save_steps=8)
    family, methods, steps = CASES["vib_pruning"]
    again = InOrder(
        model=model_of(family, layers=4, hidden=32, heads=4, seed=5),
        args=arguments(tmp_path / "b", max_steps=steps),
        train_dataset=twin(stream),
        compression_config=FlexCompressConfig(methods=copy.deepcopy(methods)),
        callbacks=[SeedSteps()],
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert_same(weights(whole.model), weights(again.model))


@pytest.mark.parametrize("mode", ["fast", "faster"])
def test_no_share_of_a_stream(tmp_path, mode):
    stream = data_of("bert").to_iterable_dataset()
    trainer = FlexCompressTrainer(
        model=model_of("bert", hidden=32, heads=4),
        args=arguments(tmp_path, max_steps=40),
        train_dataset=stream,
        compression_config=FlexCompressConfig(methods=[vib_config(mode=mode, data_fraction=0.5)]),
    )
    with pytest.raises(FlexCompressError, match=r"no length.*\.take\(.*data_fraction=1"):
        trainer.train()


def test_files_that_are_read_while_training(tmp_path):
    """As `load_dataset(..., streaming=True)` reads files or a data set of the Hub, tokenised on the way."""
    file = tmp_path / "train.csv"
    file.write_text("text,label\n" + "".join(f"{number} {number + 1},{number % 3}\n" for number in range(4, 20)))
    rows = load_dataset("csv", data_files=str(file), split="train", streaming=True)

    def encode(row):
        return {"input_ids": [int(word) for word in row["text"].split()], "labels": row["label"]}

    trainer = FlexCompressTrainer(
        model=model_of("bert"),
        args=arguments(tmp_path / "out", max_steps=6),
        train_dataset=rows.map(encode, remove_columns=["text", "label"]).shuffle(seed=0, buffer_size=8),
        compression_config=FlexCompressConfig(methods=[LengthAdaptiveConfig()]),
    )
    trainer.train()
    losses = [entry["loss_random"] for entry in trainer.state.log_history if "loss_random" in entry]
    assert len(losses) == 6 and max(losses) > 0
