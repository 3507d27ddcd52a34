"""The report: JSON there and back, the table, the page."""

from __future__ import annotations

import builtins
import importlib
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from optimum_flexcompress.errors import FlexCompressError, MissingExtraError
from optimum_flexcompress.evaluation import Report, environment_info
from optimum_flexcompress.evaluation.formatting import (
    counted,
    format_bytes,
    format_change,
    format_count,
    format_metric,
    format_seconds,
    text_table,
)
from optimum_flexcompress.evaluation.report import ModelResult


def timing(median: float, speedup: float) -> dict:
    return {"median": median, "iqr": median / 10, "samples": 5, "calls": 2, "threads": 1, "throughput": 1 / median,
            "speedup": speedup, "seconds": [median] * 5}  # fmt: skip


def model(name: str, factor: float, **more) -> ModelResult:
    values = {
        "name": name,
        "path": f"models/{name}",
        "backend": "pytorch",
        "precision": "fp32",
        "parameters": int(22_713_216 / factor),
        "size": int(90_900_000 / factor),
        "macs": {"128": int(1.43e9 / factor)},
        "metrics": {"accuracy": 0.9253 - 0.01 * (factor - 1), "f1": 0.92},
        "latency": {"1x128": timing(0.02 / factor, factor), "32x128": timing(0.5 / factor, factor)},
        "stream": {**timing(0.006 / factor, factor), "p95": 0.01, "rows": 20, "mean_length": 14.0},
        "memory": {"peak": 600_000_000, "imports": 500_000_000, "model": int(100_000_000 / factor)},
    }
    return ModelResult(**{**values, **more})


@pytest.fixture
def report() -> Report:
    changes = [
        {"name": "a <b>", "count": 40, "baseline": 0.9, "candidate": 0.8, "change": -0.1},
        {"name": "c", "count": 40, "baseline": 0.9, "candidate": 0.95, "change": 0.05},
        {"name": "unchanged", "count": 40, "baseline": 0.9, "candidate": 0.9, "change": 0.0},
    ]
    comparison = {"agreement": 0.97, "flipped": 0.03, "fixed": 0.01, "broken": 0.02, "per_class": changes}
    return Report(
        task="text-classification",
        dataset="bank <77>",
        split="test",
        rows=3080,
        metric="accuracy",
        unit="share",
        greater_is_better=True,
        baseline="teacher",
        models=[model("teacher", 1.0), model("student", 2.0, change=-0.01, comparison=comparison)],
        environment=environment_info(),
        settings={"batch_sizes": [1, 32], "max_samples": "all"},
        created="2025-01-01T00:00:00+00:00",
    )


def test_json_there_and_back(report, tmp_path):
    report.save(tmp_path)
    assert Report.load(tmp_path) == Report.load(tmp_path / "report.json") == report
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["environment"]["flags"] == report.environment["flags"]
    assert content["environment"]["versions"]["torch"] and content["models"][1]["latency"]["1x128"]["threads"] == 1
    assert report["student"].change == -0.01


