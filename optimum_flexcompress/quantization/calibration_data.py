"""From what `--dataset` names to tokenised calibration examples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict

from ..data import load_data
from ..errors import FlexCompressError
from ..tasks import get_task, infer_task


SEED = 2306
# Calibration must not see what models are compared on.
SPLITS = ("train", "validation", "test")


def calibration_examples(
    model: str | os.PathLike,
    dataset: str | os.PathLike | Dataset | DatasetDict,
    task: str | None = None,
    *,
    samples: int = 200,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int = 128,
) -> Dataset:
    """Prepares examples for static quantization.

    Args:
        model: The folder of the model, with its tokenizer or image processor.
        dataset: Anything that [`optimum_flexcompress.data.load_data`] takes.
        task: What the model is for; by default, what its `config.json` says.
        samples: How many examples to draw.
        split: The split to draw from; by default train, else validation, else test.
        columns: `{role: column name}` where the columns have unusual names.
        max_length: Longest example in tokens.

    Returns:
        The examples, tokenised and unpadded.

    Raises:
        FlexCompressError: The data set, a split or a column is missing, or the model has no tokenizer.
    """
    if samples < 1:
        raise FlexCompressError(f"Calibration needs at least 1 example, not {samples}.")
    folder = Path(model)
    task = get_task(task or infer_task(folder))
    data = load_data(dataset)
    if split is not None and split not in data:
        raise FlexCompressError(f"The data set has no split {split!r}: it has {', '.join(data)}.")
    split = split or next((name for name in SPLITS if name in data), next(iter(data)))
    rows = data[split]
    if len(rows) > samples:
        rows = rows.shuffle(seed=SEED).select(range(samples))
    processor = task.load_processor(folder if folder.is_dir() else folder.parent)
    prepared = task.prepare(DatasetDict({split: rows}), processor, max_length=max_length, columns=columns)
    return prepared.dataset[split]
