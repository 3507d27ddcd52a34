"""Masked and causal language models: blocks, fixed masks, perplexity against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.tasks.language_modeling import perplexity_metrics, token_losses
from tests.tasks.toys import splits, word_tokenizer
from tests.tiny import build


TEXTS = ["anna lives in paris", "the film was very good", "bad plot", "anna moved to berlin"] * 6


def corpus():
    return splits(train={"text": TEXTS}, test={"text": TEXTS[:9]})


def test_blocks_hold_every_token_once_with_an_end_after_each_text():
    tokenizer = word_tokenizer(eos_token="[SEP]")
    prepared = get_task("text-generation").prepare(corpus(), tokenizer, max_length=8)
    stream = [token for block in prepared.dataset["test"]["input_ids"] for token in block]
    expected = [t for text in TEXTS[:9] for t in [*tokenizer(text, add_special_tokens=False)["input_ids"], 3]]
    assert stream == expected
    assert {len(block) for block in prepared.dataset["test"]["input_ids"][:-1]} == {8}
    assert prepared.dataset["test"]["labels"][:] == prepared.dataset["test"]["input_ids"][:]
    assert not prepared.greater_is_better


def test_perplexity_is_the_exponential_of_the_mean_loss():
    model = build("gpt2", "GPT2LMHeadModel")
    prepared = get_task("text-generation").prepare(corpus(), word_tokenizer(), max_length=7)
    rows = prepared.dataset["test"]
    batch = prepared.collator([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total = count = right = 0
    for ids in rows["input_ids"]:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            total -= scores[position - 1, ids[position]].item()
            right += int(scores[position - 1].argmax() == ids[position])
            count += 1
    labels = batch["labels"]
    reduced = prepared.preprocess_logits(logits, labels)
    assert reduced.shape == (*labels.shape, 2) and torch.isnan(reduced[:, 0, 0]).all()
    for predictions in (reduced.numpy(), logits.numpy()):
        metrics = prepared.compute_metrics(EvalPrediction(predictions, labels.numpy()))
        assert metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(right / count)


def test_masked_perplexity_counts_masked_tokens_only():
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 5), -100)
    labels[0, 1], labels[1, 3] = 4, 7
    expected = -(logits[0, 1].log_softmax(-1)[4] + logits[1, 3].log_softmax(-1)[7]) / 2
    reduced = token_losses(shift=False)(logits, labels)
    metrics = perplexity_metrics(shift=False)(EvalPrediction(reduced.numpy(), labels.numpy()))
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_masks_of_evaluation_rows_are_fixed_and_those_of_training_rows_are_not():
    tokenizer = word_tokenizer()
    task = get_task("fill-mask")
    first, again = (task.prepare(corpus(), tokenizer, max_length=24) for _ in range(2))
    assert first.dataset["test"]["labels"][:] == again.dataset["test"]["labels"][:]
    for row in first.dataset["test"]:
        masked = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert len(masked) == max(1, round(0.15 * (len(row["input_ids"]) - 2)))
        assert all(row["input_ids"][i] == tokenizer.mask_token_id for i in masked)
        assert row["input_ids"][0] == 2 and row["input_ids"][-1] == 3
    assert "labels" not in first.dataset["train"].column_names
    rows = [first.dataset["train"][i] for i in range(len(first.dataset["train"]))]
    torch.manual_seed(0)
    batches = [first.collator(rows) for _ in range(2)]
    assert all("labels" in batch for batch in batches)
    assert not torch.equal(batches[0]["labels"], batches[1]["labels"])


def test_mistakes():
    with pytest.raises(FlexCompressError, match="mask token"):
        tokenizer = word_tokenizer()
        tokenizer.mask_token = None
        get_task("fill-mask").prepare(corpus(), tokenizer)
    with pytest.raises(FlexCompressError, match="too short for a block"):
        get_task("fill-mask").prepare(corpus(), word_tokenizer(), max_length=3)
    with pytest.raises(FlexCompressError, match="no text"):
        get_task("text-generation").prepare(splits(train={"text": ["", ""]}), word_tokenizer())
    with pytest.raises(FlexCompressError, match="No token is labelled"):
        perplexity_metrics(shift=True)(EvalPrediction(np.zeros((1, 1, 2)), np.zeros((1, 1), dtype=int)))