def test_reports_that_cannot_be_read(tmp_path, report):
    with pytest.raises(FlexCompressError, match="no report"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(FlexCompressError, match="not valid JSON"):
        Report.load(tmp_path)
    with pytest.raises(FlexCompressError, match="lacks task"):
        Report.from_dict({"version": 1})
    with pytest.raises(FlexCompressError, match="newer version"):
        Report.from_dict({**report.to_dict(), "version": 99})


def test_the_table_says_what_was_measured(report):
    table = str(report)
    lines = [line for line in table.splitlines() if line.startswith("student")]
    assert lines[0].split() == [
        "student",
        "pytorch",
        "fp32",
        "91.53",
        "%",
        "-1.00",
        "pt",
        "97.0",
        "%",
        "11.4",
        "M",
        "45.5",
        "MB",
        "715",
        "M",
        "50.0",
        "MB",
    ]
    assert lines[1].split() == ["student", "10.0", "ms", "2.00x", "250", "ms", "2.00x", "3.00", "ms", "2.00x"]
    assert "3080 rows" in table and report.environment["cpu"] in table


def test_faster_than_another_model_in_the_same_rounds():
    whole, small = (model(name, 1.0) for name in ("whole", "small"))
    # A machine that slowed down for a while slowed both down: by the medians alone it would be 1.8 times.
    whole.latency["1x128"]["seconds"] = [0.02, 0.02, 0.09, 0.08, 0.02]
    small.latency["1x128"].update(seconds=[0.011, 0.01, 0.03, 0.04, 0.01], median=0.011)
    del small.latency["32x128"]
    assert small.faster_than(whole) == {"1x128": pytest.approx(2.0)}
    assert whole.faster_than(small) == {"1x128": pytest.approx(0.5)}


class Page(HTMLParser):
    """Collects what a page would fetch, and its text; checks that elements are closed in order."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.text, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data") and not value.startswith(("#", "data:")):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_fetches_nothing(report):
    html = report.to_html()
    page = Page(html)
    assert page.fetched == []
    assert not re.search(r"@import|url\((?!#)|<script|<link", html)
    text = " ".join(page.text)
    for words in ("91.53 %", "-1.00 pt", "2.0×", "3.0 %", "bank <77>", "a <b>", report.environment["cpu"], "student"):
        assert words in text, words
    # Two shapes and the stream against accuracy, latency, size, and one model's classes.
    assert html.count("<svg") == 6
    assert "prefers-color-scheme: dark" in html and "#010203" not in html and html.count("currentColor") > 50


def test_a_report_without_timing_or_classes_still_has_a_page(report):
    for result in report.models:
        result.latency, result.stream, result.memory, result.comparison = {}, None, None, {}
    report.unit, report.greater_is_better = "", False
    html = report.to_html()
    Page(html)
    assert html.count("<svg") == 1
    assert "Time for one batch" not in str(report)


def test_missing_packages_name_their_extra(report, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("matplotlib", "jinja2"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for module in ("page", "plots"):
        monkeypatch.delitem(sys.modules, f"optimum_flexcompress.evaluation.{module}", raising=False)
    monkeypatch.delattr(importlib.import_module("optimum_flexcompress.evaluation"), "page", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"optimum-flexcompress\[report\]"):
        report.save(tmp_path)
    assert not list(tmp_path.iterdir())
    report.save(tmp_path, html=False)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_metric(0.92532, "share"), "92.53 %"),
        (format_metric(81.234, "percent"), "81.23 %"),
        (format_metric(12.3456, ""), "12.35"),
        (format_metric(None, ""), "–"),
        (format_change(-0.0052, "share"), "-0.52 pt"),
        (format_change(0.5, "percent"), "+0.50 pt"),
        (format_change(1.5, ""), "+1.5"),
        (format_count(999), "999"),
        (format_count(1000), "1.00 k"),
        (format_count(22_713_216), "22.7 M"),
        (format_count(0), "0"),
        (counted(1, "thread"), "1 thread"),
        (counted(0, "thread"), "0 threads"),
        (counted(1, "layer drops tokens", "layers drop tokens"), "1 layer drops tokens"),
        (counted(2, "layer drops tokens", "layers drop tokens"), "2 layers drop tokens"),
        (format_bytes(90_868_592), "90.9 MB"),
        (format_seconds(0.0000125), "12.5 µs"),
        (format_seconds(0.01234), "12.3 ms"),
        (format_seconds(0.1234), "123 ms"),
        (format_seconds(2.5), "2.5 s"),
        (format_seconds(250.4), "250 s"),
    ],
)
def test_numbers_as_people_read_them(shown, expected):
    assert shown == expected


def test_table_columns_line_up():
    table = text_table(["name", "x"], [["a", "1"], ["long name", "22"]])
    assert table == "name        x\n---------  --\na           1\nlong name  22"
