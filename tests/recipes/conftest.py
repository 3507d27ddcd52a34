"""A tiny model folder and a small data folder, real questions of Banking77 with four of its intents."""

from __future__ import annotations

import csv
import lzma
from pathlib import Path

import pytest


BANKING77 = Path(__file__).parents[2] / "examples" / "data" / "banking77"
INTENTS = ("card_arrival", "exchange_rate", "lost_or_stolen_card", "top_up_failed")


def _rows(file, opener):
    with opener(file, "rt", encoding="utf-8", newline="") as text:
        return [row for row in csv.DictReader(text) if row["category"] in INTENTS]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """`train.csv` (48 rows) and `test.csv` (24 rows), intents in turn."""
    folder = tmp_path_factory.mktemp("data")
    for name, file, opener, count in (
        ("train", BANKING77 / "train.csv.xz", lzma.open, 12),
        ("test", BANKING77 / "test.csv", open, 6),
    ):
        rows = _rows(file, opener)
        by_intent = [[row for row in rows if row["category"] == intent][:count] for intent in INTENTS]
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, ["text", "category"])
            writer.writeheader()
            writer.writerows(row for group in zip(*by_intent) for row in group)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, data_folder):
    """A BERT body of four layers with random weights, and a word-level tokenizer of the data's words."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    with (data_folder / "train.csv").open(encoding="utf-8", newline="") as text:
        lines = [row["text"] for row in csv.DictReader(text)]
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words = {word for line in lines for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line))}
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    return folder
