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

`DIR` holds `cmudict.dict`, packed with xz or not. The parts: `ours`, `baselines`, `latency`. Every cell leaves a file
in the work folder; what was run is not run again, and trainings go on from their last checkpoint.
"""

from __future__ import annotations

import argparse
import lzma
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from modular_latency import TARGET, generation_latency, latency_table
from modular_pipeline import Plan, Setting, Task, run, table, verdicts
from transformers import T5Config, T5ForConditionalGeneration

from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.evaluation.formatting import text_table


NAME = "modular_cmudict"
RESULTS = Path(__file__).parent / "results" / f"{NAME}.json"
PARTS = ("ours", "baselines", "latency")
PAD, END, FIRST = 0, 1, 2
LETTERS = "'-.abcdefghijklmnopqrstuvwxyz"
LAYERS = 12
LONGEST = 32
NEW_TOKENS = 12


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
def score(words: Words, model: T5ForConditionalGeneration, batch_size: int = 256) -> dict[str, float]:
    """Phoneme and word error rates in percent, greedy."""
    model.eval()
    errors = total = wrong = 0
    for start in range(0, len(words.test), batch_size):
        part = words.test[start : start + batch_size]
        ids = padded([spelled for spelled, _ in part], PAD).to(model.device)
        spoken = model.generate(
            ids, attention_mask=ids.ne(PAD).long(), num_beams=1, do_sample=False, max_new_tokens=LONGEST
        )
        for row, (_, references) in zip(spoken.tolist(), part, strict=True):
            said = row[1:]
            said = said[: said.index(END)] if END in said else said
            least, length = min((distance(said, reference), len(reference)) for reference in references)
            errors, total, wrong = errors + least, total + length, wrong + (least > 0)
    return {"PER %": 100 * errors / total, "WER %": 100 * wrong / len(words.test), "test_words": len(words.test)}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, default=Path("runs") / NAME)
    parser.add_argument("--steps", type=int, default=1500, help="of the modular training (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=5000, help="of the full model (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=128, help="of the residual stream (default: %(default)s)")
    parser.add_argument("--teacher-rate", type=float, default=1e-3)
    parser.add_argument("--rate", type=float, default=1e-3, help="of everything else (default: %(default)s)")
    parser.add_argument(
        "--test-rows", type=int, default=3000, help="held-out words to score on (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, help="bound of the rows to train on, to try the script out")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    facts = {"width": options.width, "layers": LAYERS, "rows": options.rows, "test_rows": options.test_rows}
    setting = Setting(
        options.teacher_steps,
        options.steps,
        options.batch_size,
        options.teacher_rate,
        options.rate,
        options.bf16,
        facts=facts,
    )
    words = Words(options.data, options.rows, options.test_rows)
    task = Task(
        words.train,
        collate,
        partial(make_model, options.width, words.size),
        partial(score, words),
        {"PER %": 2, "WER %": 2},
        lower_is_better=True,
    )
    cells = Cells(options.work, asdict(setting), options.threads)
    plan = Plan(cells, lambda: task, setting)
    print(describe_environment(environment_info(options.threads)))
    if not options.show:
        run(plan, options.parts, lambda: cells.write(options.output))
        if "latency" in options.parts:
            ids = padded([spelled for spelled, _ in words.test[:1]], PAD)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            cells.run("latency", lambda: generation_latency(plan.folders(), batch, NEW_TOKENS, options.threads))
            cells.write(options.output)
    header, rows, empty = table(plan, f"{NAME}.py --data {options.data.name.upper()}")
    print(f"\nCMUdict, width {options.width}, {LAYERS} + {LAYERS} layers\n{text_table(header, rows)}")
    print("\n".join(verdicts(plan)))
    latency = cells.get("latency")
    if latency is not None:
        shape = "x".join(map(str, latency["batch"]))
        print(f"\nGeneration of {latency['new_tokens']} tokens from {shape} letters, width {options.width}")
        print(text_table(*latency_table(latency)))
        speedup = latency["runs"]["PyTorch fp32, greedy"]["size-first 6"]["speedup"]
        print(f"6x in PyTorch fp32, greedy: {speedup:.2f}x (at least {TARGET} wanted)")
    else:
        empty.append(f"python examples/benchmarks/{NAME}.py --data DIR --parts latency")
    for command in empty:
        print(f"  empty: {command}")


if __name__ == "__main__":
    main()
