"""The stages that choose among models: one that keeps a step only if it was worth it, and the choice at the end."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import FlexCompressError, nearest
from .base import Stage, StageContext, model_of, register_stage
from .deployment import Benchmark


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...search.front import Front, Point

CHOICE_FILE = "choice.json"


@dataclass
class KeepSettings:
    """Settings of the stage `keep`.

    Attributes:
        model: The stage (or `input`) whose model is kept if it loses little enough.
        instead: The one that is taken where it is not.
        baseline: The one whose metric the loss is a share of.
        max_drop: What may be lost: 0.01, or "1%".
        samples: How many examples it is measured on, as in the stage `search`.
    """

    model: str
    instead: str
    baseline: str = "finetune"
    max_drop: float | str = 0.01
    samples: int = 1000

    def __post_init__(self):
        from ...search import read_share

        read_share("max_drop", self.max_drop, 0.0)
        if self.samples < 1:
            raise FlexCompressError(f"samples must be at least 1, not {self.samples}.")


@register_stage("keep")
class Keep(Stage):
    """Hands on a model if it loses little on examples that no training has seen, and else the one before it."""

    Settings = KeepSettings
    settings: KeepSettings

    def inputs(self) -> list[str]:
        """See the base class."""
        return list(dict.fromkeys([self.settings.model, self.settings.instead, self.settings.baseline]))

    def made_of(self, folder: Path) -> list[str]:
        """See the base class."""
        return [_read_choice(folder)["chosen"]]

    def held_out(self) -> int:
        """See the base class."""
        return self.settings.samples

    def describe(self) -> str:
        """See the base class."""
        return f"keeping {self.settings.model} if it loses at most {_percent(self.settings.max_drop)}"

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> PreTrainedModel:
        """See the base class."""
        for name in self.inputs():
            model_of(models, name)
        return model_of(models, self.settings.model)

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        from ...search import read_share, relative_loss
        from .lengths import score_held_out

        settings = self.settings
        (before, found), held_out = score_held_out(context, [settings.baseline, settings.model])
        lost = relative_loss(found, before, held_out.greater_is_better)
        chosen = settings.model if lost <= read_share("max_drop", settings.max_drop, 0.0) + 1e-9 else settings.instead
        _copy_model(context, chosen)
        facts = {"chosen": chosen, "lost": None if math.isinf(lost) else lost, held_out.metric: found}
        _write_choice(context.output, facts)
        context.say(
            f"{context.name}: {settings.model} loses {_percent(lost)} of the {held_out.metric} on held-out examples: "
            f"going on from {chosen}"
        )
        return facts


@dataclass
class ChooseSettings:
    """Settings of the stage `choose`.

    Attributes:
        report: The stage `benchmark` whose models are chosen from; its baseline is what they are compared with.
        max_drop: The fastest is chosen that loses at most this share of the baseline's metric: 0.01, or "1%".
        target_latency: Milliseconds that a batch of the first shape of the report may take. Without `max_drop`, the
            best within that is chosen.
        name: Choose this one, whatever it loses or takes.
    """

    report: str = "benchmark"
    max_drop: float | str | None = None
    target_latency: float | None = None
    name: str | None = None

    def __post_init__(self):
        from ...search import read_share

        if self.max_drop is not None:
            read_share("max_drop", self.max_drop, 0.0)
        if self.target_latency is not None and not 0 < self.target_latency < math.inf:
            raise FlexCompressError(f"target_latency must be milliseconds, more than 0, not {self.target_latency}.")
        if self.name is not None and (self.max_drop is not None or self.target_latency is not None):
            raise FlexCompressError("name chooses by itself: leave it out, or max_drop and target_latency.")


@register_stage("choose")
class Choose(Stage):
    """Takes the fastest of the measured models that is good enough.

    The stage's folder holds a copy of that model, and the front of all: `front.json` and pictures. Where no model is
    good enough it holds the one that comes nearest, and its figures say so. Without a limit there is the front alone.
    """

    Settings = ChooseSettings
    settings: ChooseSettings

    @property
    def makes_model(self) -> bool:
        """Whether there is something to choose by."""
        settings = self.settings
        return any(value is not None for value in (settings.max_drop, settings.target_latency, settings.name))

    @property
    def produces(self) -> str:
        """See the base class."""
        return "chosen model" if self.makes_model else "front"

    @property
    def entry_point(self) -> str:
        """See the base class."""
        return "" if self.makes_model else "front.png"

    def inputs(self) -> list[str]:
        """See the base class. Another report has other models, so that it stands for them."""
        return [self.settings.report]

    def source(self) -> None:
        """See the base class."""
        return None

    def made_of(self, folder: Path) -> list[str]:
        """See the base class."""
        chosen = _read_choice(folder)["chosen"]
        return [] if chosen is None else [chosen]

    def describe(self) -> str:
        """See the base class."""
        settings = self.settings
        limits = []
        if settings.max_drop is not None:
            limits.append(f"loses at most {_percent(settings.max_drop)}")
        if settings.target_latency is not None:
            limits.append(f"takes at most {settings.target_latency:g} ms")
        if settings.name is not None:
            return f"taking {settings.name}"
        return f"choosing what {' and '.join(limits)}" if limits else "showing what there is to choose from"

    def candidates(self, stages: Mapping[str, Stage]) -> list[str]:
        """What can be chosen: the models that the report measures, without its baseline."""
        report = stages[self.settings.report]
        return [name for name in report.inputs() if name != report.settings.baseline]

    def check_sources(self, stages: Mapping[str, Stage]) -> None:
        """See the base class."""
        settings = self.settings
        report = stages.get(settings.report)
        if not isinstance(report, Benchmark):
            raise FlexCompressError(
                f'report names "{settings.report}", which is no stage of the type benchmark: name one.'
            )
        known = self.candidates(stages)
        if not known:
            raise FlexCompressError(f"report names {settings.report}, which measures nothing beside its baseline.")
        if settings.name is not None and settings.name not in known:
            raise FlexCompressError(
                f'name is "{settings.name}", which {settings.report} does not measure.{nearest(settings.name, known)}'
            )

    def check(self, models: Mapping[str, PreTrainedModel | None]) -> None:
        """Looks whether the front can be drawn."""
        from ...evaluation.benchmark import require_report_extra

        require_report_extra()

    def run(self, context: StageContext) -> dict[str, Any]:
        """See the base class."""
        from ...evaluation.report import Report
        from ...search.picture import draw_front

        settings = self.settings
        front, shape = front_of(Report.load(context.artifact(settings.report)))
        facts: dict[str, Any] = {"chosen": None, "met": True, "sentence": ""}
        if self.makes_model:
            facts = choose(front, shape, settings)
            front.picked = next(point for point in front.scored if front.name(point) == facts["chosen"])
            _copy_model(context, facts["chosen"])
        facts |= {"metric": front.metric, "models": _models(front, shape)}
        front.save(context.output)
        draw_front(front, context.output)
        _write_choice(context.output, facts)
        context.say(f"What there is to choose from: {front.metric} against the time of one batch ({shape})")
        context.say(front_table(front))
        if facts["sentence"]:
            context.say(f"{context.name}: {facts['sentence']}")
        return facts


def _ratio(point: Point) -> float:
    """What models are ranked by: ratios of times that were measured side by side hold where milliseconds do not."""
    return point.relative_cost


def front_of(report: Any) -> tuple[Front, str]:
    """The models of a report as a front of metric against the latency of the first shape, and that shape.

    Raises:
        FlexCompressError: The report has no metric, or times nothing.
    """
    from ...search.front import Front, Point, pareto

    shapes = report.shapes()
    if not shapes or not report.metric or any(report.metric not in model.metrics for model in report.models):
        raise FlexCompressError("the benchmark has measured no metric and latency of every model to choose by.")
    shape, baseline = shapes[0], report[report.baseline]

    def point(model: Any) -> Point:
        timing = model.latency[shape]
        return Point(
            candidate={"stage": model.name},
            metric=model.metrics[report.metric],
            cost=1e3 * timing["median"],
            relative_cost=1 / timing["speedup"],
            details={"name": model.name, "bytes": model.size},
        )

    full = point(baseline)
    others = [point(model) for model in report.models if model is not baseline]
    front = Front(
        kind="model",
        objective="latency",
        metric=report.metric,
        greater_is_better=report.greater_is_better,
        unit=report.unit,
        runtime="the runtime of each model",
        max_length=max(report.settings["lengths"]),
        full=full,
        points=pareto([full, *others], report.greater_is_better, cost=_ratio),
        scored=sorted([full, *others], key=_ratio),
        environment=report.environment,
        options={"shape": shape, "split": report.split, "rows": report.rows},
    )
    return front, shape


def choose(front: Front, shape: str, settings: ChooseSettings) -> dict[str, Any]:
    """Chooses from a front, the fastest by the ratios of times; milliseconds are for the limit alone.

    Args:
        front: From [`front_of`].
        shape: What its latencies are of.
        settings: By what.

    Returns:
        `chosen`, the name; `met`, whether the limits are; `sentence`, the same in words; `lost`, `milliseconds`.
    """
    from ...search import read_share

    candidates = [point for point in front.scored if point is not front.full]
    if settings.name is not None:
        point = next(point for point in candidates if front.name(point) == settings.name)
        return _facts(front, point, True, f"{_words(front, point, shape)}, as asked.")
    drop = math.inf if settings.max_drop is None else read_share("max_drop", settings.max_drop, 0.0)
    if not front.full.metric and front.greater_is_better and settings.max_drop is not None:
        point = min(candidates, key=_ratio)
        return _facts(
            front,
            point,
            False,
            f"The {front.metric} of {front.name(front.full)} is 0, of which nothing can be lost: look at its labels, or "
            "train it longer (--set stages.finetune.epochs=N).",
        )
    limit = math.inf if settings.target_latency is None else settings.target_latency
    good = [point for point in candidates if front.drop(point) <= drop + 1e-9]
    quick = [point for point in candidates if point.cost <= limit]
    both = [point for point in good if point.cost <= limit]
    if both:
        # Speed is what is left to wish for within a drop; without one it is the metric.
        point = min(both, key=front.drop if settings.max_drop is None else _ratio)
        faster = f"{1 / point.relative_cost:.2f} times as fast as {front.name(front.full)}"
        return _facts(front, point, True, f"{_words(front, point, shape)}, and is {faster}.")
    asked = [f"loses at most {_percent(drop)}"] if settings.max_drop is not None else []
    asked += [f"takes at most {limit:g} ms for {shape}"] if settings.target_latency is not None else []
    # Said once.
    where = "" if settings.target_latency is not None else shape
    parts = []
    if good and settings.max_drop is not None:
        parts.append(f"the fastest that loses no more is {_words(front, min(good, key=_ratio), where)}")
    if quick and settings.target_latency is not None:
        parts.append(f"the best that is as fast is {_words(front, min(quick, key=front.drop), where)}")
    # What was promised about the metric counts first.
    pool = good if settings.max_drop is not None and good else candidates
    point = min(pool, key=front.drop if not good else _ratio)
    if not parts:
        kind = "that loses least" if not good else "fastest"
        parts.append(f"the model {kind} is {_words(front, point, where)}")
    sentence = (
        f"No model {' and '.join(asked)}: {'; '.join(parts)}. Ask for one of these, or train longer "
        "(--set stages.STAGE.epochs=N)."
    )
    return _facts(front, point, False, sentence)


def _facts(front: Front, point: Point, met: bool, sentence: str) -> dict[str, Any]:
    lost = front.drop(point)
    return {
        "chosen": front.name(point),
        "met": met,
        "sentence": sentence,
        "lost": None if math.isinf(lost) else lost,
        "milliseconds": point.cost,
    }


def _models(front: Front, shape: str) -> list[dict[str, Any]]:
    """All models for `stage.json`, the fastest first."""
    return [
        {
            "name": front.name(point),
            front.metric: point.metric,
            "milliseconds": point.cost,
            "shape": shape,
            "faster": 1 / point.relative_cost,
            "bytes": point.details.get("bytes"),
            "front": point in front.points,
        }
        for point in front.scored
    ]


def _words(front: Front, point: Point, shape: str = "") -> str:
    lost = front.drop(point)
    change = f"loses {_percent(lost)}" if lost > 0 else f"gains {_percent(-lost)}" if lost < 0 else "loses nothing"
    return f"{front.name(point)}, which takes {point.cost:.3g} ms{f' for {shape}' if shape else ''} and {change}"


def front_table(front: Front) -> str:
    """All models, the fastest first: those that nothing beats are marked `o`, the chosen one `*`."""
    from ...evaluation.formatting import MISSING, format_bytes, format_metric, text_table

    rows = []
    for point in front.scored:
        mark = "*" if point == front.picked else "o" if point in front.points else " "
        lost = front.drop(point)
        rows.append(
            [
                f"{mark} {front.name(point)}",
                front.show_cost(point),
                f"{1 / point.relative_cost:.2f}x",
                format_metric(point.metric, front.unit),
                MISSING if point is front.full else _percent(lost),
                format_bytes(point.details["bytes"]),
            ]
        )
    return text_table(["  model", "time", "faster", front.metric, "lost", "size"], rows)


def _percent(share: float | str) -> str:
    from ...search import read_share

    number = read_share("max_drop", share, 0.0) if isinstance(share, str) else share
    return f"{100 * number:.3g} %"


def _copy_model(context: StageContext, name: str) -> None:
    from ..workspace import MANIFEST

    source = Path(context.artifact(name))
    for path in source.iterdir():
        if path.name == MANIFEST:
            continue
        if path.is_dir():
            shutil.copytree(path, context.output / path.name)
        else:
            shutil.copy(path, context.output / path.name)


def _write_choice(folder: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(dict(facts), indent=1, ensure_ascii=False)
    (folder / CHOICE_FILE).write_text(text + "\n", encoding="utf-8")


def _read_choice(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CHOICE_FILE).read_text(encoding="utf-8"))


CHOOSING = (Keep, Choose)
