"""What masked and causal language models share: texts cut into blocks, perplexity without keeping logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction

from ..errors import FlexCompressError
from .base import texts


IGNORED = -100


def make_blocks(data: DatasetDict, column: str, tokenizer: Any, length: int, *, wrap: bool) -> DatasetDict:
    """Joins all texts of a split and cuts them into blocks.

    Args:
        data: The splits.
        column: The texts.
        tokenizer: The tokenizer.
        length: Tokens of a block; the last block of a split may be shorter.
        wrap: True puts the tokenizer's special tokens around every block (masked models); False puts an end token
            after every text (causal models).

    Returns:
        The splits with `input_ids` and `attention_mask`.

    Raises:
        FlexCompressError: The block is too short, or there is no text.
    """
    before, after = _special_tokens(tokenizer) if wrap else ([], [])
    room = length - len(before) - len(after)
    if room < 2:
        raise FlexCompressError(f"max_length={length} is too short for a block of text: choose at least 16.")
    end = [] if wrap or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    result = DatasetDict()
    for name, split in data.items():
        stream: list[int] = []
        rows = texts(split, column)
        for begin in range(0, len(rows), 1000):
            # verbose=False: the tokenizer would warn about texts longer than the model, which are cut below.
            encoded = tokenizer(rows[begin : begin + 1000], add_special_tokens=False, verbose=False)["input_ids"]
            for ids in encoded:
                stream.extend(ids)
                stream.extend(end)
        blocks = [stream[begin : begin + room] for begin in range(0, len(stream), room)]
        if wrap:
            blocks = [[*before, *block, *after] for block in blocks]
        elif len(blocks) > 1 and len(blocks[-1]) < 2:
            blocks.pop()  # a single token predicts nothing
        if not blocks:
            raise FlexCompressError(f"The split {name!r} has no text in the column {column!r}.")
        result[name] = Dataset.from_dict(
            {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]}
        )
    return result


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text.

    Read off an encoded text: `build_inputs_with_special_tokens` of a tokenizer without a class of its own adds nothing.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    first = special.index(0) if 0 in special else len(ids)
    last = len(special) - special[::-1].index(0) if 0 in special else len(ids)
    return ids[:first], ids[last:]


def token_losses(shift: bool) -> Callable[[Any, Any], torch.Tensor]:
    """A `preprocess_logits_for_metrics` that keeps two numbers for each token instead of a vocabulary of logits.

    Args:
        shift: Whether position `n` predicts token `n + 1` (causal models).

    Returns:
        `(logits, labels) -> (B, N, 2)`: the negative log-likelihood of the label and the likeliest token. Position
        `n` belongs to label `n`; with `shift`, the first one is nan and -1.
    """

    def reduce(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        targets = labels
        if shift:
            logits, targets = logits[:, :-1], labels[:, 1:]
        logits = logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(targets.shape)
        # float64 holds every token id and is what perplexity is summed in anyway.
        reduced = torch.stack([loss.double(), logits.argmax(dim=-1).double()], dim=-1)
        if shift:
            first = torch.tensor([float("nan"), -1.0], dtype=reduced.dtype, device=reduced.device)
            reduced = torch.cat([first.expand(len(reduced), 1, 2), reduced], dim=1)
        return reduced

    return reduce


def perplexity_metrics(shift: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """Perplexity and accuracy over the labelled tokens.

    Args:
        shift: Whether the first position of a row has no prediction (causal models).

    Returns:
        A `compute_metrics`; it takes what [`token_losses`] makes of logits, or the logits themselves.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        values = prediction.predictions
        values = values[0] if isinstance(values, tuple) else values
        labels = np.asarray(prediction.label_ids)
        if values.shape[-1] != 2:
            values = token_losses(shift)(torch.as_tensor(values), torch.as_tensor(labels)).numpy()
        valid = labels != IGNORED
        if shift:
            valid[:, 0] = False
        if not valid.any():
            raise FlexCompressError("No token is labelled, so there is no perplexity: use longer texts.")
        loss = float(values[..., 0][valid].mean())
        return {
            # exp(88) is near the end of single precision; a loss beyond it is not a number worth telling apart.
            "perplexity": math.exp(min(loss, 88.0)),
            "loss": loss,
            "accuracy": float((values[..., 1][valid] == labels[valid]).mean()),
        }

    return compute
