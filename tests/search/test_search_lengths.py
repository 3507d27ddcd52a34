"""`search_lengths`: models and data of every kind, what it writes, what it refuses."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import optimum_flexcompress
from optimum_flexcompress import (
    FlexCompressConfig,
    FlexCompressError,
    LengthAdaptiveConfig,
    LengthConfig,
    MiniLMConfig,
    lengths_of,
    set_lengths,
    using_lengths,
)
from optimum_flexcompress.search import Front, hold_out, length_scoring, search_lengths
from optimum_flexcompress.token_dropping.model import write_lengths
from tests.methods.length_adaptive.families import wide
from tests.tasks.toys import WORDS, splits, word_tokenizer
from tests.tiny import build


NAMES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
FEW = {"population": 3, "trials": 4, "max_length": 16, "picture": False, "progress": False}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (6 + n % 12,), generator=generator)) for n in range(count)
    ]


def reviews(count=24, **more):
    return splits(train={"text": sentences(count), "label": ["a", "b", "c"] * (count // 3)}, **more)


def classifier(**overrides):
    """A classifier that says it was trained to drop tokens."""
    model = build("bert", "BertForSequenceClassification", **NAMES, **overrides)
    write_lengths(model, None)
    return model


def search(model=None, data=None, output=None, **options):
    model = classifier() if model is None else model
    return search_lengths(model, data or reviews(), output=output, **{"processor": word_tokenizer(), **FEW, **options})


@pytest.fixture
def folder(tmp_path):
    """A model folder as length-adaptive training leaves it."""

    def save(config=None, name="model"):
        model = classifier()
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
        if config is not None:
            FlexCompressConfig(methods=[config]).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_what_is_written(tmp_path):
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    front = search(model, output=tmp_path / "front", trials=8, picture=True)
    files = sorted(file.name for file in (tmp_path / "front").iterdir())
    assert files == ["front.json", "front.png", "front.svg", "search.db"]
    assert Front.load(tmp_path / "front") == front
    data = json.loads((tmp_path / "front" / "front.json").read_text())
    assert (data["objective"], data["metric"], data["unit"]) == ("macs", "accuracy", "share")
    assert data["evaluated"] == 8 and data["pick"] is None and data["max_length"] == 16
    assert data["options"]["examples"] == "all 24 examples of train" and data["environment"]["cpu"]
    assert [point.cost for point in front.points] == sorted({point.cost for point in front.points})
    assert front.full.relative_cost == 1 and front.full.lengths.values == (16, 16, 16)
    assert all(point.relative_cost == point.cost / front.full.cost for point in front.scored)
    # The user's model is as it was.
    assert lengths_of(model) is None and model.config.length_config is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_metric_is_that_of_the_model_with_these_lengths():
    """Sorting by length and batching changes nothing: each row by itself says the same."""
    model, data = classifier(), reviews()
    front = search(model, data, trials=6)
    tokenizer = word_tokenizer()
    for point in front.scored:
        right = 0
        with using_lengths(model, point.lengths), torch.no_grad():
            for text, label in zip(data["train"]["text"], data["train"]["label"]):
                inputs = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
                right += int(model(**inputs).logits.argmax()) == NAMES["label2id"][label]
        assert point.metric == pytest.approx(right / 24)
    assert len({point.metric for point in front.scored}) > 1


def test_bfloat16_changes_the_scores_and_nothing_else():
    fine, coarse = search(metric="loss"), search(metric="loss", bf16=True)
    assert [point.cost for point in coarse.scored] == [point.cost for point in fine.scored]
    pairs = [(point.metric, other.metric) for point, other in zip(coarse.scored, fine.scored, strict=True)]
    assert all(one == pytest.approx(other, rel=0.02) for one, other in pairs)
    assert any(one != pytest.approx(other, rel=1e-5) for one, other in pairs)


def test_a_second_call_scores_nothing_again(tmp_path, monkeypatch):
    calls = []
    original = length_scoring.LengthScorer.__call__

    def counted(self, candidate):
        calls.append(candidate)
        return original(self, candidate)

    monkeypatch.setattr(length_scoring.LengthScorer, "__call__", counted)
    lines = []
    first = search(output=tmp_path / "front", say=lines.append)
    assert len(calls) == 4 and not any("before" in line for line in lines)
    second = search(output=tmp_path / "front", say=lines.append)
    assert len(calls) == 4 and second == first
    assert "4 configurations were scored before: going on from there" in lines
    more = search(output=tmp_path / "front", trials=6)
    assert len(calls) == 6 == len(set(calls)) == len(more.scored)
    # Other examples, lengths or weights are another search, in the same database too.
    others = [
        {"samples": 12},
        {"max_length": 12},
        {"metric": "f1"},
        {"model": classifier(seed=1)},
        {"unit": "fractions"},
        {"bf16": True},
    ]
    for count, change in enumerate(others, start=1):
        search(output=tmp_path / "front", trials=1, **change)
        assert len(calls) == 6 + count, change


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    whole = search(trials=6)
    original, calls = length_scoring.LengthScorer.__call__, []

    def stopped(self, candidate):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(candidate)
        return original(self, candidate)

    monkeypatch.setattr(length_scoring.LengthScorer, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(output=tmp_path / "front", trials=6)
    monkeypatch.setattr(length_scoring.LengthScorer, "__call__", original)
    resumed = search(output=tmp_path / "front", trials=6)
    assert [(point.candidate, point.metric) for point in resumed.scored] == [
        (point.candidate, point.metric) for point in whole.scored
    ]


def test_picks_and_saves(tmp_path, folder):
    source = folder(LengthAdaptiveConfig(unit="fractions", max_length=16))
    front = search_lengths(
        source, reviews(), output=tmp_path / "front", max_cost="90%", save_pick=tmp_path / "picked", **FEW
    )
    assert front.picked.relative_cost <= 0.9
    assert Front.load(tmp_path / "front").picked == front.picked
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "picked")
    assert lengths_of(loaded) == front.picked.lengths and lengths_of(loaded).unit == "fractions"
    inputs = word_tokenizer()(sentences(3), return_tensors="pt", padding=True)
    model = AutoModelForSequenceClassification.from_pretrained(source, length_config=front.picked.candidate)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    files = {file.name for file in (tmp_path / "picked").iterdir()}
    assert {"flexcompress_config.json", "tokenizer.json", "README.md", "model.safetensors"} <= files


def test_a_front_is_written_where_nothing_can_be_picked(tmp_path):
    with pytest.raises(FlexCompressError, match=r"as cheap as asked: the cheapest, \[\d+, \d+, \d+\], costs"):
        search(output=tmp_path / "front", max_cost=0.01, save_pick=tmp_path / "picked")
    front = Front.load(tmp_path / "front")
    assert len(front.scored) == 4 and front.picked is None
    assert not (tmp_path / "picked").exists()


@pytest.mark.parametrize(
    ("config", "unit", "length", "warned"),
    [
        (LengthAdaptiveConfig(unit="fractions", max_length=12), "fractions", 12, False),
        (LengthAdaptiveConfig(), "counts", 64, False),
        (LengthAdaptiveConfig(lengths=[10, 8, 6]), "counts", 64, True),
        (MiniLMConfig(), "counts", 64, True),
        (None, "counts", 64, True),
    ],
)
def test_unit_and_length_are_those_of_training(folder, caplog, config, unit, length, warned):
    with caplog.at_level(logging.WARNING):
        front = search_lengths(folder(config), reviews(), **{**FEW, "max_length": None, "trials": 1})
    assert (front.full.lengths.unit, front.max_length) == (unit, length)
    assert ("was not trained to drop tokens" in caplog.text) == warned


def test_a_model_in_memory_that_was_not_trained_for_it(caplog):
    with caplog.at_level(logging.WARNING):
        front = search(build("bert", "BertForSequenceClassification", **NAMES), trials=2)
    assert "train it with LengthAdaptiveConfig first" in caplog.text and len(front.scored) == 2


def test_lengths_that_the_model_has_are_put_aside():
    model = set_lengths(classifier(), [5, 4, 3])
    with_lengths, without = search(model, trials=2), search(trials=2)
    assert [(p.candidate, p.metric) for p in with_lengths.scored] == [(p.candidate, p.metric) for p in without.scored]
    assert lengths_of(model) == LengthConfig((5, 4, 3))


TEXTS = sentences(8)
TASKS = {
    "roberta": ("roberta", "RobertaForSequenceClassification", reviews, NAMES, "accuracy"),
    "distilbert": ("distilbert", "DistilBertForSequenceClassification", reviews, NAMES, "accuracy"),
    "tokens": (
        "bert",
        "BertForTokenClassification",
        lambda: splits(
            train={
                "tokens": [text.split() for text in TEXTS],
                "tags": [[("a", "b", "c")[len(word) % 3] for word in text.split()] for text in TEXTS],
            }
        ),
        NAMES,
        "f1",
    ),
    "questions": (
        "bert",
        "BertForQuestionAnswering",
        lambda: splits(
            train={
                "question": ["where is anna"] * 8,
                "context": [f"{text} " * 5 for text in TEXTS],
                "answers": [{"text": [text.split()[0]], "answer_start": [0]} for text in TEXTS],
            }
        ),
        {},
        "f1",
    ),
    "vectors": ("bert", "BertModel", lambda: splits(train={"text": TEXTS}), {}, "similarity"),
    "masked words": ("bert", "BertForMaskedLM", lambda: splits(train={"text": TEXTS * 4}), {}, "perplexity"),
    "t5": (
        "t5",
        "T5ForConditionalGeneration",
        lambda: splits(train={"source": TEXTS, "target": [text.split()[0] for text in TEXTS]}),
        {},
        "chrf",
    ),
    "bart": (
        "bart",
        "BartForConditionalGeneration",
        lambda: splits(train={"source": TEXTS, "target": [text.split()[0] for text in TEXTS]}),
        {},
        "chrf",
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_with_an_encoder(name):
    family, class_name, data, names, metric = TASKS[name]
    model = build(family, class_name, **names)
    length = 56 if name == "questions" else 16
    front = search(model, data(), trials=3, max_length=length, new_tokens=4)
    assert front.metric == metric and front.greater_is_better == (metric != "perplexity")
    assert len(front.scored) == 3 and front.max_length == length
    assert front.scored[0].relative_cost < 0.95 and front.full.relative_cost == 1
    if name == "vectors":
        assert front.full.metric == pytest.approx(1) and front.scored[0].metric < 1


def test_images(tmp_path):
    from PIL import Image
    from transformers import ViTImageProcessor

    for name in ("a", "b", "c"):
        for number in range(2):
            file = tmp_path / "data" / "train" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((16, 16), 50 + 40 * number).convert("RGB").save(file)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    model = build("vit", "ViTForImageClassification", **NAMES)
    front = search(model, tmp_path / "data", processor=processor, trials=3)
    assert front.max_length == 5 and len(front.scored) == 3


@pytest.mark.parametrize("name", ["t5", "tokens", "questions"])
def test_the_loss_can_be_the_metric(name):
    family, class_name, data, names, _ = TASKS[name]
    model = build(family, class_name, **names)
    front = search(model, data(), trials=3, max_length=56, new_tokens=4, metric="loss", batch_size=3)
    assert front.metric == "loss" and not front.greater_is_better
    if name != "questions":  # whose stock loss also runs over the padding of a batch
        other = search(model, data(), trials=3, max_length=56, new_tokens=4, metric="loss", batch_size=8)
        assert [p.metric for p in front.scored] == pytest.approx([p.metric for p in other.scored], rel=1e-5)
    assert front.points == sorted(front.points, key=lambda point: -point.metric)


def test_latency_is_measured_in_turn_with_the_full_model():
    # Long enough for the difference to show, also on a busy machine.
    model = wide("bert", layers=4, hidden=128)
    model.config.label2id, model.config.id2label = NAMES["label2id"], NAMES["id2label"]
    write_lengths(model, None)
    front = search(model, trials=3, max_length=32, objective="latency", latency_batch_size=32, unit="counts")
    assert front.full.relative_cost == 1 and front.full.cost == front.full.details["milliseconds"] > 0
    least = front.scored[0]
    assert least.cost == pytest.approx(least.relative_cost * front.full.cost)
    assert {"milliseconds", "full_milliseconds", "macs"} <= least.details.keys()
    cheapest = min(front.scored, key=lambda point: point.details["macs"])
    assert cheapest.relative_cost < 0.97
    assert front.pick(max_latency=front.full.cost * 2) is not None


@pytest.mark.parametrize("runtime", ["ort", "ort-int8"])
def test_onnx_runtime(runtime):
    data = splits(validation={"text": sentences(9), "label": ["a", "b", "c"] * 3})
    front = search(data=data, trials=2, population=2, runtime=runtime, objective="latency", latency_batch_size=2)
    assert front.runtime == runtime and len(front.scored) == 2
    assert all(point.details["milliseconds"] > 0 and 0 <= point.metric <= 1 for point in front.scored)
    torch_front = search(data=data, trials=2, population=2)
    if runtime == "ort":
        assert {p.lengths: p.metric for p in front.scored} == {p.lengths: p.metric for p in torch_front.scored}


def test_what_it_scores_on():
    lines = []

    def where(data, **options):
        lines.clear()
        search(data=data, trials=1, say=lines.append, **options)
        return lines[0]

    both = reviews(24, validation={"text": sentences(6), "label": ["a", "b", "c"] * 2})
    assert "on all 6 examples of validation" in where(both)
    assert "on 10 of the 24 examples of train, drawn with seed 42" in where(both, split="train", samples=10)
    assert "on 10 of the 24 examples of train" in where(reviews(), samples=10)
    test = splits(test={"text": sentences(6), "label": ["a", "b", "c"] * 2})
    with pytest.raises(FlexCompressError, match=r"no split but test, .* say split=\"test\" \(--split\)"):
        search(data=test)
    assert "all 6 examples of test" in where(test, split="test")


def test_hold_out_parts_as_the_search_does():
    from optimum_flexcompress.data import take

    data = reviews(24)["train"]
    rest, held = hold_out(data, 10)
    assert list(held["text"]) == list(take(data, 10)["text"]) and len(rest) == 14
    assert sorted([*rest["text"], *held["text"]]) == sorted(data["text"])
    for samples in (0, 24, 30):
        with pytest.raises(FlexCompressError, match="cannot be held out of 24"):
            hold_out(data, samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "speed"}, r"objective \(--objective\) is 'speed'\. Known: latency, macs"),
        ({"objective": "latancy"}, r"Did you mean \"latency\""),
        ({"runtime": "onnx"}, r"runtime \(--runtime\) is 'onnx'.* Known: ort, ort-int8, pytorch"),
        ({"unit": "count"}, r"unit \(--unit\) is 'count'. Did you mean \"counts\""),
        (
            {"max_latency": 3},
            r"search with objective latency \(--objective latency\), or give max_cost \(--max-cost\)",
        ),
        ({"max_drop": "much"}, r"max_drop is 'much'"),
        ({"save_pick": "picked"}, r"save_pick needs something to pick by: give max_drop \(--max-drop\)"),
        ({"samples": 0}, r"score on at least 1 example"),
        ({"split": "dev"}, r"no split 'dev'"),
        ({"metric": "rouge"}, r"no metric 'rouge' on these examples; there are accuracy"),
        ({"metric": "loss", "runtime": "ort"}, r"computed in PyTorch only: .* --runtime pytorch"),
        ({"bf16": True, "runtime": "ort"}, r"bf16 \(--bf16\) is for the runtime pytorch, not ort: leave one"),
        ({"trials": 0}, r"trials \(--trials\) is 0"),
        ({"batch_size": 0}, r"batch_size \(--batch-size\) is 0: give a whole number of at least 1"),
        ({"latency_batch_size": 0}, r"latency_batch_size \(--latency-batch-size\) is 0"),
        ({"new_tokens": -1}, r"new_tokens \(--new-tokens\) is -1"),
        ({"storage": "sqlite:////no/where/at.db"}, r"cannot be opened"),
        ({"processor": None}, r"in memory needs processor="),
        ({"columns": {"text": "txt"}}, r"no column 'txt'"),
        ({"threads": 0}, r"threads must be at least 1"),
    ],
)
def test_one_sentence_for_what_is_wrong(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FlexCompressError, match=message) as caught:
        search(output="front", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "front" / "front.json").exists() and not (tmp_path / "picked").exists()


def test_a_model_whose_outputs_are_no_numbers():
    model = classifier()
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    with pytest.raises(FlexCompressError, match=r"The loss of \[16, 16, 16\] is nan: look at the model"):
        search(model, metric="loss")


def test_models_that_cannot_be_searched(tmp_path):
    with pytest.raises(FlexCompressError, match="is a decoder, which cannot drop tokens"):
        search(build("gpt2", "GPT2ForSequenceClassification", **NAMES))
    with pytest.raises(FlexCompressError, match="There is no folder"):
        search("./nothing-here", task="text-classification")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FlexCompressError, match="is not empty and holds no earlier search"):
        search(output=tmp_path / "other")


def test_a_missing_extra_says_how_to_get_it(monkeypatch):
    import importlib
    import sys

    # Importing it anew puts another module into the package, which must not outlive this test.
    monkeypatch.setattr(optimum_flexcompress, "search", optimum_flexcompress.search)
    for name in [name for name in sys.modules if name.startswith("optimum_flexcompress.search")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(FlexCompressError, match=r"pip install optimum-flexcompress\[search\]"):
        importlib.import_module("optimum_flexcompress.search.length_search")
