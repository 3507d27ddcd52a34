"""The folders that the pages of the documentation name: small models, and real questions of Banking77."""

from __future__ import annotations

import csv
import lzma
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from optimum_flexcompress.data import load_data
from optimum_flexcompress.tasks import get_task


BANKING77 = Path(__file__).parents[2] / "examples" / "data" / "banking77"
INTENTS = ("card_arrival", "exchange_rate", "lost_or_stolen_card", "top_up_failed")
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_world(folder: Path) -> None:
    """Makes `questions`, a data set, and models for it:

    `my-model`, fine-tuned, of four layers; `MODEL`, which has no head yet, and `DATA`, the same questions; `my-t5`, an
    encoder-decoder.
    """
    texts = _questions(folder / "questions")
    _questions(folder / "DATA")
    tokenizer = _tokenizer(texts)
    torch.manual_seed(0)
    _bert(len(tokenizer), tokenizer, folder)
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4)
    t5.decoder_start_token_id, t5.eos_token_id = 0, 3
    T5ForConditionalGeneration(t5).save_pretrained(folder / "my-t5")
    tokenizer.save_pretrained(folder / "my-t5")


def _questions(folder: Path) -> list[str]:
    folder.mkdir()
    texts = []
    for name, file, opener, count in (
        ("train", BANKING77 / "train.csv.xz", lzma.open, 100),
        ("test", BANKING77 / "test.csv", open, 10),
    ):
        with opener(file, "rt", encoding="utf-8", newline="") as source:
            rows = list(csv.DictReader(source))
        by_intent = [[row["text"] for row in rows if row["category"] == intent][:count] for intent in INTENTS]
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["text", "label"])
            writer.writerows([text, label] for group in zip(*by_intent) for label, text in enumerate(group))
        texts += [text for group in by_intent for text in group]
    return texts


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Word by word."""
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*_SPECIAL, *sorted(words)])}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **roles)


def _bert(vocabulary: int, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=256,
        max_position_embeddings=64,
        id2label=dict(enumerate(INTENTS)),
        label2id={name: index for index, name in enumerate(INTENTS)},
    )
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")
    data = get_task("text-classification").prepare(
        load_data(folder / "questions"), tokenizer, max_length=32, model=model
    )
    arguments = TrainingArguments(
        str(folder / "work"),
        num_train_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=data.dataset["train"], data_collator=data.collator)
    trainer.train()
    model.save_pretrained(folder / "my-model")
    tokenizer.save_pretrained(folder / "my-model")
