"""The planner's rules, what it expects of time, and how the choice reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import transformers

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.recipes import load_recipe
from optimum_flexcompress.recipes.budget import Budget
from optimum_flexcompress.recipes.forecast import MASK_OVERHEAD, MINILM_OVERHEAD, Facts, forecast
from optimum_flexcompress.recipes.planner import earlier_plan, make_plan, planned_recipe, time_table
from optimum_flexcompress.recipes.rules import RULES, Plan, decide
from optimum_flexcompress.recipes.stages.choice import ChooseSettings, choose, front_of
from optimum_flexcompress.search import Front
from optimum_flexcompress.search.front import Point, pareto
from tests.tasks.toys import word_tokenizer


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
GUIDES = Path(__file__).parents[2] / "docs" / "source" / "usage_guides"
ENCODER = Facts(
    task="text-classification",
    kind="encoder",
    layers=6,
    even=True,
    width=384,
    labels=True,
    trained=False,
    rows=8000,
    eval_rows=1000,
    steps_per_epoch=250,
    tokens=200,
    bf16=True,
    shape="32x256",
    int8_milliseconds=20.0,
    graph_seconds=10.0,
    step_seconds=0.03,
    forward_seconds=0.01,
    update_seconds=0.1,
)
SHORT = dataclasses.replace(ENCODER, tokens=20)
DECODER = dataclasses.replace(ENCODER, task="text-generation", kind="decoder")
BOTH = dataclasses.replace(ENCODER, task="text2text-generation", kind="encoder-decoder", layers=12)


def stages(facts, **budget):
    budget = Budget(**budget)
    return [spec.name for spec in planned_recipe(decide(facts, budget), budget).stages]


def settings(facts, stage, *overrides, **budget):
    budget = Budget(**budget)
    recipe = planned_recipe(decide(facts, budget), budget, overrides)
    return next(spec.stage.settings for spec in recipe.stages if spec.name == stage)


def test_every_rule_names_a_benchmark_that_there_is():
    plan = decide(ENCODER, Budget())
    assert [decision.rule for decision in plan.decisions] == [rule.name for rule in RULES]
    for rule in RULES:
        assert rule.evidence
        for name in rule.evidence:
            assert (BENCHMARKS / name).with_suffix(".py").is_file(), name
            assert (BENCHMARKS / "results" / name).is_file(), name
    assert "width     VIB pruning" in str(
        plan
    ) and "[vib_text.json, vib_lm.json, full_stack.json, compress_budget.json]" in str(plan)


def test_the_rules_are_in_the_documentation():
    page = (GUIDES / "recipes.mdx").read_text(encoding="utf-8")
    _, _, table = page.partition("| rule | applies | then | results |\n|---|---|---|---|\n")
    rows = [
        [
            rule.name,
            rule.when,
            rule.then,
            ", ".join(f"`{name}`" for name in rule.evidence),
        ]
        for rule in RULES
    ]
    assert table.splitlines()[: len(rows) + 1] == [*(f"| {' | '.join(row)} |" for row in rows), ""]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            ENCODER,
            "finetune distill prune adapt search pick int8-dense int8-distill int8-prune int8-adapt int8 benchmark best",
        ),
        (
            SHORT,
            "finetune distill prune int8-dense int8-distill int8-prune benchmark best",
        ),
        (
            dataclasses.replace(ENCODER, layers=3, tokens=None, task="image-classification"),
            "finetune prune int8-dense int8-prune benchmark best",
        ),
        (
            dataclasses.replace(ENCODER, shape="1x256"),
            "finetune distill prune int8-dense int8-distill int8-prune benchmark best",
        ),
        (BOTH, "finetune modular half prune int8-dense int8-distill int8-prune benchmark best"),
        (dataclasses.replace(BOTH, even=False), "finetune prune int8-dense int8-prune benchmark best"),
        (DECODER, "finetune prune int8-dense int8-prune benchmark best"),
        (dataclasses.replace(ENCODER, labels=False, task="feature-extraction"), "finetune int8-dense benchmark best"),
    ],
)
def test_which_steps_are_stacked(facts, expected):
    assert " ".join(stages(facts)) == expected


def test_int8_alone_is_taken_where_it_is_enough():
    assert stages(ENCODER, target_latency=25.0) == ["finetune", "int8-dense", "benchmark", "best"]
    assert "prune" in stages(ENCODER, target_latency=15.0)
    # A drop alone asks for the fastest model.
    assert "prune" in stages(ENCODER, max_drop=0.01)


def test_a_step_that_its_stages_refuse_is_left_out(model_folder, data_folder, tmp_path):
    """MiniLM finds no number of relation heads that divides a width of 30."""
    from tests.tiny import build

    names = {"hidden_size": 30, "num_attention_heads": 3, "num_hidden_layers": 4, "vocab_size": 400}
    build("bert", "BertModel", **names).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    budget, overrides = Budget(), ["data.max_length=24", "stages.benchmark.threads=1", "stages.prune.align=1"]
    plan = make_plan(str(tmp_path), str(data_folder), "text-classification", budget, overrides, lambda line: None)
    found = {decision.rule: decision for decision in plan.decisions}
    assert found["width"].applies and not found["layers"].applies
    assert "relation heads divides the widths 30" in found["layers"].why
    assert "distill" not in [spec.name for spec in planned_recipe(plan, budget, overrides).stages]


@pytest.mark.parametrize(
    ("family", "name", "task", "kind", "steps"),
    [
        ("gpt2", "GPT2LMHeadModel", "text-generation", "decoder", {"width"}),
        ("t5", "T5ForConditionalGeneration", "text2text-generation", "encoder-decoder", {"layers", "width"}),
        ("bert", "BertForMaskedLM", "fill-mask", "encoder", {"layers", "width"}),
        ("bert", "BertModel", "feature-extraction", "encoder", set()),
    ],
)
def test_other_kinds_of_models_are_measured_and_planned_for(tmp_path, family, name, task, kind, steps):
    from tests.tiny import build

    depth = {"gpt2": "n_layer", "t5": "num_layers"}.get(family, "num_hidden_layers")
    more = {"num_decoder_layers": 4} if family == "t5" else {}
    build(family, name, **{depth: 4}, **more).save_pretrained(tmp_path / "model")
    word_tokenizer(eos_token="[SEP]").save_pretrained(tmp_path / "model")
    rows = ["the film was very good,the plot was bad"] * 40
    (tmp_path / "train.csv").write_text("\n".join(["text,target", *rows]) + "\n")
    overrides = ["data.max_length=16", "stages.benchmark.threads=1", "stages.benchmark.new_tokens=2"]
    # So small a model has no multiples of 8 to choose among.
    overrides.append("stages.prune.align=1")
    plan = make_plan(
        str(tmp_path / "model"), str(tmp_path / "train.csv"), task, Budget(), overrides, lambda line: None
    )
    assert plan.facts.kind == kind and plan.facts.int8_milliseconds > 0
    assert (plan.facts.step_seconds > 0) == bool(steps)
    applied = {decision.rule for decision in plan.decisions if decision.applies}
    assert applied & {"layers", "width", "tokens"} == steps


def test_how_much_goes():
    def goes(facts, **budget):
        found = settings(facts, "prune", **budget)
        return found.target_sparsity, found.sparsity_of

    # Of the fine-tuned model, whether or not the half of it is kept.
    assert goes(ENCODER) == goes(ENCODER, target_latency=8.0) == goes(SHORT, max_drop=0.01) == (0.75, "finetune")
    assert goes(ENCODER, target_latency=6.0) == (0.85, "finetune")
    assert goes(ENCODER, max_drop=0.01) == (0.7, None) and goes(DECODER) == (0.3, None)
    assert settings(ENCODER, "distill").layers == 0.5 and settings(BOTH, "half").ratio == 2


def test_layers_of_long_inputs_go_for_a_drop_only_where_much_is_asked_for():
    assert "distill" not in stages(ENCODER, max_drop=0.01)
    assert "distill" not in stages(ENCODER, max_drop=0.01, target_latency=11.0)
    assert "distill" in stages(ENCODER, max_drop=0.01, target_latency=9.0)
    assert "distill" in stages(ENCODER, target_latency=6.0)
    assert "half" in stages(BOTH, max_drop=0.01) and "distill" in stages(SHORT, max_drop=0.01)
    # Where its stages refuse, the whole model is left to prune.
    plan = decide(ENCODER, Budget(), {"layers": "why"})
    width = next(decision for decision in plan.decisions if decision.rule == "width")
    assert "70 % of the layers" in width.why and "stages.prune.target_sparsity=0.7" in width.overrides


def test_steps_that_are_not_worth_it_are_left_out_only_for_a_drop():
    assert not {"depth", "width"} & set(stages(ENCODER))
    assert {"depth", "width"} <= set(stages(ENCODER, max_drop=0.02, target_latency=4.0))
    assert {"depth", "width"} & set(stages(ENCODER, max_drop=0.02)) == {"width"}
    assert {"depth", "width"} & set(stages(SHORT, max_drop=0.02)) == {"depth"}
    # The last step has nothing after it.
    assert {"depth", "width"} & set(stages(BOTH, max_drop=0.02)) == {"depth"}
    assert settings(ENCODER, "width", max_drop=0.02).max_drop == 0.02


def test_a_budget_reaches_the_choices_and_the_users_settings_win():
    budget = {"max_drop": 0.02, "target_latency": 12.5}
    best = settings(ENCODER, "best", **budget)
    assert (best.max_drop, best.target_latency) == (0.02, 12.5)
    assert settings(ENCODER, "pick", **budget).max_drop == 0.02
    assert settings(ENCODER, "prune", "stages.prune.max_steps=7", **budget).max_steps == 7
    assert settings(ENCODER, "best", name="int8-dense").name == "int8-dense"
    with pytest.raises(
        FlexCompressError, match=r'^--choose int8-dens is not .* measured. Did you mean "int8-dense"\?'
    ):
        settings(ENCODER, "best", name="int8-dens")


def test_how_it_is_trained():
    assert settings(SHORT, "finetune").learning_rate == 2e-4
    wide = dataclasses.replace(SHORT, width=768, bf16=False)
    assert settings(wide, "finetune").learning_rate == 5e-5 and settings(wide, "finetune").arguments == {}
    for stage in ("finetune", "distill", "prune", "adapt"):
        found = settings(ENCODER, stage)
        assert found.arguments == {"bf16": True} and found.attention_dropout == 0.0
    # A thousand steps, or four epochs.
    for steps, epochs in ((100, 10), (250, 4), (400, 4)):
        assert settings(dataclasses.replace(SHORT, steps_per_epoch=steps), "prune").epochs == epochs


def test_how_it_is_trained_where_tokens_are_dropped():
    for stage in ("finetune", "distill", "prune", "adapt"):
        found = settings(ENCODER, stage)
        assert (found.learning_rate, found.batch_size) == (5e-5, 16)
    # A thousand steps of 16 rows, or three epochs.
    for steps, epochs in ((100, 5), (250, 3)):
        assert settings(dataclasses.replace(ENCODER, steps_per_epoch=steps), "prune").epochs == epochs
    assert settings(ENCODER, "finetune").epochs == 2 and settings(SHORT, "finetune").epochs == 3
    pruned, adapted = settings(ENCODER, "prune"), settings(ENCODER, "adapt")
    for taught in (pruned.methods["distillation"], adapted.methods["distillation"]):
        assert (taught["temperature"], taught["task_loss_weight"]) == (4.0, 0.0)
    assert settings(ENCODER, "search").bf16
    assert not settings(dataclasses.replace(ENCODER, bf16=False), "search").bf16
    assert adapted.teacher == "finetune" and adapted.methods["length_adaptive"]["layer_drop"] == 0.0


def test_a_plan_survives_its_file():
    plan = decide(ENCODER, Budget(max_drop=0.01))
    assert Plan.from_dict(plan.to_dict()) == plan


def recipe_in_run(plan, budget, overrides=()):
    return {"name": "plan", **planned_recipe(plan, budget, overrides).to_dict()}


def test_a_plan_is_made_anew_for_other_rows_and_for_a_faster_target(tmp_path):
    given = {"model": "bert", "dataset": "reviews", "task": "text-classification"}
    said = []

    def found(made_for, asked, overrides=(), before=()):
        plan = decide(ENCODER, made_for)
        recipe = recipe_in_run(plan, made_for, before)
        (tmp_path / "run.json").write_text(json.dumps({"format": 1, **given, "stages": [], "recipe": recipe}))
        return earlier_plan(tmp_path, **given, budget=asked, overrides=overrides, say=said.append) == plan

    few = ["data.max_train_samples=40"]
    assert found(Budget(), Budget(), few, few) and not found(Budget(), Budget(), (), few)
    assert "choice of rows or columns (data)" in said.pop()
    slow, quick = Budget(target_latency=5000.0), Budget(target_latency=5.0)
    assert found(quick, slow) and found(slow, slow) and found(slow, Budget(name="int8-dense"))
    assert found(quick, Budget(max_drop=0.01)) and not said
    # There int8 alone was enough.
    for asked in (quick, Budget(), Budget(max_drop=0.01)):
        assert not found(slow, asked) and "another target latency (5000 ms)" in said.pop()


def test_a_plan_is_for_one_model_data_set_and_task_however_they_are_spelt(tmp_path, monkeypatch):
    for name in ("bert", "other", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    plan = decide(ENCODER, Budget())
    given = {"model": "../bert", "dataset": "me/reviews:small", "task": "text-classification"}
    run = {"format": 1, **given, "stages": [], "recipe": recipe_in_run(plan, Budget())}
    said = []

    def found(run=run, **changed):
        (tmp_path / "work" / "run.json").write_text(json.dumps(run))
        return earlier_plan(tmp_path / "work", **{**given, **changed}, budget=Budget(), say=said.append)

    assert found() == found(model=str(tmp_path / "bert")) == found(model="../bert/") == plan
    with_paths = run | {"resolved": {"model": str(tmp_path / "bert"), "dataset": "me/reviews:small"}}
    monkeypatch.chdir(tmp_path)
    assert found(with_paths, model="bert") == plan and not said
    assert found(with_paths, model="other") is None
    assert found(with_paths, model="bert", dataset="me/reviews", task="feature-extraction") is None
    assert said == [
        f"{tmp_path / 'work'} holds a run of another {what}: planning anew; stages that do not fit are made again."
        for what in ("model (../bert)", "data set (me/reviews:small) and another task (text-classification)")
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("1%", "20ms"), (0.01, 20.0)),
        (("0.5%", "0.02s"), (0.005, 20.0)),
        (("0.01", "20"), (0.01, 20.0)),
        ((None, None), (None, None)),
    ],
)
def test_budgets_as_they_are_written(given, expected):
    budget = Budget.read(*given)
    assert (budget.max_drop, budget.target_latency) == pytest.approx(expected)


def test_budgets_in_words():
    assert str(Budget(0.005, 20.0)) == "Planned for a budget: loses at most 0.5 %, takes at most 20 ms."
    assert str(Budget()) == "Planned without a budget."
    assert str(Budget(name="int8")) == "Planned without a budget, and int8 was chosen by its name."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("1", None), "--max-drop 1 allows to lose everything: write 1% or 0.01"),
        (("2%%", None), "--max-drop is '2%%': give a share"),
        (("-1%", None), "--max-drop is '-1%': give a share"),
        ((None, "fast"), "--target-latency is 'fast': give a time above 0, such as 20ms"),
        ((None, "0ms"), "--target-latency is '0ms'"),
        ((None, "nan"), "--target-latency is 'nan'"),
    ],
)
def test_budgets_that_are_none(given, message):
    with pytest.raises(FlexCompressError, match=message):
        Budget.read(*given)


# Expected times


def test_expected_times_count_rows_steps_and_what_is_left_of_the_model(tmp_path):
    recipe = load_recipe("full", ["stages.modular.skip=true", "stages.half.skip=true", "stages.distill.layers=0.5"])
    seconds = forecast(recipe, ENCODER)
    assert all(value is not None for value in seconds.values())
    epoch = 8000 * 0.03 + 250 * 0.1
    assert seconds["finetune"] == pytest.approx(3 * epoch + 1000 * 0.01)
    student = 8000 * MINILM_OVERHEAD * (0.5 * 0.03 + 0.01) + 250 * 0.5 * 0.1
    assert seconds["distill"] == pytest.approx(3 * student + 1000 * 0.5 * 0.01)
    masked = 8000 * (MASK_OVERHEAD * 0.5 * 0.03 + 0.5 * 0.01) + 250 * 0.5 * 0.1
    assert seconds["prune"] == pytest.approx(5 * masked + 1000 * 0.5 * 0.01)
    # A quarter of the model, in four passes of which three are smaller.
    assert 0.25 * epoch < seconds["adapt"] / 3 < 4 * 0.25 * epoch
    assert seconds["int8"] == ENCODER.graph_seconds
    # The same, told as a share of what there was in the beginning.
    of_all = ["stages.prune.target_sparsity=0.75", "stages.prune.sparsity_of=finetune"]
    same = load_recipe(
        "full", ["stages.modular.skip=true", "stages.half.skip=true", "stages.distill.layers=0.5", *of_all]
    )
    assert forecast(same, ENCODER) == seconds
    trained = dataclasses.replace(ENCODER, trained=True)
    assert forecast(recipe, trained)["finetune"] == 0.0
    tables = [time_table(recipe, forecast(recipe, facts), facts).splitlines() for facts in (ENCODER, trained)]
    assert [len(lines[0].rstrip()) for lines in tables] == [len(lines[2].rstrip()) for lines in tables]
    assert "fine-tuning the model on the task" in tables[0][2]
    assert "taking the model as it is: it is fine-tuned" in tables[1][2] and tables[1][0].endswith("time (m:ss)")


@pytest.mark.parametrize("name", ["distil-int8", "modular", "vtrans", "fast-vtrans", "quala-minilm"])
def test_other_recipes_have_expected_times_too(name):
    recipe = load_recipe(name)
    seconds = forecast(recipe, ENCODER)
    assert list(seconds) == [spec.name for spec in recipe.stages]
    trained = [spec.name for spec in recipe.stages if hasattr(spec.stage.settings, "learning_rate")]
    assert all(seconds[stage] > 10 for stage in trained)


# The choice


def front(*models, greater_is_better=True):
    """A front of (name, milliseconds, metric), the first the baseline."""
    cost = models[0][1]
    points = [Point({"stage": name}, metric, time, time / cost, {"name": name}) for name, time, metric in models]
    return Front(
        kind="model",
        objective="latency",
        metric="accuracy",
        greater_is_better=greater_is_better,
        unit="share",
        runtime="",
        max_length=128,
        full=points[0],
        points=pareto(points, greater_is_better),
        scored=points,
    )


FRONT = [("dense", 100.0, 0.90), ("int8", 40.0, 0.899), ("pruned", 20.0, 0.893), ("stacked", 10.0, 0.85)]


@pytest.mark.parametrize(
    ("limits", "chosen", "met"),
    [
        ({"max_drop": 0.01}, "pruned", True),
        ({"max_drop": "10%"}, "stacked", True),
        ({"max_drop": 0.002}, "int8", True),
        ({"max_drop": 0.0}, "int8", False),
        ({"target_latency": 40.0}, "int8", True),
        ({"target_latency": 15.0}, "stacked", True),
        ({"target_latency": 5.0}, "stacked", False),
        ({"max_drop": 0.01, "target_latency": 50.0}, "pruned", True),
        ({"max_drop": 0.01, "target_latency": 15.0}, "pruned", False),
        ({"name": "stacked"}, "stacked", True),
    ],
)
def test_what_is_chosen(limits, chosen, met):
    found = choose(front(*FRONT), "1x128", ChooseSettings(**limits))
    assert (found["chosen"], found["met"]) == (chosen, met)
    assert found["sentence"].startswith("No model") != met


def test_the_fastest_is_so_by_ratios_and_milliseconds_are_for_the_limit():
    """Side by side `steady` is the faster one; what its median came to is another matter."""
    times = {"dense": (100.0, 1.0), "steady": (41.0, 2.6), "lucky": (40.0, 2.4)}
    models = [
        SimpleNamespace(
            name=name,
            metrics={"accuracy": 0.9},
            latency={"1x128": {"median": milliseconds / 1e3, "speedup": speedup}},
            size=1,
        )
        for name, (milliseconds, speedup) in times.items()
    ]
    report = mock.MagicMock(models=models, metric="accuracy", baseline="dense", greater_is_better=True, unit="share")
    report.shapes.return_value, report.settings = ["1x128"], {"lengths": [128]}
    report.__getitem__.return_value = models[0]
    front, shape = front_of(report)
    assert [front.name(point) for point in front.scored] == ["steady", "lucky", "dense"]
    assert [front.name(point) for point in front.points] == ["steady"]
    found = choose(front, shape, ChooseSettings(max_drop=0.01))
    assert found["chosen"] == "steady"
    assert found["sentence"] == (
        "steady, which takes 41 ms for 1x128 and loses nothing, and is 2.60 times as fast as dense."
    )
    assert choose(front, shape, ChooseSettings(max_drop=0.01, target_latency=40.5))["chosen"] == "lucky"


def test_why_nothing_is_good_enough():
    found = choose(front(*FRONT), "1x128", ChooseSettings(max_drop=0.01, target_latency=15.0))
    assert found["sentence"] == (
        "No model loses at most 1 % and takes at most 15 ms for 1x128: the fastest that loses no more is pruned, which "
        "takes 20 ms and loses 0.778 %; the best that is as fast is stacked, which takes 10 ms and loses 5.56 %. Ask "
        "for one of these, or train longer (--set stages.STAGE.epochs=N)."
    )


def test_metrics_that_should_fall():
    models = [("dense", 100.0, 20.0), ("int8", 40.0, 20.1), ("pruned", 20.0, 24.0)]
    found = choose(front(*models, greater_is_better=False), "1x128", ChooseSettings(max_drop=0.01))
    assert found["chosen"] == "int8" and found["lost"] == pytest.approx(0.005)
