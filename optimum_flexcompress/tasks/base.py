"""The interface of a task, and what all tasks share: loading, columns, tokenising."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import transformers
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel

from ..data import training_split
from ..errors import FlexCompressError, first_line


@dataclass(frozen=True)
class Column:
    """A column that a task reads.

    Attributes:
        role: The task's name for it, the key in `columns={role: name}`.
        aliases: The names under which it is looked for, in this order.
        required: Whether preparing fails without it.
    """

    role: str
    aliases: tuple[str, ...]
    required: bool = True


@dataclass
class Prepared:
    """A data set made ready for a model.

    Attributes:
        dataset: The splits, tokenised, unpadded, with `labels`.
        collator: Pads a list of rows to a batch of tensors.
        compute_metrics: `EvalPrediction -> {name: value}`, for `Trainer(compute_metrics=...)`.
        label_names: The class names in the order of their ids; None where there are no classes.
        main_metric: The figure to select and compare models by, a key of what `compute_metrics` returns.
        greater_is_better: Its direction.
        unit: How to show it: `share` (0 to 1, shown as a percentage), `percent` (0 to 100), or nothing.
        generation: Whether predictions are generated token ids (`predict_with_generate`).
        preprocess_logits: For `Trainer(preprocess_logits_for_metrics=...)`: shrinks a batch of outputs, on the device,
            to what `compute_metrics` needs. Language models need it, or the logits of a whole split pile up in memory.
        model_kwargs: What [`Task.load_model`] needs for a new head that fits the data, such as `num_labels`.
        windows: For each split the rows' origin, where one example became several rows (question answering).
    """

    dataset: DatasetDict
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    label_names: list[str] | None = None
    main_metric: str = ""
    greater_is_better: bool = True
    unit: str = ""
    generation: bool = False
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    windows: dict[str, Any] = field(default_factory=dict)


class Task:
    """One kind of model. Subclasses fill in the class attributes and `prepare`."""

    name: ClassVar[str]
    auto_class_name: ClassVar[str]
    # "module:class" of the ONNX Runtime model.
    ort_class_path: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    main_metric: ClassVar[str]
    greater_is_better: ClassVar[bool] = True
    generation: ClassVar[bool] = False
    default_max_length: ClassVar[int] = 128

    @property
    def auto_class(self) -> type:
        """The Auto class of Transformers that loads such a model."""
        return getattr(transformers, self.auto_class_name)

    @property
    def ort_class(self) -> type:
        """The ONNX Runtime class that runs an exported model."""
        module, name = self.ort_class_path.split(":")
        return getattr(importlib.import_module(module), name)

    def load_model(self, path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
        """Loads a model, compressed or not.

        Args:
            path: A folder or a Hub id.
            **kwargs: For `from_pretrained`: `num_labels`, `id2label`, `attn_implementation`, ...; see also
                [`Prepared.model_kwargs`].

        Returns:
            The model, in evaluation mode.

        Raises:
            FlexCompressError: There is no model there, it is damaged, or its head has another size.
        """
        model = load_pretrained(self.auto_class, path, **kwargs)
        set_padding(model)
        return model

    def load_processor(self, path: str | os.PathLike) -> Any:
        """Loads the tokenizer (or image processor) that belongs to a model.

        Args:
            path: A folder or a Hub id.

        Returns:
            The tokenizer, with a padding token.

        Raises:
            FlexCompressError: There is none.
        """
        tokenizer = load_pretrained(transformers.AutoTokenizer, path)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise FlexCompressError(
                    f"The tokenizer in {path} has neither a padding nor an end token: set `pad_token` and save it again."
                )
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def prepare(
        self,
        data: DatasetDict,
        processor: Any,
        *,
        max_length: int = 128,
        columns: Mapping[str, str] | None = None,
        label_names: Sequence[str] | None = None,
        model: PreTrainedModel | PretrainedConfig | None = None,
    ) -> Prepared:
        """Makes a data set ready for a model.

        Args:
            data: What [`optimum_flexcompress.data.load_data`] returned.
            processor: What [`Task.load_processor`] returned.
            max_length: Longest input in tokens; longer ones are cut (question answering: windows).
            columns: `{role: column name}` for columns with unusual names.
            label_names: The class names in the order of their ids; by default the model's, else those of the
                training split.
            model: The model (or its configuration) that the data is for, so that its label ids are used.

        Returns:
            The prepared data.

        Raises:
            FlexCompressError: A column is missing, or a label is not one of the model's.
        """
        raise NotImplementedError

    def read_output(self, output: Any, batch: Mapping[str, Any]) -> Any:
        """What `compute_metrics` reads, out of a model's output.

        Args:
            output: What the model returned.
            batch: What it was called with.

        Returns:
            A tensor or a tuple of tensors.
        """
        return output["logits"]

    def find_columns(self, data: DatasetDict, columns: Mapping[str, str] | None = None) -> dict[str, str]:
        """Which column plays which role.

        Args:
            data: The splits; the training split is looked at, else the first one.
            columns: The user's own choices, `{role: column name}`.

        Returns:
            `{role: column name}`, without the optional roles that are absent.

        Raises:
            FlexCompressError: A required column is missing, or `columns` names something that does not exist.
        """
        # Those of a test split without labels are not all of them.
        found = training_split(data).column_names
        columns = dict(columns or {})
        roles = [column.role for column in self.columns]
        for role, name in columns.items():
            if role not in roles:
                raise FlexCompressError(f"{self.name} has no column role {role!r}; its roles are {', '.join(roles)}.")
            if name not in found:
                raise FlexCompressError(f"The data set has no column {name!r}; it has {', '.join(found)}.")
        chosen = dict(columns)
        for column in self.columns:
            if column.role in chosen:
                continue
            taken = set(chosen.values())
            name = next((alias for alias in column.aliases if alias in found and alias not in taken), None)
            if name is not None:
                chosen[column.role] = name
            elif column.required:
                raise FlexCompressError(
                    f"{self.name} needs a column {column.role!r} (also looked for: {', '.join(column.aliases[1:])}); "
                    f'the data set has {", ".join(found)}. Name it with columns={{"{column.role}": "{found[0]}"}}, on '
                    f"the command line --columns {column.role}={found[0]}."
                )
        return chosen


def load_pretrained(cls: Any, path: str | os.PathLike, **kwargs: Any) -> Any:
    """`cls.from_pretrained(path)`, with the errors that a user can cause as one sentence.

    Args:
        cls: A class of Transformers.
        path: A folder or a Hub id.
        **kwargs: Passed on.

    Returns:
        What `from_pretrained` returns.

    Raises:
        FlexCompressError: There is nothing to load, or it is damaged or does not fit.
    """
    what = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}.get(cls.__name__, "model")
    folder = Path(path).expanduser()
    path = str(folder) if folder.exists() else str(path)
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FlexCompressError(f"There is no folder {path}: check the path of the model.")
    if folder.is_dir() and not any(folder.glob("*.json")):
        raise FlexCompressError(f"{path} is no model folder: it holds no config.json.")
    try:
        return cls.from_pretrained(path, **kwargs)
    except FlexCompressError:
        raise
    except SafetensorError as error:
        raise FlexCompressError(f"The weights in {path} are damaged ({error}): copy or train them again.") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise FlexCompressError(
            f"The weights in {path} do not have the sizes asked for; if only the head differs (another number of "
            "labels), pass ignore_mismatched_sizes=True to start with a new head."
        ) from error
    except (TypeError, AttributeError) as error:
        if what != "tokenizer":
            raise
        # What comes of a folder without the files of one.
        raise FlexCompressError(
            f"No tokenizer can be loaded from {path}: save it beside the model (tokenizer.save_pretrained)."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        if not folder.is_dir() and isinstance(error, OSError):
            raise FlexCompressError(
                f"There is no folder {path} here, and no model of that name could be fetched from the Hub: check the "
                f"path or the id ({reason.rstrip('.')})."
            ) from error
        raise FlexCompressError(f"No {what} can be loaded from {path}: {reason}") from error


def set_padding(model: Any) -> None:
    """Gives a model without a padding token its end token for one, as [`Task.load_processor`] does with tokenizers."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            eos = getattr(config, "eos_token_id", None)
            config.pad_token_id = eos[0] if isinstance(eos, list | tuple) else eos


