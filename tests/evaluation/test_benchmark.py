"""The whole benchmark, for every kind of task, on toys."""

from __future__ import annotations

import pytest
from datasets import DatasetDict

from optimum_flexcompress.errors import FlexCompressError, MissingExtraError
from optimum_flexcompress.evaluation import Report, open_artifact, run_benchmark
from optimum_flexcompress.evaluation.benchmark import _timed_lengths
from optimum_flexcompress.evaluation.inputs import example_batch
from optimum_flexcompress.evaluation.models import name_models
from optimum_flexcompress.evaluation.workloads import timed_shapes
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.tasks import get_task
from tests.evaluation.conftest import save
from tests.tasks.toys import splits


QUICK = {
    "batch_sizes": (1, 2),
    "lengths": (8,),
    "rounds": 3,
    "max_seconds": 0.5,
    "stream_rows": 4,
    "new_tokens": 3,
    "memory": False,
    "progress": False,
}


def test_classification_with_an_onnx_model(classifiers, rows, tmp_path):
    export_onnx(classifiers / "student", tmp_path / "student-onnx", task="text-classification")
    folders = [classifiers / "student", tmp_path / "student-onnx"]
    report = run_benchmark(folders, classifiers / "teacher", None, rows, tmp_path / "report", **QUICK)
    assert [model.name for model in report.models] == ["teacher", "student", "student-onnx"]
    assert (report.split, report.rows, report.task) == ("test", 21, "text-classification")
    student, exported = report["student"], report["student-onnx"]
    assert student.metrics == exported.metrics and student.change == exported.change
    assert student.change == pytest.approx(student.metrics["accuracy"] - report["teacher"].metrics["accuracy"])
    # The ONNX folder is counted by its configuration, which is that of the same architecture.
    assert (exported.parameters, exported.macs) == (student.parameters, student.macs)
    assert exported.size == (tmp_path / "student-onnx" / "model.onnx").stat().st_size
    assert student.comparison["agreement"] + student.comparison["flipped"] == pytest.approx(1)
    assert {change["name"] for change in student.comparison["per_class"]} == {"a", "b", "c"}
    for result in report.models:
        assert set(result.latency) == {"1x8", "2x8"}
        measured = result.latency["2x8"]
        assert measured["throughput"] == pytest.approx(2 / measured["median"]) and measured["samples"] >= 3
        assert result.stream["rows"] == 4 and result.stream["median"] > 0
    assert report["teacher"].latency["1x8"]["speedup"] == 1.0
    assert Report.load(tmp_path / "report") == report
    assert "<svg" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_memory_of_each_model(classifiers, rows):
    quick = {**QUICK, "memory": True, "batch_sizes": (1,), "stream_rows": 0}
    quick.pop("lengths")
    report = run_benchmark([classifiers / "teacher"], data=rows, max_samples=4, **quick)
    assert report.settings["lengths"] == [64]
    assert report.rows == 4 and report["teacher"].memory["peak"] > report["teacher"].memory["imports"]


def question_data():
    context = "anna moved to paris . the film was good"
    answers = {"text": ["paris"], "answer_start": [14]}
    return splits(
        validation={
            "id": ["1", "2"],
            "question": ["where is anna"] * 2,
            "context": [context] * 2,
            "answers": [answers] * 2,
        }
    )


def tagged_data():
    return splits(test={"tokens": [["anna", "lives", "in", "paris"]] * 3, "tags": [["B", "O", "O", "B"]] * 3})


def pair_data():
    return splits(test={"source": ["the film was good", "bad plot", "anna"], "target": ["good", "bad", "anna"]})


CASES = {
    "question-answering": ("bert", "BertForQuestionAnswering", question_data, "f1"),
    "token-classification": ("bert", "BertForTokenClassification", tagged_data, "f1"),
    "fill-mask": ("bert", "BertForMaskedLM", None, "perplexity"),
    "text-generation": ("gpt2", "GPT2LMHeadModel", None, "perplexity"),
    "text2text-generation": ("t5", "T5ForConditionalGeneration", pair_data, "chrf"),
    "feature-extraction": ("bert", "BertModel", None, "similarity"),
}


