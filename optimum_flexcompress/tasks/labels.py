"""Class names and class ids: the data set's, the model's, and the way from one to the other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, DatasetDict
from transformers import PretrainedConfig, PreTrainedModel

from ..data import training_split
from ..errors import FlexCompressError, nearest


# The tasks' column roles that hold classes.
CLASS_ROLES = ("label", "tags")


def model_config(model: PreTrainedModel | PretrainedConfig | None) -> PretrainedConfig | None:
    """The configuration of a model, or the configuration itself."""
    return getattr(model, "config", model)


def names_of_model(model: PreTrainedModel | PretrainedConfig | None) -> list[str] | None:
    """The class names a model was trained with; None where it has only the stand-ins `LABEL_0`, ..."""
    config = model_config(model)
    id2label = getattr(config, "id2label", None)
    if not id2label:
        return None
    names = [str(id2label[index]) for index in sorted(id2label)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def names_of_feature(feature: Any) -> list[str] | None:
    """The names in a `ClassLabel`, also one inside lists; None for other features."""
    while not isinstance(feature, ClassLabel):
        if isinstance(feature, list):
            feature = feature[0]
        elif hasattr(feature, "feature"):
            feature = feature.feature
        else:
            return None
    return list(feature.names)


def flatten(values: Any) -> list[Any]:
    """All scalars of a column, whose rows may be lists."""
    return [item for value in values for item in (value if isinstance(value, list | tuple) else (value,))]


class LabelMap:
    """The way from a data set's labels to class ids.

    Args:
        data: The splits.
        column: The column of labels: names, ids, or lists of either.
        label_names: The wanted class names in the order of their ids; None: the model's, else the data set's own.
        model: The model whose ids count.

    Attributes:
        names: The class names, in the order of their ids.

    Raises:
        FlexCompressError: The data set's labels are not the wanted ones.
    """

    def __init__(
        self,
        data: DatasetDict,
        column: str,
        label_names: Sequence[str] | None = None,
        model: PreTrainedModel | PretrainedConfig | None = None,
    ):
        self.column = column
        first = training_split(data)
        declared = names_of_feature(first.features[column])
        present = {item for item in flatten(first[column]) if _is_label(item)}
        own = declared or _sorted_names(present)
        asked = [str(name) for name in label_names] if label_names is not None else None
        wanted = asked or names_of_model(model)
        size = getattr(model_config(model), "num_labels", None)
        # Plain ids say nothing about names: `0, 1` fits any two classes, in their order.
        plain_ids = declared is None and all(type(item) is int and item >= 0 for item in present)
        if wanted is None and plain_ids and size is not None and all(item < size for item in present):
            wanted = [str(index) for index in range(size)]
        elif wanted is None and plain_ids and 0 in present and max(present) <= 2 * len(present):
            # A rare class may be absent from the split; labels from 1 (stars, say) are names instead.
            wanted = [str(index) for index in range(max(present) + 1)]
        self.names = wanted or own
        self._ids = self._match(own, declared is not None, plain_ids)
        self._declared = declared

    def _match(self, own: list[str], declared: bool, plain_ids: bool) -> dict[Any, int]:
        by_name = {name: index for index, name in enumerate(self.names)}
        by_lower = {name.lower(): index for index, name in enumerate(self.names)}
        named = {name: by_name.get(name, by_lower.get(name.lower())) for name in own}
        if all(index is not None for index in named.values()):
            # All wanted classes, since the split that was looked at need not have every one of them.
            ids: dict[Any, int] = {**by_name, **named}
            if declared:
                ids.update({position: named[name] for position, name in enumerate(own)})
            elif plain_ids:
                ids.update({int(name): index for name, index in named.items()})
            return ids
        if declared and len(own) == len(self.names):
            ids = {name: position for position, name in enumerate(own)}
            ids.update({position: position for position in range(len(own))})
            return ids
        if plain_ids and all(int(name) < len(self.names) for name in own):
            return {position: position for position in range(len(self.names))}
        # Some of the model's labels may well be absent from a data set, but not the other way round. What is not
        # known here is reported when a row with it comes.
        return {name: index for name, index in named.items() if index is not None}

    def __call__(self, value: Any) -> int:
        """The id of one label.

        Raises:
            FlexCompressError: It is not one of the classes.
        """
        if value is None or value == "":
            raise FlexCompressError(f"Column {self.column!r} has a row without a label: remove such rows.")
        found = self._ids.get(value, self._ids.get(str(value)))
        if found is None:
            names = self.names if len(self.names) <= 20 else [*self.names[:20], f"... {len(self.names)} in all"]
            hint = nearest(str(value), names) if isinstance(value, str) else f" Known: {', '.join(names)}."
            raise FlexCompressError(f"Column {self.column!r} has the label {value!r}, which is not a class.{hint}")
        return found


def _is_label(item: Any) -> bool:
    # The Hub writes -1 where there is none, a table nothing.
    return item is not None and item != -1 and item != ""


def class_column(columns: Mapping[str, str]) -> str | None:
    """The column that holds classes, of what [`Task.find_columns`] found; None for tasks without."""
    return next((columns[role] for role in CLASS_ROLES if role in columns), None)


def _sorted_names(present: set[Any]) -> list[str]:
    """The distinct labels as names, in numeric order where they are numbers."""
    if all(isinstance(item, int | float) for item in present):
        return [str(item) for item in sorted(present)]
    return sorted(str(item) for item in present)


def without_unlabelled(data: DatasetDict, column: str) -> DatasetDict:
    """Leaves out splits whose every label is -1 or missing, as the test splits of GLUE on the Hub.

    Raises:
        FlexCompressError: No split has labels.
    """
    labelled = DatasetDict(
        {
            name: split
            for name, split in data.items()
            if column in split.column_names and any(map(_is_label, flatten(split[column])))
        }
    )
    if not labelled:
        raise FlexCompressError(
            f"No row has a label in the column {column!r}: name another with --columns label=NAME."
        )
    return labelled


def model_kwargs(names: Sequence[str], **more: Any) -> dict[str, Any]:
    """What `from_pretrained` needs for a new head with these classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        **more,
    }
