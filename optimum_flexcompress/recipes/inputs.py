"""What the user gave, opened and looked at before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FlexCompressError
from .stages import DataSettings


if TYPE_CHECKING:
    from datasets import DatasetDict

    from ..tasks import Task

# Rows of each split that are prepared on trial.
_TRIAL = 8


def open_data(dataset: str, settings: DataSettings, seed: int, say: Callable[[str], None]) -> DatasetDict:
    """Loads the data set, cut down as the recipe asks.

    Args:
        dataset: Anything that [`load_data`] takes.
        settings: The recipe's `data` group.
        seed: Decides which examples are taken.
        say: Receives a line when a part of the training data is held out.

    Returns:
        The splits; one beside `train` to evaluate on, where there is a training split.
    """
    from datasets import DatasetDict

    from ..data import load_data, take

    data = load_data(dataset)
    if list(data) == ["train"]:
        if len(data["train"]) < 2:
            raise FlexCompressError(f"{dataset} has a single example: give a data set to train and evaluate on.")
        parts = data["train"].train_test_split(test_size=settings.test_fraction, seed=seed)
        data = DatasetDict({"train": parts["train"], "test": parts["test"]})
        say(f"{dataset} has no split to evaluate on: {len(data['test'])} training examples are held out for it")
    limits = {"train": settings.max_train_samples}
    return DatasetDict(
        {name: take(split, limits.get(name, settings.max_eval_samples), seed) for name, split in data.items()}
    )


def check_model_and_data(task: Task, model: str, data: DatasetDict, settings: DataSettings) -> None:
    """Finds out in a second or two what would otherwise fail in the first stage, or only after hours.

    Raises:
        FlexCompressError: There is no model, its family is not supported, its weights are truncated, or the data set
            lacks a column.
    """
    from transformers import AutoConfig

    from ..architectures import find_architecture
    from ..tasks.base import load_pretrained

    config = load_pretrained(AutoConfig, model)
    find_architecture(config.model_type)
    if Path(model).expanduser().is_dir():
        check_weights(Path(model).expanduser())
    processor = task.load_processor(model)
    # Columns first, over all splits: preparing a few rows can then only fail for what is in the rows.
    task.find_columns(data, settings.columns)
    trial = {name: split.select(range(min(_TRIAL, len(split)))) for name, split in data.items()}
    with _no_progress_bars():
        task.prepare(type(data)(trial), processor, max_length=settings.max_length, columns=settings.columns)


def check_weights(folder: Path) -> None:
    """Raises FlexCompressError when a safetensors file is shorter than its header says, or not one at all."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise FlexCompressError(f"{file} is damaged ({error}): fetch or save the model again.") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bar()