@pytest.mark.parametrize("task", sorted(CASES))
def test_every_kind_of_text_model(task, rows, tmp_path):
    family, name, make, metric = CASES[task]
    layers = "num_layers" if family == "t5" else "n_layer" if family == "gpt2" else "num_hidden_layers"
    save(tmp_path / "teacher", family, name)
    save(tmp_path / "copy", family, name)
    save(tmp_path / "small", family, name, seed=1, **{layers: 1})
    data = make() if make else DatasetDict({"test": rows["test"]})
    report = run_benchmark(
        [tmp_path / "copy", tmp_path / "small"], tmp_path / "teacher", data=data, output=tmp_path / "report", **QUICK
    )
    assert Report.load(tmp_path / "report") == report
    assert (report.task, report.metric) == (task, metric)
    copy, small = report["copy"], report["small"]
    assert copy.change == pytest.approx(0) and copy.comparison["agreement"] == pytest.approx(1)
    assert small.macs["8"] < copy.macs["8"] and small.parameters < copy.parameters and small.size < copy.size
    assert set(copy.latency) == ({"1x8+3", "2x8+3"} if "generation" in task else {"1x8", "2x8"})
    if "generation" in task:
        # Generated tokens, not inputs.
        assert copy.latency["2x8+3"]["throughput"] == pytest.approx(6 / copy.latency["2x8+3"]["median"])


@pytest.mark.parametrize("task", ["text-generation", "text2text-generation"])
def test_generating_models_in_onnx_runtime(task, rows, tmp_path):
    family, name, make, metric = CASES[task]
    save(tmp_path / "torch", family, name)
    export_onnx(tmp_path / "torch", tmp_path / "onnx", task=task)
    data = make() if make else DatasetDict({"test": rows["test"]})
    report = run_benchmark([tmp_path / "torch", tmp_path / "onnx"], data=data, **QUICK)
    ours, theirs = report["torch"], report["onnx"]
    assert theirs.backend == "onnxruntime" and theirs.comparison["agreement"] == pytest.approx(1)
    assert theirs.metrics[metric] == pytest.approx(ours.metrics[metric], rel=1e-3)
    assert (theirs.macs, theirs.parameters, set(theirs.latency)) == (ours.macs, ours.parameters, set(ours.latency))


def test_generated_tokens_must_fit_too(tmp_path, rows):
    save(tmp_path / "gpt2", "gpt2", "GPT2LMHeadModel")
    with pytest.raises(FlexCompressError, match="at most 64 tokens: 65 is too long.* give --lengths 61"):
        run_benchmark([tmp_path / "gpt2"], data=rows, **{**QUICK, "lengths": (62,)})
    with pytest.raises(
        FlexCompressError, match="gpt2 takes at most 64 tokens: 65 is too long.* --new-tokens below 64"
    ):
        run_benchmark([tmp_path / "gpt2"], data=rows, **{**QUICK, "lengths": None, "new_tokens": 64})


def test_lengths_are_what_the_models_take(tmp_path, named):
    artifacts = {
        name: open_artifact(save(tmp_path / name, name, f"{kind}ForSequenceClassification", **named, **more))
        for name, kind, more in (("bert", "Bert", {"max_position_embeddings": 512}), ("roberta", "Roberta", {}))
    }
    task = get_task("text-classification")
    # Two of the 64 positions of a RoBERTa are of no token.
    assert _timed_lengths(artifacts, task, None, 3) == [62]
    assert _timed_lengths({"bert": artifacts["bert"]}, task, None, 3) == [128]
    assert _timed_lengths(artifacts, task, [8, 62], 3) == [8, 62]
    with pytest.raises(FlexCompressError, match="roberta takes at most 62 tokens: 63 is .* give --lengths 62"):
        _timed_lengths(artifacts, task, [63], 3)
    artifacts["roberta"].forward(example_batch(artifacts["roberta"].config, task, 1, 62))
    with pytest.raises(FlexCompressError, match="at most 62 tokens"):
        example_batch(artifacts["roberta"].config, task, 1, 63)


def test_images(tmp_path, named):
    from PIL import Image
    from transformers import ViTImageProcessor

    from tests.tiny import build

    build("vit", "ViTForImageClassification", **named).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    data = splits(test={"image": [Image.new("RGB", (9, 9), (60 * i, 0, 0)) for i in range(4)], "label": list("abca")})
    report = run_benchmark([tmp_path / "vit"], data=data, **QUICK)
    assert set(report["vit"].latency) == {"1 image", "2 images"} and set(report["vit"].macs) == {"image"}
    assert report["vit"].stream is None


def test_class_names_of_a_model_without_them_come_from_the_training_split(tmp_path, rows):
    save(tmp_path / "plain", "bert", "BertForSequenceClassification")
    data = DatasetDict({"train": rows["train"], "test": rows["test"].filter(lambda row: row["label"] != "a")})
    report = run_benchmark({"plain": tmp_path / "plain"}, data=data, **{**QUICK, "stream_rows": 0})
    # Without the training split, "b" would have become class 0.
    assert {change["name"] for change in _changes(report, tmp_path, data)} == {"b", "c"}


