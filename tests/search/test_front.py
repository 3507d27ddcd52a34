"""Fronts: what belongs into one, what is picked from one, and their file."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from optimum_flexcompress import FlexCompressError, LengthConfig
from optimum_flexcompress.evaluation.plots import label_points
from optimum_flexcompress.search import Front, Point
from optimum_flexcompress.search.front import dominated_area, pareto
from optimum_flexcompress.search.picture import draw_front


def point(counts, metric, cost) -> Point:
    return Point(LengthConfig(tuple(counts), max_length=100).to_dict(), metric, cost, cost / 100)


def front(greater_is_better=True, objective="macs", sign=1.0) -> Front:
    full = point([100, 100], sign * 0.90, 100)
    points = [
        point([20, 10], sign * 0.70, 15),
        point([50, 25], sign * 0.85, 40),
        point([80, 60], sign * 0.895, 70),
        full,
    ]
    scored = [*points, point([90, 10], sign * 0.6, 55)]
    scored.sort(key=lambda point: point.cost)
    return Front("lengths", objective, "m", greater_is_better, "share", "pytorch", 100, full, points, scored)


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_the_front_is_what_nothing_dominates(greater_is_better):
    rng = np.random.default_rng(0)
    sign = 1 if greater_is_better else -1
    for _ in range(30):
        # Few values, so that there are ties.
        points = [point([2, 2], float(m), float(c)) for m, c in rng.integers(0, 6, (25, 2))]

        def beats(one, other):
            at_least = one.cost <= other.cost and sign * one.metric >= sign * other.metric
            return at_least and (one.cost, one.metric) != (other.cost, other.metric)

        expected = {(p.cost, p.metric) for p in points if not any(beats(other, p) for other in points)}
        found = pareto(points, greater_is_better)
        assert {(p.cost, p.metric) for p in found} == expected
        assert len(found) == len(expected)
        assert [p.cost for p in found] == sorted(p.cost for p in found)


def test_dominated_area():
    assert dominated_area([(1.0, 1.0)], (3.0, 0.0)) == 2.0
    assert dominated_area([(2.0, 3.0), (1.0, 1.0)], (3.0, 0.0)) == 2.0 + 2.0
    assert dominated_area([(1.0, 1.0), (2.0, 0.5), (4.0, 9.0)], (3.0, 0.0)) == 2.0


@pytest.mark.parametrize(
    ("limits", "cost"),
    [
        ({"max_drop": 0.01}, 70),
        ({"max_drop": "1%"}, 70),
        ({"max_drop": "6 %"}, 40),
        ({"max_drop": "0.06"}, 40),
        ({"max_drop": 1}, 15),
        ({"max_cost": 0.5}, 40),
        ({"max_cost": "70%"}, 70),
        ({"max_cost": 1}, 70),
        ({"max_drop": 0.5, "max_cost": 0.5}, 15),
    ],
)
@pytest.mark.parametrize("greater_is_better", [True, False])
def test_picks(limits, cost, greater_is_better):
    chosen = front(greater_is_better, sign=1.0 if greater_is_better else -1.0)
    assert chosen.pick(**limits).cost == cost
    assert chosen.picked.cost == cost
    # The full model is what is compared with, not a choice.
    assert chosen.picked is not chosen.full


def test_picks_by_milliseconds():
    measured = front(objective="latency")
    assert measured.pick(max_latency=69).cost == 40
    assert measured.pick(0.1, max_latency=69).cost == 40
    with pytest.raises(FlexCompressError, match=r"search with objective latency"):
        front().pick(max_latency=69)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_drop": 0.001}, r"loses at most 0.1 %: the best, \[80, 60\], loses 0.556 % at 0.70 of the cost"),
        ({"max_drop": 0.01, "max_cost": 0.5}, r"at most 1 % within that cost: the best, \[50, 25\], loses 5.56 %"),
        ({"max_cost": 0.1}, r"as cheap as asked: the cheapest, \[20, 10\], costs 15 MACs \(0.15 .* scores 70.00 %"),
        ({}, r"A pick needs a limit"),
        ({"max_drop": "one"}, r"max_drop is 'one': give a share between 0 and 1"),
        ({"max_drop": 1.5}, r"max_drop is 1.5"),
        ({"max_drop": -0.1}, r"max_drop is -0.1"),
        ({"max_drop": True}, r"max_drop is True"),
        ({"max_cost": 0}, r"max_cost is 0"),
        ({"max_cost": "nan"}, r"max_cost is 'nan'"),
    ],
)
def test_what_cannot_be_picked(limits, message):
    chosen = front()
    with pytest.raises(FlexCompressError, match=message):
        chosen.pick(**limits)
    assert chosen.picked is None


def test_a_front_of_the_full_model_alone():
    alone = front()
    alone.points = [alone.full]
    with pytest.raises(FlexCompressError, match="No configuration beats the full model"):
        alone.pick(0.5)


def test_a_full_model_that_scores_zero():
    zero = front()
    zero.full = point([100, 100], 0.0, 100)
    zero.points[-1] = zero.full
    assert zero.drop(zero.points[0]) == -np.inf and zero.drop(zero.full) == 0
    json.loads(zero.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_file(tmp_path):
    written = front()
    written.pick(0.01)
    written.environment, written.options = {"cpu": "x"}, {"trials": 4}
    path = written.save(tmp_path)
    for source in (path, tmp_path, str(tmp_path)):
        assert Front.load(source) == written
    data = json.loads(path.read_text())
    assert [entry["cost"] for entry in data["points"]] == [15, 40, 70, 100]
    assert data["evaluated"] == 5 == len(data["scored"])
    assert data["points"][1]["lengths"] == LengthConfig((50, 25), max_length=100).to_dict()
    assert data["pick"]["relative_cost"] == 0.7 and data["pick"]["asked"] == {"max_drop": 0.01}
    assert data["pick"]["drop"] == pytest.approx(0.005 / 0.9)
    assert Front.load(path).picked.lengths == LengthConfig((80, 60), max_length=100)
    text = str(written).splitlines()
    assert "* [80, 60]" in text[4] and "-0.50 pt" in text[4] and "full: [100, 100]" in text[5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no front"),
        ("{", "is no front of a search, or is damaged"),
        ("{}", "is no front of a search, or is damaged"),
        ('{"format": 99}', "newer optimum-flexcompress: upgrade"),
    ],
)
def test_files_that_are_no_front(tmp_path, text, message):
    if text is not None:
        (tmp_path / "front.json").write_text(text)
    with pytest.raises(FlexCompressError, match=message):
        Front.load(tmp_path / "front.json")


def words_in(file) -> list[str]:
    """The texts of a picture."""
    return re.findall(r"<text[^>]*>(.*?)</text>", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_picture_shows_where_one_picks(tmp_path, sign):
    drawn = front(sign > 0, sign=sign)
    drawn.pick("10%")
    words = words_in(draw_front(drawn, tmp_path)[1])
    # 0.85 loses 5.6 %, 0.7 and 0.6 so much that nobody would choose them.
    assert "2 of 5 lie below what is shown" in words
    assert any(word.startswith("loses 5.56 % of the m at 40 %") for word in words)


def test_the_picture_of_models_names_them(tmp_path):
    costs = {"dense": 25.0, "int8": 5.6, "pruned": 2.1, "adapted": 2.15, "distilled": 12.0}
    points = [
        Point({"stage": name}, 0.9 - index / 1000, cost, cost / 25, {"name": name})
        for index, (name, cost) in enumerate(costs.items())
    ]
    drawn = Front(
        "model", "latency", "accuracy", True, "share", "", 64, points[0], pareto(points, True), points, picked=points[2],
        options={"shape": "1x64"},
    )  # fmt: skip
    words = words_in(draw_front(drawn, tmp_path)[1])
    assert set(costs) <= set(words) and "accuracy against the time of one batch (1x64)" in words
    assert "picked: pruned, loses 0.22 %, 11.90 times as fast" in words
    assert any(word.startswith("milliseconds") for word in words)


def test_names_beside_points_cover_nothing():
    axes = Figure(figsize=(7, 4)).subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    points = [(f"model number {index}", 5 + index / 50, 5 + index / 100) for index in range(8)]
    boxes = [label.get_window_extent() for label in label_points(axes, points)]
    centres = [axes.transData.transform(point[1:]) for point in points]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.contains(*centre) for box in boxes for centre in centres)
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
