"""Turns what `--dataset` names into a `datasets.DatasetDict` with the splits train, validation and test."""

from __future__ import annotations

import os
import re
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from requests.exceptions import RequestException

from .errors import FlexCompressError, nearest
from .readers import READERS, known_endings, read_file, split_ending


SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval"),
}
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def load_data(spec: str | os.PathLike | Dataset | DatasetDict) -> DatasetDict:
    """Loads a data set.

    Args:
        spec: One of
            - a file `.csv`, `.tsv`, `.jsonl`, `.json` (also in the nested SQuAD schema), `.txt` (one example a line)
              or `.parquet`, packed with xz, gzip or bzip2 or not. It becomes the split that its name starts with
              (`test.csv`, `dev-v1.1.json`), or `train`. TSV has no quoting;
            - a folder of such files named by split (`train.csv.xz`, `test.csv`);
            - a folder written by `save_to_disk`;
            - a folder of images, `train/cat/1.png` or `cat/1.png`;
            - a data set on the Hub, `owner/name` or `owner/name:configuration`;
            - a `Dataset` or `DatasetDict`, taken as it is.

    Returns:
        The splits. What the source calls `dev` or `val` is called `validation`.

    Raises:
        FlexCompressError: There is nothing under that name, it cannot be read, has an unknown ending, or no rows.
    """
    if isinstance(spec, DatasetDict):
        data = spec
    elif isinstance(spec, Dataset):
        data = DatasetDict({str(spec.split) if spec.split else "train": spec})
    else:
        path = Path(spec).expanduser()
        if path.is_dir():
            data = _load_folder(path)
        elif path.exists():
            data = DatasetDict({_split_of(split_ending(path)[0]) or "train": read_file(path)})
        elif _looks_like_a_path(str(spec)):
            raise FlexCompressError(f"There is no file or folder {path}: check the path of the data set.")
        else:
            data = _load_from_hub(str(spec))
    data = _with_usual_names(data)
    for name, split in data.items():
        if len(split) == 0:
            raise FlexCompressError(
                f"The split {name!r} of {_name(spec)} has no rows: give one with rows, or leave the split out."
            )
    if not data:
        raise FlexCompressError(f"{_name(spec)} has no splits: give a data set with at least a training split.")
    return data


def select_split(data: DatasetDict, split: str | None = None) -> str:
    """The name under which `data` holds a split.

    Args:
        data: What [`load_data`] returned.
        split: The wanted split, in any of its usual names; None takes the one to report figures on: test, else
            validation, else train.

    Returns:
        A key of `data`.

    Raises:
        FlexCompressError: There is no such split.
    """
    if split is None:
        return next((name for name in ("test", "validation", "train") if name in data), next(iter(data)))
    for name in (split, _split_of(split)):
        if name in data:
            return name
    raise FlexCompressError(f"The data set has no split {split!r}.{nearest(split, data)}")


def training_split(data: DatasetDict) -> Dataset:
    """The split `train`, else the first one, which then has to say what the data is like."""
    return data["train"] if "train" in data else next(iter(data.values()))


def take(dataset: Dataset, count: int | None, seed: int = 42) -> Dataset:
    """At most `count` rows, drawn at random (files are often sorted by label) but kept in their order."""
    if count is None or count >= len(dataset):
        return dataset
    if count < 1:
        raise FlexCompressError(f"{count} examples cannot be taken from a data set: ask for at least 1.")
    import numpy as np

    rows = np.random.default_rng(seed).choice(len(dataset), size=count, replace=False)
    return dataset.select(np.sort(rows))


def _name(spec: str | os.PathLike | Dataset | DatasetDict) -> str:
    return "the data set" if isinstance(spec, Dataset | DatasetDict) else str(spec)


def _split_of(name: str) -> str | None:
    """`dev-v1.1`, `test_labeled` -> `validation`, `test`; None where the name starts with no split's name."""
    first = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return next((split for split, names in SPLIT_NAMES.items() if first in names), None)


def _with_usual_names(data: DatasetDict) -> DatasetDict:
    """Calls `dev` or, where there is nothing closer, `validation_matched` `validation`; the first one of its kind."""
    usual_names: dict[str, str] = {}
    for usual, names in SPLIT_NAMES.items():
        # One that has the name already keeps it, wherever it stands: no two splits may come to have the same.
        found = [name for name in data if name == usual]
        found += [name for name in data if name.lower() in names]
        found += [name for name in data if _split_of(name) == usual]
        if found:
            usual_names[found[0]] = usual
    return DatasetDict({usual_names.get(name, name): split for name, split in data.items()})


def is_hub_dataset(spec: str | os.PathLike) -> bool:
    """Whether [`load_data`] would look for a data set on the Hub."""
    return not Path(spec).expanduser().exists() and not _looks_like_a_path(str(spec))


def _looks_like_a_path(spec: str) -> bool:
    known = split_ending(spec)[1] in READERS
    return known or spec.startswith((".", "~", "/")) or spec.count("/") > 1 or "\\" in spec


def _load_folder(path: Path) -> DatasetDict:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            loaded = load_from_disk(str(path))
        except (FileNotFoundError, OSError, ValueError, KeyError) as error:
            raise FlexCompressError(f"{path} is a damaged data set folder ({error}): save it again.") from error
        return loaded if isinstance(loaded, DatasetDict) else load_data(loaded)

    files = sorted(file for file in path.iterdir() if file.is_file() and split_ending(file)[1] in READERS)
    named: dict[str, Path] = {}
    for file in files:
        split = _split_of(split_ending(file)[0])
        if split is None:
            continue
        if split in named:
            raise FlexCompressError(
                f"{path} has two files for the split {split!r}, {named[split].name} and {file.name}: keep one, or "
                "give the path of a single file."
            )
        named[split] = file
    if named:
        return DatasetDict({split: read_file(named[split]) for split in SPLIT_NAMES if split in named})
    if any(file.suffix.lower() in IMAGE_ENDINGS for file in path.rglob("*")):
        return load_dataset("imagefolder", data_dir=str(path))
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise FlexCompressError(
        f"{path} holds no data file named by its split, such as train.csv and test.csv (found: {found}); the known "
        f"endings are {known_endings()}."
    )


def _load_from_hub(spec: str) -> DatasetDict:
    repository, _, configuration = spec.partition(":")
    unreachable = (
        f"{spec} is no file or folder here, and HF_HUB_OFFLINE is set while the data set is not in the cache: give a "
        "path, or unset HF_HUB_OFFLINE."
        if HF_HUB_OFFLINE
        else f"{spec} is no file or folder here, and the Hugging Face Hub cannot be reached to look for it there: give "
        "the path of a local data set, or set HF_HUB_OFFLINE=1 if the data set is in the cache."
    )
    try:
        if not HF_HUB_OFFLINE:
            # One quick request, because `load_dataset` by itself retries for half a minute before it gives up.
            HfApi().dataset_info(repository, timeout=20)
        loaded = load_dataset(repository, configuration or None)
    except (RepositoryNotFoundError, DatasetNotFoundError, HFValidationError) as error:
        raise FlexCompressError(
            f"{spec} is no file or folder here and no data set on the Hub: check the name (a private data set needs "
            "`hf auth login`)."
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, RequestException, ConnectionError) as error:
        raise FlexCompressError(unreachable) from error
    except ValueError as error:  # for example a configuration name that is missing or not known
        raise FlexCompressError(
            f"{spec} cannot be loaded: {str(error).splitlines()[0]} (write owner/name:configuration to choose one)."
        ) from error
    return loaded
