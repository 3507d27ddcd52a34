"""The scripts under examples/, each from its command line to a saved model, on tiny models and slices of data."""

from __future__ import annotations

import csv
import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from optimum_flexcompress.data import load_data
from tests.tasks.toys import SPECIAL, word_tokenizer
from tests.tiny import build


EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 48


@pytest.fixture(scope="module")
def questions() -> list[dict[str, str]]:
    """Some questions of Banking77, of four intents."""
    rows = load_data(EXAMPLES / "data" / "banking77")["test"]
    intents = sorted(set(rows["category"]))[:4]
    chosen = [row for row in rows if row["category"] in intents]
    return chosen[:: len(chosen) // ROWS][:ROWS]


@pytest.fixture(scope="module")
def tokenizer(questions):
    """Knows every word that the tests write."""
    split = word_tokenizer([]).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    texts = [f"{row['text']} {row['category']}".replace("_", " ").lower() for row in questions]
    return word_tokenizer(sorted({word for text in texts for word, _ in split(text)}))


def save_model(folder: Path, tokenizer, family: str, name: str, **sizes) -> str:
    """A model of random weights and its tokenizer."""
    model = build(family, name, vocab_size=len(tokenizer), **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(monkeypatch, name: str, folder: Path, *options: str, steps: int = 6) -> dict[str, float]:
    """Runs a script as its command line does; what it measured."""
    common = "--report_to none --use_cpu true --disable_tqdm true --per_device_train_batch_size 4 --learning_rate 1e-3"
    arguments = [*options, "--output_dir", str(folder), "--max_steps", str(steps), *common.split()]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "# " in (folder / "README.md").read_text(encoding="utf-8")
    return json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))


def layer_parameters(model) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".layer." in name or ".h." in name)


def test_text_classification(tmp_path, monkeypatch, questions, tokenizer):
    model = save_model(
        tmp_path / "model",
        tokenizer,
        "bert",
        "BertForSequenceClassification",
        hidden_size=64,
        intermediate_size=256,
        num_labels=4,
    )
    data = tmp_path / "data"
    data.mkdir()
    write_csv(data / "train.csv", questions)
    write_csv(data / "test.csv", questions[:16])
    options = ["--model", model, "--dataset", data, "--label_column", "category", "--max_samples", 40]
    metrics = run(
        monkeypatch, "text_classification", tmp_path / "out", *options, "--mask_learning_rate", 0.5, steps=60
    )
    assert 0 <= metrics["eval_accuracy"] <= 1
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder) for folder in (model, tmp_path / "out")
    )
    assert layer_parameters(after) == pytest.approx(0.5 * layer_parameters(before), rel=0.02)
    assert after.config.id2label[0] == min(row["category"] for row in questions)


def test_question_answering(tmp_path, monkeypatch, questions, tokenizer):
    rows = []
    for index, (one, other) in enumerate(itertools.pairwise(questions)):
        answer = other["text"].split()[1]
        context = f"{one['text']} {other['text']}"
        starts = [context.index(answer, len(one["text"]))]
        question = other["category"].replace("_", " ")
        rows.append(
            {
                "id": str(index),
                "question": question,
                "context": context,
                "answers": {"text": [answer], "answer_start": starts},
            }
        )
    data = tmp_path / "data"
    data.mkdir()
    for split, part in (("train", rows), ("dev", rows[:8])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (data / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    model = save_model(tmp_path / "model", tokenizer, "bert", "BertForQuestionAnswering")
    options = ["--model", model, "--dataset", data, "--max_length", 48, "--lengths", 0.9, 0.7, 0.5]
    metrics = run(monkeypatch, "question_answering", tmp_path / "out", *options)
    assert {"eval_f1", "eval_exact_match", "eval_shorter_f1"} <= set(metrics)
    assert metrics["eval_loss"] != metrics["eval_shorter_loss"]
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", length_config=[0.9, 0.7, 0.5])
    assert loaded.config.num_hidden_layers == 3


def text_pairs(tokenizer):
    """The same tokenizer for encoder-decoders."""
    return word_tokenizer(
        [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if word not in SPECIAL],
        eos_token="[SEP]",
        bos_token="[CLS]",
        model_input_names=["input_ids", "attention_mask"],
    )


def test_summarization(tmp_path, monkeypatch, questions, tokenizer):
    tokenizer = text_pairs(tokenizer)
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    model = save_model(tmp_path / "model", tokenizer, "bart", "BartForConditionalGeneration", **tokens)
    data = tmp_path / "data"
    data.mkdir()
    pairs = [{"document": row["text"], "summary": row["category"].replace("_", " ")} for row in questions]
    write_csv(data / "train.csv", pairs)
    write_csv(data / "validation.csv", pairs[:8])
    options = ["--model", model, "--dataset", data, "--max_source_length", 24, "--max_target_length", 8]
    metrics = run(
        monkeypatch, "summarization", tmp_path / "out", *options, "--decoder_layers", 1, "--predict_with_generate"
    )
    assert 0 <= metrics["eval_chrf"] <= 100 and metrics["eval_generated_length"] <= 8
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert (student.config.encoder_layers, student.config.decoder_layers) == (3, 1)


@pytest.mark.parametrize("column", ["translation", "two columns"])
def test_translation(tmp_path, monkeypatch, questions, tokenizer, column):
    tokenizer = text_pairs(tokenizer)
    depth = {"num_layers": 4, "num_decoder_layers": 4, "eos_token_id": 3}
    model = save_model(tmp_path / "model", tokenizer, "t5", "T5ForConditionalGeneration", **depth)
    pairs = [{"en": row["text"].lower(), "xx": " ".join(row["text"].lower().split()[::-1])} for row in questions]
    data = tmp_path / "data"
    data.mkdir()
    for split, part in (("train", pairs), ("test", pairs[:8])):
        rows = [{"translation": row} if column == "translation" else row for row in part]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    options = ["--model", model, "--dataset", data, "--target", "xx", "--max_length", 12, "--ratio", 2]
    metrics = run(monkeypatch, "translation", tmp_path / "out", *options, "--predict_with_generate", steps=3)
    assert {"eval_chrf", "eval_assembled_chrf"} <= set(metrics)
    assert metrics["eval_loss"] != metrics["eval_assembled_loss"]
    small = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "ratio-2")
    assert (small.config.num_layers, small.config.num_decoder_layers) == (2, 2)


@pytest.mark.parametrize("streaming", [True, False])
def test_language_modeling(tmp_path, monkeypatch, questions, tokenizer, streaming):
    tokenizer = text_pairs(tokenizer)
    sizes = {"n_embd": 64, "n_inner": 256, "bos_token_id": 2, "eos_token_id": 3}
    model = save_model(tmp_path / "model", tokenizer, "gpt2", "GPT2LMHeadModel", **sizes)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("\n".join(row["text"] for row in questions), encoding="utf-8")
    files = ["--train_file", tmp_path / "train.txt", "--validation_file", tmp_path / "validation.txt"]
    options = ["--model", model, *files, "--block_size", 24, "--eval_blocks", 8, "--mask_learning_rate", 0.5]
    metrics = run(
        monkeypatch,
        "language_modeling",
        tmp_path / "out",
        *options,
        *(["--streaming"] if streaming else []),
        steps=24,
    )
    assert metrics["perplexity"] > 1
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    assert layer_parameters(after) == pytest.approx(0.7 * layer_parameters(before), rel=0.02)
