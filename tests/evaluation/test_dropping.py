"""Models that drop tokens in a benchmark."""

from __future__ import annotations

import json
import shutil

import pytest

from optimum_flexcompress import LengthConfig, set_lengths
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import Report, TokenTrace, open_artifact, run_benchmark
from optimum_flexcompress.evaluation.dropping import choose_text, explain_words
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.token_dropping.model import write_lengths
from tests.evaluation.conftest import save
from tests.evaluation.test_benchmark import QUICK, question_data
from tests.evaluation.test_report import Page
from tests.tasks.toys import word_tokenizer
from tests.tiny import build


LENGTHS = [0.8, 0.5, 0.3]
# Where the times do not matter.
FAST = {**QUICK, "batch_sizes": (1,), "max_seconds": 0.02, "stream_rows": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, named):
    """`dense`, `adapted` (full lengths), `short`, and as a graph `onnx` and `short-onnx`, whose config has lengths."""
    root = tmp_path_factory.mktemp("dropping")
    model = build("bert", "BertForSequenceClassification", **named)

    def keep(name):
        model.save_pretrained(root / name)
        word_tokenizer().save_pretrained(root / name)

    keep("dense")
    export_onnx(root / "dense", root / "onnx", task="text-classification", validate=False)
    write_lengths(model, None)
    keep("adapted")
    set_lengths(model, LENGTHS)
    keep("short")
    set_lengths(model, [0.9, 0.9, 0.9])
    keep("other")
    shutil.copytree(root / "onnx", root / "short-onnx")
    file = root / "short-onnx" / "config.json"
    entry = {"length_config": LengthConfig.parse(LENGTHS).to_dict()}
    file.write_text(json.dumps({**json.loads(file.read_text()), **entry}))
    return root


def test_what_dropping_gains(folders, rows, tmp_path):
    names = ("dense", "adapted", "onnx", "short", "short-onnx")
    report = run_benchmark([folders / name for name in names], data=rows, output=tmp_path / "report", **QUICK)
    assert Report.load(tmp_path / "report") == report
    short = report["short"]
    assert report["dense"].lengths is report["adapted"].lengths is report["onnx"].lengths is None
    assert short.lengths["config"] == LengthConfig.parse(LENGTHS).to_dict()
    assert short.lengths["kept"] == {"input": 8, "layers": [7, 4, 3]}
    # Every text of the split, with [CLS] and [SEP].
    sizes = [len(text.split()) + 2 for text in rows["test"]["text"]]
    config = LengthConfig.parse(LENGTHS)
    means = [sum(config.at(size)[layer] for size in sizes) / len(sizes) for layer in range(3)]
    assert short.lengths["real"]["input"] == pytest.approx(sum(sizes) / len(sizes))
    assert short.lengths["real"]["layers"] == pytest.approx(means)
    # A graph is counted with the lengths that its configuration names.
    assert report["short-onnx"].lengths == short.lengths
    assert report["short-onnx"].macs == short.macs and short.macs["8"] < report["onnx"].macs["8"]

    header, gains = report.length_rows()
    assert header == ["model", "instead of", "accuracy", "MACs", "1x8 faster", "2x8 faster", "real lengths faster"]
    assert [row[:2] for row in gains] == [["short", "adapted"], ["short-onnx", "onnx"]]
    assert gains[0][3] == f"{100 * short.macs['8'] / report['dense'].macs['8']:.1f} %"
    assert "What dropping tokens gains" in str(report)


def test_words_of_the_page(folders, rows, tmp_path):
    names = ("adapted", "short", "short-onnx")
    report = run_benchmark(
        [folders / name for name in names],
        data=rows,
        sentence="the film was not very good",
        output=tmp_path / "report",
        **FAST,
    )
    assert report["adapted"].words is None
    own, graph = (TokenTrace.from_dict(report[name].words) for name in ("short", "short-onnx"))
    assert [word.text for word in own.words][1:-1] == ["the", "film", "was", "not", "very", "good"]
    assert own.counts == LengthConfig.parse(LENGTHS).at(8) and own.traced_in is None
    # Of the two PyTorch models that could tell for the graph, one has its lengths.
    assert graph.traced_in == "short" and graph.words == own.words


