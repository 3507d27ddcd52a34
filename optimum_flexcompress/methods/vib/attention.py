"""What the heads of a model attend to: special tokens, the token itself, its neighbours, content words, the rest.

VTrans (arXiv 2406.05276) looks at its pruned models in this way: heads that attend to special tokens and to the
current token are among the first to go.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...architectures import StackView, describe
from ...errors import FlexCompressError
from ..capture import eager_attention


KINDS = ("special", "current", "previous", "next", "content", "other")
"""What attention goes to."""

_FUNCTION_WORDS = """
a an the this that these those some any no each every either neither both all such
i me my mine we us our ours you your yours he him his she her hers it its they them their theirs
myself yourself himself herself itself ourselves themselves who whom whose which what whoever there here
and or but nor so yet if than as because while although though unless until since whether when where why how
of in on at by for with to from into onto upon about above below under over between among through during before
after against within without across along around off out up down near per via
am is are was were be been being have has had having do does did doing will would shall should can could may
might must not don didn doesn isn aren wasn weren won wouldn couldn shouldn haven hasn hadn
s t d m ll re ve o
"""

SPECIAL, CURRENT, PREVIOUS, NEXT, CONTENT, OTHER = range(len(KINDS))

FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that carry grammar rather than content."""

_WORD = re.compile(r"\w+")


@dataclass
class AttentionShares:
    """Where attention goes.

    Attributes:
        stacks: For each stack, layer and head of the self-attention the shares of `KINDS`, which sum to 1:
            `[layers][heads][kinds]`; no heads where a layer has no self-attention.
        tokens: Number of tokens whose attention was looked at.
    """

    stacks: dict[str, list[list[list[float]]]]
    tokens: int


def probe_attention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str] | Iterable[Mapping[str, torch.Tensor]],
    *,
    max_length: int = 128,
    batch_size: int = 16,
    function_words: Collection[str] = FUNCTION_WORDS,
) -> AttentionShares:
    """Measures for each head of the self-attentions how its attention is shared out, on average over tokens.

    Each token that is attended to counts once: as special (separators, padding aside), else as the current token, the
    previous or the next one, else as part of a content word or as other (function words and punctuation).

    Args:
        model: The model, pruned or not.
        tokenizer: Its tokenizer.
        inputs: Texts, or batches of model inputs, of which those that the model takes count. Encoder-decoders read a text on both sides; their batches need
            `labels` or `decoder_input_ids`.
        max_length: Longest text in tokens.
        batch_size: Texts at a time.
        function_words: Words, in lower case, that are no content; the default is English.

    Returns:
        The shares.

    Raises:
        FlexCompressError: The model reads no text, or there is no text.
    """
    if model.main_input_name != "input_ids":
        raise FlexCompressError(f"{type(model).__name__} reads no text: attention can be probed on text only.")
    if isinstance(inputs, str):
        raise FlexCompressError("Give a list of texts to probe attention on, not a single one.")
    view = describe(model)
    two_sided = len(view.stacks) > 1
    sums: dict[str, list[torch.Tensor]] = {}
    seen = dict.fromkeys(view.stacks, 0)
    accepted = inspect.signature(model.forward).parameters
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(inputs, tokenizer, max_length, batch_size, two_sided):
            batch = {name: value.to(model.device) for name, value in batch.items() if name in accepted}
            ids = _ids_by_stack(model, view.stacks, batch)
            maps = _attention_maps(model, view.stacks, batch)
            for name, (tokens, valid) in ids.items():
                rows = zip(tokens.tolist(), valid.tolist())
                kinds = torch.tensor([token_kinds(row, mask, tokenizer, function_words) for row, mask in rows])
                found = [attention_shares(layer, kinds.to(layer.device), valid) for layer in maps[name]]
                before = sums.get(name)
                sums[name] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
                seen[name] += int(valid.sum())
    finally:
        model.train(was_training)
    if not sums:
        raise FlexCompressError("There is no text to probe attention on: give at least one.")
    return AttentionShares(
        {name: [(layer / seen[name]).tolist() for layer in layers] for name, layers in sums.items()},
        sum(seen.values()),
    )


