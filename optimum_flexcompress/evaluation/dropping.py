"""What a benchmark says about the tokens that models drop."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config_sizes import LENGTHS_KEY
from ..errors import FlexCompressError
from ..token_dropping import LengthConfig, kept_positions, using_lengths
from .artifact import Artifact, open_artifact
from .tokens import trace_tokens


# Roles of the columns that hold what an encoder reads, in its order.
TEXT_ROLES = ("tokens", "question", "text", "source", "context", "text_pair")
# A text of about this many tokens shows something and still fits a page.
EXAMPLE_TOKENS = 48
# Among so many rows of the data set the example is chosen.
EXAMPLE_ROWS = 300

Text = tuple[Any, ...]
"""A text, or a pair of texts; a text may be given as its words."""


def lengths_in(artifact: Artifact) -> LengthConfig | None:
    """The length configuration that an artifact runs with, whatever runs it; None where it keeps every token."""
    return LengthConfig.parse(getattr(artifact.config, LENGTHS_KEY, None))


def kept_by_layer(
    lengths: LengthConfig, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], rows: Any
) -> dict[str, Any]:
    """The lengths of a model, and what they come to.

    Args:
        lengths: Its length configuration.
        model: A PyTorch model with these lengths; its weights do not matter.
        batch: One input of the longest length that is timed.
        rows: The prepared rows of the data set.

    Returns:
        `config`: the configuration. `kept`: tokens of that input and tokens left after each layer. `real`: the same
        on average over the rows, where they have tokens.
    """
    kept = [len(layer[0]) for layer in kept_positions(model, batch)]
    with using_lengths(model, None):
        inputs = len(kept_positions(model, batch)[0][0])
    described: dict[str, Any] = {"config": lengths.to_dict(), "kept": {"input": inputs, "layers": kept}}
    if "input_ids" in rows.column_names and len(rows):
        sizes, counts = np.unique([len(ids) for ids in rows["input_ids"]], return_counts=True)
        means = np.average([lengths.at(int(size)) for size in sizes], axis=0, weights=counts)
        mean = float(np.average(sizes, weights=counts))
        described["real"] = {"input": mean, "layers": [float(value) for value in means]}
    return described


def choose_text(tokenizer: Any, rows: Any, columns: Mapping[str, str], max_length: int) -> Text | None:
    """A text of the data set to look at: the longest of at most `EXAMPLE_TOKENS` tokens, else the shortest.

    Args:
        tokenizer: Counts the tokens.
        rows: The rows as they are in the data set.
        columns: The task's columns in them, by role.
        max_length: Longest input.

    Returns:
        The text or the pair of texts; None where the task reads none.
    """
    names = [columns[role] for role in TEXT_ROLES if role in columns]
    if not names or not len(rows):
        return None
    texts = [tuple(row[name] for name in names) for row in rows.select(range(min(len(rows), EXAMPLE_ROWS)))]
    sizes = [
        len(
            tokenizer(
                *text, truncation=True, max_length=max_length, is_split_into_words=not isinstance(text[0], str)
            ).input_ids
        )
        for text in texts
    ]
    fitting = [index for index, size in enumerate(sizes) if size <= EXAMPLE_TOKENS]
    best = max(fitting, key=sizes.__getitem__) if fitting else int(np.argmin(sizes))
    return texts[best]


def explain_words(
    artifacts: Mapping[str, Artifact],
    rows: Any,
    columns: Mapping[str, str],
    sentence: str | Sequence[str] | None,
    max_length: int | None,
    originals: Mapping[str, str | os.PathLike] | None = None,
) -> dict[str, dict[str, Any]]:
    """For each model that drops tokens, which words of a text survive to which layer.

    A graph of ONNX Runtime does not tell which tokens it keeps. Its lengths are then run in PyTorch, where exactly
    one of the compared PyTorch models has the same lengths, or was trained for dropping, or else in the one that it was
    made from; the trace names that model.

    Args:
        artifacts: The models, by name.
        rows: The rows as they are in the data set.
        columns: The task's columns in them, by role.
        sentence: A text or a pair of texts; None chooses one of the rows.
        max_length: Longest input; None is the task's default.
        originals: By name, the folder of the PyTorch model that one of the others was made from.

    Returns:
        By name what [`TokenTrace.to_dict`] gives, or `{"note": why there is none}`. Nothing where no model drops
        tokens, or the task reads no text.
    """
    dropping = {name: lengths for name, artifact in artifacts.items() if (lengths := lengths_in(artifact))}
    if not dropping:
        return {}
    first = artifacts[next(iter(dropping))]
    max_length = max_length or first.task.default_max_length
    text = (sentence,) if isinstance(sentence, str) else sentence
    if text is None:
        text = choose_text(first.load_processor(), rows, columns, max_length)
    if text is None:
        return {}
    able = [
        name
        for name, artifact in artifacts.items()
        if artifact.torch_model is not None and hasattr(artifact.config, LENGTHS_KEY)
    ]
    traces: dict[str, dict[str, Any]] = {}
    for name, lengths in dropping.items():
        alike = [other for other in able if dropping.get(other) == lengths] or able
        source = name if name in able else alike[0] if len(alike) == 1 else None
        if source is None and name in (originals or {}):
            source = Path(originals[name]).name
            opened = open_artifact(originals[name], first.task)
        elif source is None:
            others = f"{len(able)} PyTorch models" if able else "no PyTorch model"
            traces[name] = {
                "note": f"An ONNX graph does not tell which tokens it keeps, and {others} here could tell for it: "
                "measure it beside the one PyTorch model that it was exported from."
            }
            continue
        else:
            opened = artifacts[source]
        try:
            trace = trace_tokens(opened.model, opened.load_processor(), *text, lengths=lengths, max_length=max_length)
        except FlexCompressError as error:
            traces[name] = {"note": str(error)}
            continue
        trace.traced_in = source if source != name else None
        traces[name] = trace.to_dict()
    return traces
