"""Modular training of a T5 that pronounces words: one training for six sizes against a training for each.

Trains a T5 of 12 + 12 layers on CMUdict, from letters to phonemes without stress, trains modules for it once, and
assembles models of 1.1 to 6 times fewer layers with both strategies. They stand against models of the same sizes that
were trained for their size alone, all their weights trainable: fewer layers fine-tuned, fewer layers with the logits
distilled, BERT-of-Theseus where one granularity gives the ratio. Each has as many steps as the modular training, and
once more its share of them. Scores are phoneme and word error rates on a held-out tenth of the words; where a word has
several pronunciations the nearest counts.

    python examples/benchmarks/modular_cmudict.py --data DIR
    python examples/benchmarks/modular_cmudict.py --data DIR --parts latency         # a part of it
    python examples/benchmarks/modular_cmudict.py --data DIR --show                  # the tables as far as they are
    python examples/benchmarks/modular_cmudict.py --data DIR --rows 400 --steps 8 --teacher-steps 8 --width 32 --work /tmp/try

`DIR` holds `cmudict.dict`, packed with xz or not. The parts: `ours`, `named` (a modular training
that is told the ratios of the baselines), `unfrozen` (one of all weights), `baselines`, `latency`. Every cell leaves a
file in the work folder; what was run is not run again, and trainings go on from their last checkpoint.
"""

from __future__ import annotations

import argparse
import lzma
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import modular_pipeline
import numpy as np
import torch
from scipy.stats import permutation_test
from transformers import T5Config, T5ForConditionalGeneration


NAME = "modular_cmudict"
PAD, END, FIRST = 0, 1, 2
LETTERS = "'-.abcdefghijklmnopqrstuvwxyz"
LAYERS = 12
LONGEST = 32
NEW_TOKENS = 12
SWAPS = 9999


def read(folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """Words and their pronunciations, the usual one first."""
    path = folder / "cmudict.dict"
    content = path.read_bytes() if path.is_file() else lzma.decompress(path.with_suffix(".dict.xz").read_bytes())
    words: dict[str, list[tuple[str, ...]]] = {}
    for line in content.decode("utf-8").splitlines():
        word, *phonemes = line.partition("#")[0].split()
        spoken = tuple(phoneme.rstrip("012") for phoneme in phonemes)
        found = words.setdefault(word.partition("(")[0], [])
        if spoken not in found:
            found.append(spoken)
    return words


class Words:
    """The words as ids, a tenth of them held out by a hash of their spelling."""

    def __init__(self, folder: Path, rows: int | None, test_rows: int | None):
        words = read(folder)
        phonemes = sorted({phoneme for spoken in words.values() for one in spoken for phoneme in one})
        self.letters = {letter: FIRST + index for index, letter in enumerate(LETTERS)}
        self.phonemes = {phoneme: FIRST + len(LETTERS) + index for index, phoneme in enumerate(phonemes)}
        self.size = FIRST + len(LETTERS) + len(phonemes)
        held_out = {word for word in words if zlib.crc32(word.encode()) % 10 == 0}
        self.train = [
            {"input_ids": self.spell(word), "labels": self.speak(spoken)}
            for word, pronunciations in words.items()
            if word not in held_out
            for spoken in pronunciations
        ][:rows]
        # In the order of the hash: any number of them is a fair sample.
        ordered = sorted(held_out, key=lambda word: zlib.crc32(word.encode()))[:test_rows]
        self.test = [(self.spell(word), [self.speak(spoken)[:-1] for spoken in words[word]]) for word in ordered]

    def spell(self, word: str) -> list[int]:
        return [*(self.letters[letter] for letter in word), END]

    def speak(self, phonemes: tuple[str, ...]) -> list[int]:
        return [*(self.phonemes[phoneme] for phoneme in phonemes), END]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = padded([row["input_ids"] for row in rows], PAD)
    labels = padded([row["labels"] for row in rows], -100)
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "labels": labels}


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def distance(one: list[int], other: list[int]) -> int:
    """Levenshtein's."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


@torch.inference_mode()
def predict(words: Words, model: T5ForConditionalGeneration, batch_size: int = 256) -> list[list[int]]:
    """Pronunciations of the test words, greedy."""
    model.eval()
    found = []
    for start in range(0, len(words.test), batch_size):
        ids = padded([spelled for spelled, _ in words.test[start : start + batch_size]], PAD).to(model.device)
        spoken = model.generate(
            ids, attention_mask=ids.ne(PAD).long(), num_beams=1, do_sample=False, max_new_tokens=LONGEST
        )
        for row in spoken.tolist():
            said = row[1:]
            found.append(said[: said.index(END)] if END in said else said)
    return found


def errors(words: Words, spoken: list[list[int]]) -> np.ndarray:
    """Wrong phonemes of each word and phonemes of the nearest reference, `[words, 2]`."""
    return np.array(
        [
            min((distance(said, reference), len(reference)) for reference in references)
            for said, (_, references) in zip(spoken, words.test, strict=True)
        ]
    )


def score(words: Words, spoken: list[list[int]]) -> dict[str, float]:
    """Phoneme and word error rates in percent."""
    wrong, length = errors(words, spoken).T
    rates = {"PER %": 100 * float(wrong.sum() / length.sum()), "WER %": 100 * float((wrong > 0).mean())}
    return {**rates, "test_words": len(words.test)}


def p_value(words: Words, ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Of the difference in phoneme error rate, by swapping the two models' answers to random words."""

    def difference(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
        return one.sum(axis) - other.sum(axis)

    # The lengths are those of the references: all but the same for both.
    samples = [errors(words, spoken)[:, 0] for spoken in (ours, theirs)]
    found = permutation_test(
        samples, difference, permutation_type="samples", vectorized=True, n_resamples=SWAPS, batch=100, rng=0
    )
    return float(found.pvalue)


def make_model(width: int, size: int) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=size,
            d_model=width,
            d_kv=32,
            num_heads=max(width // 32, 1),
            d_ff=2 * width,
            num_layers=LAYERS,
            num_decoder_layers=LAYERS,
            dropout_rate=0.1,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
        )
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modular_pipeline.add_arguments(parser, NAME, steps=1500, teacher_steps=5000, rate=1e-3)
    parser.add_argument("--width", type=int, default=128, help="of the residual stream (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    given = parse()
    vocabulary = Words(given.data, given.rows, given.test_rows)
    letters = padded([spelled for spelled, _ in vocabulary.test[:32]], PAD)
    modular_pipeline.main(
        NAME,
        given,
        modular_pipeline.Task(
            vocabulary.train,
            collate,
            partial(make_model, given.width, vocabulary.size),
            partial(predict, vocabulary),
            partial(score, vocabulary),
            partial(p_value, vocabulary),
            {"PER %": 2, "WER %": 2},
            lower_is_better=True,
            example={"input_ids": letters, "attention_mask": letters.ne(PAD).long()},
            new_tokens=NEW_TOKENS,
        ),
        {"width": given.width, "layers": LAYERS},
    )
