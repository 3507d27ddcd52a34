"""The result of a search: what each scored configuration is worth and costs, and which of them to choose from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FlexCompressError
from ..evaluation.formatting import MISSING, format_change, format_count, format_metric, format_seconds, text_table
from ..output import write_text_atomically
from ..token_dropping import LengthConfig


FORMAT = 1
FRONT_FILE = "front.json"


@dataclass(frozen=True)
class Point:
    """One scored configuration.

    Attributes:
        candidate: The configuration in plain JSON types; of a search of lengths what [`LengthConfig.to_dict`] makes.
        metric: What it scored on the held-out examples.
        cost: Multiply-accumulates of one input, or milliseconds of one batch.
        relative_cost: The cost over that of the full model.
        details: What else is known of it, such as the timings as they were measured.
    """

    candidate: dict[str, Any]
    metric: float
    cost: float
    relative_cost: float
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> LengthConfig:
        """The candidate of a search of lengths, ready for `set_lengths`."""
        return LengthConfig.parse(self.candidate)


@dataclass
class Front:
    """The configurations that no other one beats in both metric and cost, and all others that were scored.

    Attributes:
        kind: What was searched; the key of the candidates in the file. `"lengths"` or `"assembly"`.
        objective: What the cost is: `"macs"`, of one input of `max_length` tokens, or `"latency"`.
        metric: Name of the metric.
        greater_is_better: Its direction.
        unit: How to show it, see [`optimum_flexcompress.tasks.base.Prepared`].
        runtime: What ran the candidates: `"pytorch"`, `"ort"` or `"ort-int8"`.
        max_length: Input length of the cost, in tokens.
        full: The model with nothing taken away.
        points: The front, the cheapest first. The full model is in it unless something beats it.
        scored: Every configuration that was scored, the cheapest first.
        environment: Where it was measured, see [`optimum_flexcompress.evaluation.environment_info`].
        options: What the search was asked to do.
        picked: The point that was chosen, if one was.
        asked: What it was chosen by.
    """

    kind: str
    objective: str
    metric: str
    greater_is_better: bool
    unit: str
    runtime: str
    max_length: int
    full: Point
    points: list[Point]
    scored: list[Point]
    environment: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    picked: Point | None = None
    asked: dict[str, float] = field(default_factory=dict)

    def drop(self, point: Point) -> float:
        """How much of the full model's metric a point loses, relative to it; negative where it gains."""
        return relative_loss(point.metric, self.full.metric, self.greater_is_better)

    def pick(
        self,
        max_drop: float | str | None = None,
        *,
        max_cost: float | str | None = None,
        max_latency: float | None = None,
    ) -> Point:
        """Chooses a point that is cheaper than the full model, and remembers the choice.

        Args:
            max_drop: How much of the full model's metric may be lost, relative to it: `0.01` or `"1%"`. The cheapest
                such point is chosen.
            max_cost: What it may cost at most, relative to the full model: `0.5` or `"50%"`.
            max_latency: What it may cost at most in milliseconds, where latency was searched. Without `max_drop`, the
                best point within the cost is chosen.

        Returns:
            The point.

        Raises:
            FlexCompressError: Nothing was asked, or no point of the front will do; the message names the nearest.
        """
        asked = self.check_limits(self.objective, max_drop, max_cost, max_latency)
        if not asked:
            raise FlexCompressError('A pick needs a limit: give max_drop (0.01 or "1%"), max_cost or max_latency.')
        limit = math.inf
        if "max_cost" in asked:
            limit = asked["max_cost"] * self.full.cost
        limit = min(limit, asked.get("max_latency", math.inf))
        # As measured, a configuration may well be slower than the full model.
        smaller = [point for point in self.points if point.cost < self.full.cost]
        cheap = [point for point in smaller if point.cost <= limit * (1 + 1e-9)]
        if "max_drop" in asked:
            # What rounding adds to a drop of exactly the limit does not count.
            good = [point for point in cheap if self.drop(point) <= asked["max_drop"] + 1e-9]
            chosen = min(good, key=lambda point: point.cost, default=None)
        else:
            chosen = min(cheap, key=self.drop, default=None)
        if chosen is None:
            raise FlexCompressError(self._nothing(smaller, cheap, asked))
        self.picked, self.asked = chosen, asked
        return chosen

    @staticmethod
    def check_limits(
        objective: str,
        max_drop: float | str | None = None,
        max_cost: float | str | None = None,
        max_latency: float | None = None,
    ) -> dict[str, float]:
        """The limits of a pick as numbers, those that were given.

        Raises:
            FlexCompressError: One of them is no such number, or does not go with the objective.
        """
        asked = {}
        if max_drop is not None:
            asked["max_drop"] = read_share("max_drop", max_drop, 0.0)
        if max_cost is not None:
            asked["max_cost"] = read_share("max_cost", max_cost, 1e-9)
        if max_latency is not None:
            if objective != "latency":
                raise FlexCompressError(
                    "max_latency needs measured latencies: search with objective latency (--objective latency), or give "
                    "max_cost (--max-cost), a share of the full model's multiply-accumulates."
                )
            if not isinstance(max_latency, int | float) or not 0 < max_latency < math.inf:
                raise FlexCompressError(f"max_latency is {max_latency!r}: give milliseconds, more than 0.")
            asked["max_latency"] = float(max_latency)
        return asked

    def _nothing(self, smaller: list[Point], cheap: list[Point], asked: dict[str, float]) -> str:
        if not smaller:
            return "No configuration beats the full model in anything: search longer, or train the model for it."
        if not cheap:
            least = smaller[0]
            return (
                f"No configuration of the front is as cheap as asked: the cheapest, {self.name(least)}, costs "
                f"{self.show_cost(least)} ({least.relative_cost:.2f} of the full model) and scores "
                f"{format_metric(least.metric, self.unit)}; ask for that, or search longer."
            )
        best = min(cheap, key=self.drop)
        within = " within that cost" if len(cheap) < len(smaller) else ""
        return (
            f"No configuration of the front loses at most {100 * asked['max_drop']:.3g} %{within}: the best, "
            f"{self.name(best)}, loses {100 * self.drop(best):.3g} % at {best.relative_cost:.2f} of the cost; ask for "
            "a larger drop, search longer, or train the model longer for it."
        )

    def name(self, point: Point) -> str:
        """A configuration in a few words: the `name` in its details, the lengths, or the candidate as it is."""
        if "name" in point.details:
            return point.details["name"]
        if self.kind != "lengths":
            return json.dumps(point.candidate)
        lengths = point.lengths
        return str(list(lengths.values if lengths.max_length is None else lengths.in_counts().values))

    def show_cost(self, point: Point) -> str:
        """The cost with its unit."""
        return format_seconds(point.cost / 1e3) if self.objective == "latency" else format_count(point.cost) + " MACs"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        pick = None
        if self.picked is not None:
            pick = {**self._point_dict(self.picked), "asked": self.asked}
        return {
            "format": FORMAT,
            "kind": self.kind,
            "objective": self.objective,
            "metric": self.metric,
            "greater_is_better": self.greater_is_better,
            "unit": self.unit,
            "runtime": self.runtime,
            "max_length": self.max_length,
            "full": self._point_dict(self.full),
            "pick": pick,
            "points": [self._point_dict(point) for point in self.points],
            "evaluated": len(self.scored),
            "scored": [self._point_dict(point) for point in self.scored],
            "options": self.options,
            "environment": self.environment,
        }

    def _point_dict(self, point: Point) -> dict[str, Any]:
        return {
            self.kind: point.candidate,
            "metric": point.metric,
            "cost": point.cost,
            "relative_cost": point.relative_cost,
            "drop": None if math.isinf(self.drop(point)) else self.drop(point),
            "details": point.details,
        }

    def to_json(self) -> str:
        """The text of `front.json`."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `front.json` into a folder."""
        path = Path(folder) / FRONT_FILE
        write_text_atomically(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Front:
        """Reads a front.

        Args:
            path: The file, or the folder it is in.

        Raises:
            FlexCompressError: There is none, it is damaged, or a newer version wrote it.
        """
        path = Path(path).expanduser()
        path = path / FRONT_FILE if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] > FORMAT:
                raise FlexCompressError(f"{path} was written by a newer optimum-flexcompress: upgrade.")
            kind = data["kind"]

            def point(entry: dict[str, Any]) -> Point:
                return Point(
                    entry[kind], entry["metric"], entry["cost"], entry["relative_cost"], entry.get("details", {})
                )

            pick = data.get("pick")
            names = ("objective", "metric", "greater_is_better", "unit", "runtime", "max_length")
            return cls(
                kind=kind,
                **{name: data[name] for name in names},
                full=point(data["full"]),
                points=[point(entry) for entry in data["points"]],
                scored=[point(entry) for entry in data["scored"]],
                environment=data.get("environment", {}),
                options=data.get("options", {}),
                picked=point(pick) if pick else None,
                asked=pick["asked"] if pick else {},
            )
        except FileNotFoundError as error:
            raise FlexCompressError(f"There is no front {path}: give what `search` wrote.") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, FlexCompressError):
                raise
            raise FlexCompressError(f"{path} is no front of a search, or is damaged: run the search again.") from error

    def __str__(self) -> str:
        """The front as a table, the pick marked."""
        rows = []
        for point in self.points:
            full = point.candidate == self.full.candidate
            rows.append(
                [
                    ("* " if point == self.picked else "  ") + ("full: " if full else "") + self.name(point),
                    format_metric(point.metric, self.unit),
                    MISSING if full else format_change(point.metric - self.full.metric, self.unit),
                    self.show_cost(point),
                    f"{point.relative_cost:.3f}",
                ]
            )
        return text_table(["  " + self.kind, self.metric, "change", "cost", "of full"], rows)


