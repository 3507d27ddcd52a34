"""The recipe `full` from end to end on a tiny model, the stages that choose, and what may not be stacked."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import transformers

from optimum_flexcompress import FlexCompressConfig
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import Report, open_artifact
from optimum_flexcompress.recipes import load_recipe, run_recipe
from optimum_flexcompress.recipes.stages import Pick, lengths
from optimum_flexcompress.recipes.stages.lengths import PickSettings
from optimum_flexcompress.search import Front, Point


TIMING = ["rounds=3", "max_seconds=0.05", "stream_rows=0", "batch_sizes=[2]", "memory=false", "threads=1"]
INT8 = ("int8-dense", "int8-distill", "int8-prune", "int8-adapt", "int8")
SETTINGS = [
    *(f"{stage}.{setting}" for stage in ("finetune", "modular", "distill", "adapt") for setting in ("epochs=1", "batch_size=8")),
    *(f"prune.{setting}" for setting in ("max_steps=30", "mask_learning_rate=0.5", "align=1", "batch_size=8", "probe_samples=0")),
    "search.population=4",
    "search.trials=6",
    # Fused graphs have tests of their own, and take their time.
    *(f"{stage}.options={{fuse: false}}" for stage in INT8),
    *(f"benchmark.{setting}" for setting in TIMING),
]  # fmt: skip
QUICK = ["data.max_length=24", *(f"stages.{setting}" for setting in SETTINGS)]


@pytest.fixture(scope="module")
def compress(tmp_path_factory, model_folder, data_folder):
    def compress(recipe, overrides, output=None, model=model_folder):
        said = []
        result = run_recipe(
            load_recipe(str(recipe), overrides),
            str(model),
            str(data_folder),
            "text-classification",
            output or tmp_path_factory.mktemp("runs") / "out",
            say=said.append,
        )
        return SimpleNamespace(said="\n".join(said), **vars(result))

    return compress


@pytest.fixture(scope="module")
def full(compress):
    return compress("full", QUICK)


def test_every_method_is_in_what_comes_out(full):
    methods = {
        name: [method.method_type for method in FlexCompressConfig.from_pretrained(full.folders[name]).methods]
        for name in ("modular", "distill", "prune", "adapt")
    }
    assert methods == {
        "modular": ["modular"],
        "distill": ["minilm", "distillation"],
        "prune": ["vib_pruning", "distillation"],
        "adapt": ["length_adaptive"],
    }
    adapted = transformers.AutoModelForSequenceClassification.from_pretrained(full.folders["adapt"])
    # Half of four layers, and narrower ones.
    assert adapted.config.num_hidden_layers == 2
    report = Report.load(full.folders["benchmark"])
    assert report["adapt"].parameters == report["prune"].parameters < report["distill"].parameters
    assert report["int8"].precision == "int8" and report["int8"].lengths and not report["int8-adapt"].lengths


def test_the_report_shows_what_each_step_gained_and_lost(full):
    report = Report.load(full.folders["benchmark"])
    assert {model.name: model.before for model in report.models} == {
        "finetune": None,
        "half": "finetune",
        "distill": "half",
        "prune": "distill",
        "adapt": "prune",
        "int8-dense": "finetune",
        "int8-distill": "int8-dense",
        "int8-prune": "int8-distill",
        "int8-adapt": "int8-prune",
        "int8": "int8-adapt",
    }
    header, rows = report.step_rows()
    (row,) = (row for row in rows if row[0] == "int8-prune")
    pruned, before = report["int8-prune"], report["int8-distill"]
    change = 100 * (pruned.metrics["accuracy"] - before.metrics["accuracy"])
    assert row[header.index("accuracy")] == f"{change:+.2f} pt"
    assert row[header.index("size")] == f"{100 * pruned.size / before.size:.1f} %"
    assert row[header.index("MACs")] == f"{100 * pruned.macs['24'] / before.macs['24']:.1f} %"
    assert "Step by step" in full.said and "Step by step" in (full.folders["benchmark"] / "report.html").read_text()


def test_graphs_are_traced_in_what_they_were_made_from():
    (stage,) = (spec.stage for spec in load_recipe("full", QUICK).stages if spec.name == "benchmark")
    found = stage._originals(SimpleNamespace(artifact=lambda name: f"out/{name}"))
    origins = ("finetune", "distill", "prune", "adapt", "adapt")
    assert found == {name: f"out/{origin}" for name, origin in zip(INT8, origins)}


def test_without_a_limit_there_is_a_front_to_choose_from(full):
    front = Front.load(full.folders["best"])
    assert front.picked is None and {front.name(point) for point in front.scored} >= {"finetune", *INT8}
    assert full.metrics["best"]["chosen"] is None
    assert not (full.folders["best"] / "config.json").exists() and (full.folders["best"] / "front.png").is_file()


def test_a_limit_chooses_and_trains_nothing_again(compress, full):
    result = compress("full", [*QUICK, "stages.best.max_drop=100%"], output=full.output)
    assert [name for name in result.folders if name not in result.skipped] == ["best"]
    front = Front.load(result.folders["best"])
    candidates = [point for point in front.scored if front.name(point) != "finetune"]
    assert front.picked == min(candidates, key=lambda point: point.relative_cost)
    chosen = result.metrics["best"]["chosen"]
    assert chosen == front.name(front.picked) and result.metrics["best"]["met"]
    open_artifact(result.folders["best"], "text-classification")
    card = (result.folders["best"] / "README.md").read_text()
    assert f"`{chosen}`" in card and "| accuracy |" in card


def test_a_limit_that_nothing_keeps_leaves_the_nearest(compress, full):
    result = compress("full", [*QUICK, "stages.best.target_latency=0.0001"], output=full.output)
    found = result.metrics["best"]
    front = Front.load(result.folders["best"])
    candidates = [point for point in front.scored if front.name(point) != "finetune"]
    fastest = min(candidates, key=lambda point: point.relative_cost)
    assert not found["met"] and found["chosen"] == front.name(fastest) and found["milliseconds"] == fastest.cost
    assert found["sentence"].startswith("No model takes at most 0.0001 ms for 2x24: the model fastest is ")
    assert (result.folders["best"] / "config.json").is_file()


def test_a_name_takes_that_model(compress, full):
    result = compress("full", [*QUICK, "stages.best.name=int8-dense"], output=full.output)
    assert result.metrics["best"]["chosen"] == "int8-dense"
    same = [(result.folders[name] / "model.onnx").read_bytes() for name in ("best", "int8-dense")]
    assert same[0] == same[1]


KEEP = """\
data: {max_length: 24}
stages:
  finetune: {epochs: 8, batch_size: 8, learning_rate: 3e-3, attention_dropout: 0}
  ruined: {type: finetune, model: finetune, skip_if_trained: false, max_steps: 2, learning_rate: 10.0}
  kept: {type: keep, model: ruined, instead: finetune, max_drop: 0.1}
