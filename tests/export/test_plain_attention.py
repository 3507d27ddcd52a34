"""Graphs in the form for OpenVINO compute what PyTorch computes, with standard operators only."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.export.graph import load_model, save_model
from optimum_flexcompress.export.plain_attention import SHARED, plain_graph
from optimum_flexcompress.token_dropping import set_lengths
from optimum_flexcompress.token_dropping.lengths import kept_of, numerator
from tests.export.dropping import clear_case
from tests.export.exported import make, run
from tests.methods.length_adaptive.families import counts_of, fractions_of, valid_only


HEADS = [
    ("bert", "BertForSequenceClassification"),
    ("roberta", "RobertaForTokenClassification"),
    ("distilbert", "DistilBertForQuestionAnswering"),
    ("vit", "ViTForImageClassification"),
]


def plain(model, tmp_path, lengths=None):
    """The file of a model, and what was done to it."""
    export_onnx(model, tmp_path / "onnx", length_config=lengths, validate=False)
    if lengths is not None:
        set_lengths(model, lengths)
    graph, report = plain_graph(load_model(tmp_path / "onnx" / "model.onnx"), model.config)
    save_model(graph, tmp_path / "plain.onnx")
    assert {node.domain for node in graph.graph.node} == {""}
    return tmp_path / "plain.onnx", report, Counter(node.op_type for node in graph.graph.node)


def assert_same(model, file):
    for batch, length in ((1, 9), (4, 17), (2, 5)):
        inputs, expected = clear_case(model, batch, length)
        actual = {key: torch.from_numpy(value) for key, value in run(file, inputs).items()}
        for key, value in valid_only(expected, inputs, "").items():
            torch.testing.assert_close(valid_only(actual, inputs, "")[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["stock", "compressed"])
@pytest.mark.parametrize(("family", "name"), HEADS)
def test_full_lengths(tmp_path, family, name, kind):
    model = make(family, name, kind)
    file, report, kinds = plain(model, tmp_path)
    assert_same(model, file)
    # One layer of the compressed models has no attention.
    assert len(report.attentions) == kinds["Softmax"] == (3 if kind == "stock" else 2)
    assert report.first_token_only == (kind == "stock" and name.endswith("Classification") and "Token" not in name)


@pytest.mark.parametrize("unit", ["counts", "fractions"])
@pytest.mark.parametrize(("family", "name"), HEADS)
def test_tokens_are_dropped_with_maps_that_are_computed_once(tmp_path, family, name, unit):
    model = make(family, name, "stock")
    lengths = {"counts": counts_of, "fractions": fractions_of}[unit](family)
    file, report, kinds = plain(model, tmp_path, lengths)
    assert_same(model, file)
    assert kinds["Softmax"] == 3 and not kinds["GatherND"]
    received = [node for node in load_model(file).graph.node if node.name.endswith(f"{SHARED}.sums")]
    assert len(received) == report.choices == (2 if report.first_token_only else 3)


def test_fractions_need_no_more_than_32_bits():
    tokens = list(range(1, 600)) + [4096, 20000, 60000]
    for fraction in (1.0, 2 / 3, 0.1, 0.37, 0.999, 1 / 7, 1e-3):
        expected = [kept_of(count, numerator(fraction)) for count in tokens]
        assert kept_of(torch.tensor(tokens, dtype=torch.int32), numerator(fraction)).tolist() == expected
