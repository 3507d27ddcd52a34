r"""Modular training of a BART that translates: one training for six sizes against a training for each.

Trains a BART of 12 + 12 layers from English to German on Multi30k, trains modules for it once, and assembles models of
1.1 to 6 times fewer layers with both strategies, against the baselines of `modular_cmudict.py`. Scores are BLEU by
sacrebleu on test_2016_flickr, greedy.

    python examples/benchmarks/modular_multi30k.py --data DIR                       # width 512, for a GPU
    python examples/benchmarks/modular_multi30k.py --data DIR --size cpu            # width 128 and fewer steps, for two cores
    python examples/benchmarks/modular_multi30k.py --data DIR --show                # the tables as far as they are
    python examples/benchmarks/modular_multi30k.py --data DIR --size cpu --rows 400 --test-rows 20 --steps 8 \
        --teacher-steps 8 --batch-size 8 --work /tmp/try --output /tmp/try/results.json

`DIR` holds `train.en`, `train.de`, `test_2016_flickr.en` and `.de`, packed with xz or not. The parts: `ours`,
`named` (a modular training that is told the ratios of the baselines), `unfrozen` (one of all weights), `baselines`,
`latency`. Every cell leaves a file in the work folder; what was run is not run again, and trainings go on from their last
checkpoint.
"""

from __future__ import annotations

import argparse
import lzma
from functools import partial
from pathlib import Path
from typing import Any

import modular_pipeline
import torch
from modular_cmudict import padded
from tokenizers import ByteLevelBPETokenizer
from transformers import BartConfig, BartForConditionalGeneration

from optimum_flexcompress.errors import MissingExtraError


try:
    import sacrebleu
    from sacrebleu.significance import PairedTest
except ImportError as error:
    raise MissingExtraError("sacrebleu", "report") from error


NAME = "modular_multi30k"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PAD, START, END = 0, 1, 2
LAYERS, LONGEST, NEW_TOKENS = 12, 96, 24
# Width, inner width of the feed-forward networks, heads, vocabulary.
SIZES = {"gpu": (512, 2048, 8, 8000), "cpu": (128, 256, 4, 4000)}
# What two cores can do in about three hours, instead of the defaults.
CPU_STEPS = {"teacher_steps": 3000, "steps": 900, "batch_size": 64, "rate": 1.5e-3}


def lines(folder: Path, name: str) -> list[str]:
    path = folder / name
    content = path.read_bytes() if path.is_file() else lzma.decompress((folder / f"{name}.xz").read_bytes())
    return content.decode("utf-8").rstrip("\n").split("\n")


class Pairs:
    """Sentences as ids, in a vocabulary of both languages."""

    def __init__(self, folder: Path, size: int, rows: int | None, test_rows: int | None):
        sources, targets = lines(folder, "train.en"), lines(folder, "train.de")
        self.tokenizer = ByteLevelBPETokenizer()
        self.tokenizer.train_from_iterator(
            [*sources, *targets], vocab_size=size, special_tokens=SPECIAL, show_progress=False
        )
        self.train = [
            {"input_ids": self.encode(source), "labels": self.encode(target)[1:]}
            for source, target in zip(sources[:rows], targets[:rows], strict=True)
        ]
        self.sources = [self.encode(source) for source in lines(folder, "test_2016_flickr.en")[:test_rows]]
        self.references = lines(folder, "test_2016_flickr.de")[:test_rows]

    def encode(self, text: str) -> list[int]:
        return [START, *self.tokenizer.encode(text).ids[: LONGEST - 2], END]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = padded([row["input_ids"] for row in rows], PAD)
    labels = padded([row["labels"] for row in rows], -100)
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "labels": labels}


@torch.inference_mode()
def predict(pairs: Pairs, model: BartForConditionalGeneration, batch_size: int = 100) -> list[str]:
    """Greedy translations."""
    model.eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    order = sorted(range(len(pairs.sources)), key=lambda index: len(pairs.sources[index]))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids = padded([pairs.sources[index] for index in part], PAD).to(device)
        out = model.generate(
            ids, attention_mask=ids.ne(PAD).long(), num_beams=1, do_sample=False, max_new_tokens=LONGEST
        )
        for index, row in zip(part, out.tolist(), strict=True):
            row = row[1:]
            row = row[: row.index(END)] if END in row else row
            found[index] = pairs.tokenizer.decode(row).strip()
    return [found[index] for index in range(len(order))]


def score(pairs: Pairs, texts: list[str]) -> dict[str, float]:
    """BLEU of translations."""
    return {"BLEU": sacrebleu.corpus_bleu(texts, [pairs.references]).score, "test_sentences": len(texts)}


def p_value(pairs: Pairs, ours: list[str], theirs: list[str]) -> float:
    """Of the difference in BLEU, by approximate randomization."""
    if ours == theirs:
        return 1.0  # sacrebleu asks which shuffles differ by more than nothing
    test = PairedTest(
        [("theirs", theirs), ("ours", ours)], {"BLEU": sacrebleu.BLEU()}, [pairs.references], test_type="ar"
    )
    _, scores = test()
    return float(scores["BLEU"][1].p_value)


def make_model(size: str) -> BartForConditionalGeneration:
    width, inner, heads, vocabulary = SIZES[size]
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocabulary,
            d_model=width,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=inner,
            decoder_ffn_dim=inner,
            max_position_embeddings=2 * LONGEST,
            dropout=0.1,
            activation_function="gelu",
            scale_embedding=True,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
            decoder_start_token_id=END,
            forced_eos_token_id=None,
        )
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modular_pipeline.add_arguments(parser, NAME, steps=2000, teacher_steps=6000, rate=5e-4)
    steps = ", ".join(f"--{name.replace('_', '-')} {count}" for name, count in CPU_STEPS.items())
    parser.add_argument("--size", choices=SIZES, default="gpu", help=f"(default: %(default)s); cpu: {steps}")
    if parser.parse_args().size == "cpu":
        parser.set_defaults(**CPU_STEPS)
    return parser.parse_args()


if __name__ == "__main__":
    given = parse()
    pairs = Pairs(given.data, SIZES[given.size][3], given.rows, given.test_rows)
    sentences = padded(pairs.sources[:32], PAD)
    modular_pipeline.main(
        NAME,
        given,
        modular_pipeline.Task(
            pairs.train,
            collate,
            partial(make_model, given.size),
            partial(predict, pairs),
            partial(score, pairs),
            partial(p_value, pairs),
            {"BLEU": 2},
            lower_is_better=False,
            example={"input_ids": sentences, "attention_mask": sentences.ne(PAD).long()},
            new_tokens=NEW_TOKENS,
        ),
        {"size": given.size, "width": SIZES[given.size][0], "layers": LAYERS},
    )