def first_output(predictions: Any) -> np.ndarray:
    """The logits out of what a Trainer collects: models may return a tuple with hidden states behind them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def effective_length(max_length: int, tokenizer: Any) -> int:
    """`max_length`, or what the tokenizer says the model can take, whichever is smaller."""
    if max_length < 1:
        raise FlexCompressError(f"max_length must be at least 1, not {max_length}.")
    return min(max_length, tokenizer.model_max_length)


def map_splits(data: DatasetDict, function: Callable[[dict[str, list]], dict[str, list]]) -> DatasetDict:
    """Replaces all columns of every split by what `function` makes of a batch of rows.

    The results stay in memory: `datasets` would otherwise write a cache next to the user's own files.
    """
    return DatasetDict(
        {
            name: split.map(
                function,
                batched=True,
                remove_columns=split.column_names,
                keep_in_memory=True,
                desc=f"Preparing {name}",
            )
            for name, split in data.items()
        }
    )


def texts(dataset: Dataset, column: str) -> list[str]:
    """A column of texts, checked.

    Raises:
        FlexCompressError: There is no such column, or a row holds something else.
    """
    if column not in dataset.column_names:
        raise FlexCompressError(
            f"A split has no column {column!r}, which the others have; it has {', '.join(dataset.column_names)}: give all "
            "splits the same columns."
        )
    values = list(dataset[column])
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise FlexCompressError(
                f"Column {column!r}, row {row}: {value!r} is no text; name another column or mend the row."
            )
    return values
