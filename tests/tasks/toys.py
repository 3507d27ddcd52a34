"""A tokenizer of a few words, and data sets made of them."""

from __future__ import annotations

from collections.abc import Iterable

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


WORDS = [
    "good",
    "bad",
    "film",
    "plot",
    "is",
    "was",
    "very",
    "not",
    "the",
    "a",
    "in",
    "of",
    "paris",
    "berlin",
    "anna",
    "lives",
    "moved",
    "to",
    "city",
    "where",
    "who",
    "answer",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer(words: Iterable[str] = WORDS, **more) -> PreTrainedTokenizerFast:
    """Lower-cased words and punctuation; `[CLS] a [SEP] b [SEP]`."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=64, **{**names, **more}
    )


def splits(**columns_by_split) -> DatasetDict:
    """`splits(train={"text": [...]}, test={...})`."""
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in columns_by_split.items()})


def reviews() -> DatasetDict:
    """Two classes by name."""
    return splits(
        train={"text": ["good film", "bad plot", "very good", "not good"], "label": ["pos", "neg", "pos", "neg"]},
        test={"text": ["the film is good", "bad"], "label": ["pos", "neg"]},
    )