"""


@pytest.mark.parametrize(("max_drop", "chosen"), [("10%", "finetune"), ("100%", "ruined")])
def test_a_step_that_loses_too_much_is_left_out(compress, tmp_path, max_drop, chosen):
    file = tmp_path / "keep.yaml"
    file.write_text(KEEP)
    result = compress(file, [f"stages.kept.max_drop={max_drop}"], output=tmp_path / "out")
    assert result.metrics["kept"]["chosen"] == chosen and result.metrics["kept"]["lost"] > 0.1
    weights = [(result.folders[name] / "model.safetensors").read_bytes() for name in ("kept", chosen)]
    assert weights[0] == weights[1]
    # What the model was trained with is what is trained on.
    config = transformers.AutoConfig.from_pretrained(result.folders["kept"])
    assert (config.attention_probs_dropout_prob, config.hidden_dropout_prob) == (0.0, 0.1)


@pytest.mark.parametrize(
    ("dense", "max_drop", "picked"),
    [(0.80, "2%", 50.0), (0.75, "5%", 50.0), (0.73, "5%", 20.0), (0.90, "1%", None), (0.80, "0.1%", None)],
)
def test_lengths_are_picked_by_what_the_baseline_scores(tmp_path, monkeypatch, dense, max_drop, picked):
    """Of 0.80 with all tokens, at a cost of 100: 0.79 at 50 and 0.70 at 20."""
    points = [
        Point({"fractions": [cost / 100] * 2, "unit": "fractions"}, metric, cost, cost / 100)
        for cost, metric in ((20.0, 0.70), (50.0, 0.79), (100.0, 0.80))
    ]
    front = Front(
        kind="lengths", objective="macs", metric="accuracy", greater_is_better=True, unit="share", runtime="pytorch",
        max_length=24, full=points[-1], points=points, scored=points,
    )  # fmt: skip
    front.save(tmp_path)
    monkeypatch.setattr(
        lengths, "score_held_out", lambda *arguments: ([dense], SimpleNamespace(greater_is_better=True))
    )
    (tmp_path / "out").mkdir()
    context = SimpleNamespace(
        name="pick", artifact=lambda name: tmp_path, output=tmp_path / "out", say=lambda line: None
    )
    settings = {"max_drop": max_drop, "baseline": "finetune"}
    if picked is None:
        with pytest.raises(FlexCompressError, match=r"loses .* of what finetune scores|No configuration of the front"):
            Pick(PickSettings(**settings)).run(context)
        # The least that can be lost.
        settings["best_effort"], picked = True, 50.0
    Pick(PickSettings(**settings)).run(context)
    assert Front.load(tmp_path / "out").picked.cost == picked


def test_a_skipped_stage_is_stood_in_for():
    def read(*skipped, more=()):
        recipe = load_recipe("full", [*(f"stages.{name}.skip=true" for name in skipped), *more])
        return {spec.name: spec.stage.inputs() for spec in recipe.stages}

    found = read("modular", "half", more=["stages.distill.layers=0.5"])
    assert "half" not in found and found["distill"] == ["finetune"] and "half" not in found["benchmark"]
    found = read("prune")
    assert found["adapt"] == ["distill"] and found["int8-prune"] == ["distill"]
    found = read("adapt", "search", "pick", "int8-adapt")
    # Lengths that nothing picks are not set.
    assert found["int8"] == ["prune"]
    found = read(more=["stages.depth.skip=false"])
    assert found["depth"] == ["distill", "finetune"] and found["prune"] == ["depth"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.search.skip=true"], "stages.pick reads search, which is skipped and stands for no model: add skip"),
        (["stages.finetune.attention_dropout=1"], "attention_dropout must be at least 0 and below 1"),
        (["stages.prune.skip=maybe"], "stages.prune.skip must be true or false"),
        (["stages.best.name=int9"], 'stages.best: name is "int9", which benchmark does not measure. Did you mean'),
        (["stages.best.name=int8", "stages.best.max_drop=1%"], "name chooses by itself"),
        (["stages.best.report=search"], 'report names "search", which is no stage of the type benchmark'),
        (["stages.best.max_drop=2"], "max_drop is 2.0: give a share between 0 and 1"),
        (["stages.best.target_latency=-1"], "target_latency must be milliseconds, more than 0"),
        (["stages.pick.max_drop=null", "stages.pick.max_cost=0.5"], "baseline is what max_drop is measured against"),
    ],
)
def test_settings_that_do_not_fit(overrides, message):
    with pytest.raises(FlexCompressError, match=message):
        load_recipe("full", overrides)


STACK = "stages:\n  finetune: {}\n"
ADAPT = "  adapt: {type: length-adaptive, model: finetune}\n"
PRUNE = "  prune: {model: %s, target_sparsity: 0.5%s}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ADAPT + PRUNE % ("adapt", ""),
            "stages.prune trains what adapt has trained to drop tokens, and would undo that",
        ),
        (ADAPT + "  modular: {model: adapt}\n", "put modular before adapt"),
        (PRUNE % ("finetune", "") + "  modular: {model: prune}\n", "modules that stand for layers of one size"),
        (
            PRUNE % ("finetune", "") + "  distill: {model: prune, methods: {minilm: {}}}\n",
            "compares queries, keys and values by minilm, of which prune may leave any number",
        ),
        (ADAPT + PRUNE % ("adapt", ", methods: {length_adaptive: {}}"), None),
        (PRUNE % ("finetune", ", uniform: true") + "  modular: {model: prune}\n", None),
        (PRUNE % ("finetune", "") + "  distill: {model: prune}\n" + ADAPT.replace("finetune", "distill"), None),
    ],
)
def test_what_may_not_be_stacked(tmp_path, text, message):
    file = tmp_path / "stack.yaml"
    file.write_text(STACK + text)
    if message is None:
        assert load_recipe(str(file)).stages
        return
    with pytest.raises(FlexCompressError, match=message) as error:
        load_recipe(str(file))
    assert str(error.value).startswith("stack.yaml, line ")


def test_a_run_remembers_what_was_chosen(full):
    manifest = json.loads((full.output / "best" / "stage.json").read_text())
    assert {"chosen", "met", "sentence"} <= set(manifest["metrics"])
