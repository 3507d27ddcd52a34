"""What the user gave, opened and looked at before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import FlexCompressError
from .stages import DataSettings


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel

    from ..tasks import Task

# Rows of each split that are prepared on trial.
_TRIAL = 8


@dataclass
class Inputs:
    """The data of a run.

    Attributes:
        data: The splits, cut down as the recipe asks.
        label_names: The class names of the whole data set, which a small part of it may not show; None where the task
            has no classes.
        held_out: Examples that no stage trains on; None where none were asked for.
    """

    data: DatasetDict
    label_names: list[str] | None
    held_out: Dataset | None = None


def open_data(
    task: Task,
    dataset: str,
    settings: DataSettings,
    seed: int,
    say: Callable[[str], None],
    held_out: int = 0,
) -> Inputs:
    """Loads the data set, cut down as the recipe asks.

    Args:
        task: What the data is for.
        dataset: Anything that [`load_data`] takes.
        settings: The recipe's `data` group.
        seed: Decides which examples are taken.
        say: Receives a line when a part of the training data is held out.
        held_out: How many examples no stage is to train on. They come from the validation split where there is a test
            split beside it, else from the training split, of which they are a fifth at most.

    Returns:
        The data, with a split beside `train` to evaluate on where there is a training split.

    Raises:
        FlexCompressError: The data set cannot be read, or lacks a column.
    """
    from datasets import DatasetDict

    from ..data import load_data, select_split, take
    from ..tasks.labels import LabelMap, class_column, without_unlabelled

    data = load_data(dataset)
    column, names = class_column(task.find_columns(data, settings.columns)), None
    if column is not None:
        every, data = data, without_unlabelled(data, column)
        for name in (name for name in every if name not in data):
            say(f"the split {name} of {dataset} has no labels and is left out")
        names = LabelMap(data, column).names
    if "train" in data and select_split(data) == "train":
        if len(data["train"]) < 2:
            raise FlexCompressError(f"{dataset} has a single example: give a data set to train and evaluate on.")
        parts = data["train"].train_test_split(test_size=settings.test_fraction, seed=seed)
        data = DatasetDict({**data, "train": parts["train"], "test": parts["test"]})
        say(f"{dataset} has no split to evaluate on: {len(data['test'])} of its examples are held out for it")
    apart = None
    if held_out:
        data["train"], apart = _hold_out(data, dataset, held_out, settings.max_train_samples, seed, say)
    limits = {"train": settings.max_train_samples}
    cut = {name: take(split, limits.get(name, settings.max_eval_samples), seed) for name, split in data.items()}
    return Inputs(data=DatasetDict(cut), label_names=names, held_out=apart)


def _hold_out(
    data: DatasetDict, dataset: str, samples: int, max_train: int | None, seed: int, say: Callable[[str], None]
) -> tuple[Dataset, Dataset]:
    """The training split without the examples that are held out, and these."""
    from ..data import take
    from ..search import hold_out

    if "train" not in data:
        raise FlexCompressError(
            f"{dataset} has no training split, of which the recipe holds out examples to search on: give a data set "
            "with one."
        )
    train = data["train"]
    if {"validation", "test"} <= data.keys():
        return train, take(data["validation"], samples, seed)
    if max_train is not None:
        # Those held out come on top of those trained on, where there are enough.
        train = take(train, max_train + samples, seed)
    count = min(samples, len(train) // 5)
    if not count:
        raise FlexCompressError(
            f"{dataset} has {len(train)} training examples, too few to hold some out for the search: give more."
        )
    say(f"{count} of the {len(train)} training examples are held out: no stage trains on them")
    return hold_out(train, count, seed)


def check_model_and_data(task: Task, model: str, inputs: Inputs, settings: DataSettings) -> PreTrainedModel:
    """Finds out in seconds what would otherwise fail in the first stage, or only after hours.

    Returns:
        The model on the meta device: its sizes, without the weights.

    Raises:
        FlexCompressError: There is no model, its family is not supported, its weights are damaged, or the data cannot
            be prepared for it.
    """
    from ..architectures import describe

    processor = task.load_processor(model)
    trial = {name: split.select(range(min(_TRIAL, len(split)))) for name, split in inputs.data.items()}
    with no_progress_bars():
        prepared = task.prepare(
            type(inputs.data)(trial),
            processor,
            max_length=settings.max_length or task.default_max_length,
            columns=settings.columns,
            label_names=inputs.label_names,
        )
    loaded = task.load_model(model, ignore_mismatched_sizes=True, **prepared.model_kwargs)
    describe(loaded)
    return loaded.to("meta")


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps `datasets` from showing bars while the block runs."""
    import datasets

    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bar()