def test_a_graph_is_traced_in_the_model_that_was_trained_for_dropping(folders, rows, tmp_path):
    report = run_benchmark(
        [folders / name for name in ("dense", "adapted", "short-onnx")], data=rows, output=tmp_path / "report", **FAST
    )
    trace = TokenTrace.from_dict(report["short-onnx"].words)
    assert trace.traced_in == "adapted" and "as the PyTorch model adapted keeps them" in trace.describe()
    # The longest text of the data set: none has more than 48 tokens.
    assert trace.tokens == 11 and trace.counts == LengthConfig.parse(LENGTHS).at(11)
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert Page(html).fetched == [] and html.count('<figure class="words">') == 1
    assert "Which words survive to which layer" in html
    pictures = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert pictures == ["tokens-kept.png", "words-short-onnx.png"]


def test_a_graph_is_traced_in_what_it_was_made_from_where_that_is_not_measured(folders, rows):
    artifacts = {name: open_artifact(folders / name, "text-classification") for name in ("dense", "short-onnx")}
    originals = {"short-onnx": folders / "adapted"}
    found = explain_words(artifacts, rows["test"], {"text": "text"}, "a very good film", None, originals)
    assert list(found) == ["short-onnx"]
    trace = TokenTrace.from_dict(found["short-onnx"])
    assert trace.traced_in == "adapted" and trace.counts == LengthConfig.parse(LENGTHS).at(6)


@pytest.mark.parametrize(
    ("others", "message"),
    [(["dense"], "no PyTorch model here could tell"), (["adapted", "other"], "2 PyTorch models here")],
)
def test_words_that_nobody_can_tell(folders, rows, tmp_path, others, message):
    report = run_benchmark(
        [folders / name for name in ("onnx", *others, "short-onnx")], data=rows, output=tmp_path / "report", **FAST
    )
    assert message in report["short-onnx"].words["note"]
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    Page(html)
    assert message in html and not (tmp_path / "report" / "words-short-onnx.png").exists()


def test_without_dropping_the_page_says_nothing_of_tokens(folders, rows, tmp_path):
    report = run_benchmark([folders / "dense"], data=rows, output=tmp_path / "report", **FAST)
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert report.length_rows()[1] == [] and "<h2>Tokens</h2>" not in html
    assert not list((tmp_path / "report").glob("*.png"))


def test_questions_with_their_passage(tmp_path):
    save(tmp_path / "adapted", "bert", "BertForQuestionAnswering")
    model = set_lengths(build("bert", "BertForQuestionAnswering"), [0.9, 0.7, 0.4])
    model.save_pretrained(tmp_path / "short")
    word_tokenizer().save_pretrained(tmp_path / "short")
    report = run_benchmark([tmp_path / "adapted", tmp_path / "short"], data=question_data(), **FAST)
    text = " ".join(word.text for word in TokenTrace.from_dict(report["short"].words).words)
    assert text == "[CLS] where is anna [SEP] anna moved to paris . the film was good [SEP]"


def test_images_have_bars_but_no_words(tmp_path):
    import numpy as np
    from datasets import Dataset, DatasetDict
    from transformers import ViTImageProcessor

    model = set_lengths(build("vit", "ViTForImageClassification"), [0.8, 0.6, 0.4])
    model.save_pretrained(tmp_path / "short")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "short")
    pixels = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    from PIL import Image

    data = DatasetDict(
        {"test": Dataset.from_dict({"image": [Image.fromarray(p) for p in pixels], "label": [0, 1, 2, 0]})}
    )
    report = run_benchmark([tmp_path / "short"], data=data, output=tmp_path / "report", **FAST)
    lengths = report["short"].lengths
    assert lengths["kept"] == {"input": 5, "layers": [4, 3, 2]} and "real" not in lengths
    assert report["short"].words is None


def test_the_text_that_is_looked_at():
    tokenizer = word_tokenizer()
    task = get_task("text-classification")
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["good " * n for n in (60, 3, 40, 46, 47, 100)], "label": ["a"] * 6})
    columns = task.find_columns({"test": rows}, None)
    # With [CLS] and [SEP] 46 words are 48 tokens.
    assert choose_text(tokenizer, rows, columns, 64) == ("good " * 46,)
    assert choose_text(tokenizer, rows.select([0, 5]), columns, 512) == ("good " * 60,)
    assert choose_text(tokenizer, rows, {"image": "image"}, 64) is None


def test_three_texts_are_no_pair(folders, rows, tmp_path):
    with pytest.raises(FlexCompressError, match="sentence is 3 texts"):
        run_benchmark([folders / "dense"], data=rows, sentence=["a", "b", "c"], output=tmp_path / "report", **FAST)
    assert not (tmp_path / "report").exists()