def pareto(
    points: Iterable[Point], greater_is_better: bool, cost: Callable[[Point], float] = lambda point: point.cost
) -> list[Point]:
    """The points that no other one beats: none is as good at a lower cost, or better at the same cost.

    Args:
        points: Any points.
        greater_is_better: Direction of the metric.
        cost: What they cost.

    Returns:
        They, with rising cost and rising quality. Of equal points the first one stays.
    """
    sign = 1 if greater_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (cost(point), -sign * point.metric)):
        if not front or sign * point.metric > sign * front[-1].metric:
            front.append(point)
    return front


def dominated_area(points: Sequence[tuple[float, float]], worst: tuple[float, float]) -> float:
    """Area of the (cost, quality) plane that points beat, up to a worst cost and down to a worst quality."""
    worst_cost, floor = worst
    area = 0.0
    for cost, quality in sorted(points):
        if quality > floor and cost < worst_cost:
            area += (worst_cost - cost) * (quality - floor)
            floor = quality
    return area


def relative_loss(value: float, baseline: float, greater_is_better: bool) -> float:
    """Which share of a baseline's metric is lost; negative where there is a gain."""
    change = baseline - value if greater_is_better else value - baseline
    if change == 0:
        return 0.0
    return change / abs(baseline) if baseline else math.copysign(math.inf, change)


def read_share(name: str, value: float | str, least: float) -> float:
    """`0.01`, `"0.01"` or `"1%"` as a number.

    Raises:
        FlexCompressError: It is none of these, or not between `least` and 1.
    """
    number = value
    if isinstance(value, str):
        text, percent = value.strip().removesuffix("%"), value.strip().endswith("%")
        try:
            number = float(text) / (100 if percent else 1)
        except ValueError:
            number = math.nan
    if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number <= 1:
        raise FlexCompressError(f'{name} is {value!r}: give a share between 0 and 1, such as 0.01 or "1%".')
    return float(number)