def _changes(report, tmp_path, data):
    again = run_benchmark(
        {"plain": tmp_path / "plain", "same": tmp_path / "plain"}, data=data, **{**QUICK, "stream_rows": 0}
    )
    assert again["plain"].metrics == report["plain"].metrics
    return again["same"].comparison["per_class"]


def test_models_name_themselves(tmp_path):
    for folder in ("a/student", "b/student", "teacher"):
        (tmp_path / folder).mkdir(parents=True)
    paths, baseline = name_models([tmp_path / "a/student", tmp_path / "b/student"], tmp_path / "teacher")
    assert list(paths) == ["teacher", "a/student", "b/student"] and baseline == "teacher"
    assert name_models([tmp_path / "teacher"], None)[1] == "teacher"
    assert name_models([tmp_path / "teacher", tmp_path / "a/student"], "student")[1] == "student"
    assert name_models({"x": tmp_path / "teacher"}, tmp_path / "teacher")[1] == "x"
    with pytest.raises(FlexCompressError, match="no baseline 'teachr'.*Did you mean"):
        name_models({"teacher": tmp_path / "teacher"}, "teachr")
    with pytest.raises(FlexCompressError, match="no model to measure"):
        name_models([], None)


def test_shapes():
    assert timed_shapes(get_task("fill-mask"), [1, 4], [8, 16], 5) == [
        ("1x8", 1, 8), ("4x8", 4, 8), ("1x16", 1, 16), ("4x16", 4, 16)
    ]  # fmt: skip
    assert timed_shapes(get_task("text-generation"), [1], [8], 5) == [("1x8+5", 1, 8)]


def test_mistakes_come_before_the_work(classifiers, rows, tmp_path, monkeypatch):
    def run(**more):
        return run_benchmark([classifiers / "student"], classifiers / "teacher", **{"data": rows, **QUICK, **more})

    with pytest.raises(FlexCompressError, match="needs a data set"):
        run(data=None)
    with pytest.raises(FlexCompressError, match="no split 'dev'"):
        run(split="dev")
    with pytest.raises(FlexCompressError, match="batch_sizes must be"):
        run(batch_sizes=[0])
    with pytest.raises(FlexCompressError, match="at least 3"):
        run(rounds=1)
    with pytest.raises(
        FlexCompressError, match="at most 64 tokens: 100 is too long to be measured, give --lengths 64"
    ):
        run(lengths=[8, 100])
    for name, value in (("threads", 0), ("eval_batch_size", 0), ("stream_rows", -1), ("max_seconds", float("nan"))):
        with pytest.raises(FlexCompressError, match=f"{name} must be"):
            run(**{name: value})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(FlexCompressError, match="not empty"):
        run(output=tmp_path / "full")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        run(output=tmp_path / "new")
    assert not (tmp_path / "new").exists() and [f.name for f in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_models_that_cannot_be_compared(classifiers, rows, tmp_path):
    save(tmp_path / "words", "bert", "BertForSequenceClassification", vocab_size=80)
    with pytest.raises(FlexCompressError, match="vocabulary of 80 words"):
        run_benchmark([tmp_path / "words"], classifiers / "teacher", data=rows, **QUICK)
    other = {"id2label": {0: "c", 1: "b", 2: "a"}, "label2id": {"c": 0, "b": 1, "a": 2}}
    save(tmp_path / "order", "bert", "BertForSequenceClassification", **other)
    with pytest.raises(FlexCompressError, match="has other classes"):
        run_benchmark([tmp_path / "order"], classifiers / "teacher", data=rows, **QUICK)
    unlabelled = splits(train={"text": ["good"], "label": ["a"]}, test={"text": ["bad"], "label": [""]})
    with pytest.raises(FlexCompressError, match="No split but train has labels"):
        run_benchmark([classifiers / "teacher"], data=unlabelled, **QUICK)
    with pytest.raises(FlexCompressError, match="No row has a label"):
        run_benchmark([classifiers / "teacher"], data=unlabelled, **{**QUICK, "split": "test"})
    unknown = splits(train={"text": ["good"], "label": ["a"]}, test={"text": ["bad"], "label": ["z"]})
    with pytest.raises(FlexCompressError, match="not a class"):
        run_benchmark([classifiers / "teacher"], data=unknown, **QUICK)