def attention_shares(maps: torch.Tensor, kinds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sums attention by what it goes to.

    Args:
        maps: `[batch, heads, length, length]`, queries before keys.
        kinds: `SPECIAL`, `CONTENT` or `OTHER` for every token, `[batch, length]`.
        valid: Booleans, false for padding, `[batch, length]`.

    Returns:
        `[heads, kinds]`, summed over the valid queries.
    """
    length = kinds.shape[1]
    positions = torch.arange(length, device=kinds.device)
    distance = positions[None, :] - positions[:, None]
    # [batch, query, key]: a special token is special wherever it stands.
    category = kinds[:, None, :].expand(-1, length, -1).clone()
    for offset, kind in ((0, CURRENT), (-1, PREVIOUS), (1, NEXT)):
        category[(distance == offset) & (category != SPECIAL)] = kind
    weights = maps.double() * valid[:, None, :, None]
    return torch.stack([(weights * (category == kind)[:, None]).sum((0, 2, 3)) for kind in range(len(KINDS))], -1)


def token_kinds(
    ids: Sequence[int],
    mask: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    function_words: Collection[str] = FUNCTION_WORDS,
) -> list[int]:
    """`SPECIAL`, `CONTENT` or `OTHER` for every token.

    Args:
        ids: The tokens.
        mask: 0 for padding, which is special.
        tokenizer: Says what is special, and decodes the rest.
        function_words: Words that are no content.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    kinds = [SPECIAL] * len(ids)
    start = 0
    while start < len(ids):
        if not mask[start] or ids[start] in special:
            start += 1
            continue
        stop = start
        while stop < len(ids) and mask[stop] and ids[stop] not in special:
            stop += 1
        kinds[start:stop] = _text_kinds(list(ids[start:stop]), tokenizer, function_words)
        start = stop
    return kinds


def _text_kinds(ids: list[int], tokenizer: PreTrainedTokenizerBase, function_words: Collection[str]) -> list[int]:
    """The kinds of tokens between special ones. A token belongs to the word in whose letters it ends."""
    ends = [len(tokenizer.decode(ids[: count + 1], clean_up_tokenization_spaces=False)) for count in range(len(ids))]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    content = [False] * (len(text) + 1)
    for word in _WORD.finditer(text):
        if word.group().lower() not in function_words:
            content[word.start() + 1 : word.end() + 1] = [True] * (word.end() - word.start())
    return [CONTENT if content[min(end, len(text))] else OTHER for end in ends]


def _batches(
    inputs: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int, two_sided: bool
) -> Iterable[Mapping[str, torch.Tensor]]:
    if not (isinstance(inputs, Sequence) and inputs and isinstance(inputs[0], str)):
        yield from inputs
        return
    if tokenizer.pad_token is None:
        raise FlexCompressError("The tokenizer has no padding token: set tokenizer.pad_token, to its end token say.")
    for start in range(0, len(inputs), batch_size):
        encoded = tokenizer(
            list(inputs[start : start + batch_size]),
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        batch = dict(encoded)
        if two_sided:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield batch


def _ids_by_stack(
    model: PreTrainedModel, stacks: Mapping[str, StackView], batch: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each stack its tokens and which of them are valid."""
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    found = {name: (batch["input_ids"], mask.bool()) for name in stacks}
    if len(stacks) > 1:
        ids, labels = batch.get("decoder_input_ids"), batch.get("labels")
        valid = batch.get("decoder_attention_mask")
        if ids is None and labels is not None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
            ids = model.prepare_decoder_input_ids_from_labels(labels)
            valid = labels != -100
        if ids is None:
            raise FlexCompressError(
                f"{type(model).__name__} has a decoder: give batches with decoder_input_ids to probe its attention."
            )
        found["decoder"] = (ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.bool())
    return found


@torch.no_grad()
def _attention_maps(
    model: PreTrainedModel, stacks: Mapping[str, StackView], batch: Mapping[str, torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """The maps of all self-attentions, `[batch, heads, length, length]`, with no heads where there is none."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for name, stack in stacks.items():
        for layer in stack.layers:
            if layer.attention is not None:
                key, index = (name, layer.index), layer.attention.table.maps

                def keep(_module, _args, output, key=key, index=index):
                    found[key] = output[index]

                handles.append(layer.attention.module.register_forward_hook(keep))
    try:
        with eager_attention(model):
            model(**batch, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    ids = batch["input_ids"]
    none = torch.zeros(len(ids), 0, 1, 1, device=ids.device)
    return {name: [found.get((name, layer.index), none) for layer in stack.layers] for name, stack in stacks.items()}
