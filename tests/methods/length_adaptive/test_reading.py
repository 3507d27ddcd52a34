"""Length configurations that a user types."""

from __future__ import annotations

import json

import pytest

from optimum_flexcompress import FlexCompressError
from optimum_flexcompress.token_dropping import LengthConfig, read_lengths


COUNTS = LengthConfig((9, 5, 2), "counts", 12)


@pytest.mark.parametrize(
    ("text", "values"),
    [("9,5,2", (9, 5, 2)), ("[9, 5, 2]", (9, 5, 2)), ("9 5 2", (9, 5, 2)), ("1.0,0.5,0.25", (1.0, 0.5, 0.25))],
)
def test_lists(text, values):
    assert read_lengths(text) == LengthConfig(values, "counts" if values[0] == 9 else "fractions")


def test_full():
    assert read_lengths("full") == "full"


@pytest.mark.parametrize(
    "data",
    [
        COUNTS.to_dict(),
        {"model_type": "bert", "length_config": COUNTS.to_dict()},
        {"kind": "lengths", "pick": {"lengths": COUNTS.to_dict(), "metric": 0.9}, "points": []},
    ],
)
def test_files(tmp_path, data):
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps(data))
    assert read_lengths(str(path)) == COUNTS


def test_a_list_in_a_file(tmp_path):
    path = tmp_path / "lengths.json"
    path.write_text("[9, 5, 2]")
    assert read_lengths(str(path)).values == (9, 5, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"pick": null, "points": []}', "without a pick"),
        ('{"model_type": "bert"}', "holds no length configuration"),
        ("{", "is no JSON file"),
        ("[5, 9, 2]", "more than the 5"),
        (None, "cannot be read"),
    ],
)
def test_files_that_do_not_serve(tmp_path, content, message):
    path = tmp_path / "lengths.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(FlexCompressError, match=message):
        read_lengths(str(path))


@pytest.mark.parametrize(
    ("text", "message"), [("9,x", "is no length configuration"), ("9,0", "at least 1"), ("1.5,1", "at most 1")]
)
def test_lists_that_cannot_be(text, message):
    with pytest.raises(FlexCompressError, match=message):
        read_lengths(text)
