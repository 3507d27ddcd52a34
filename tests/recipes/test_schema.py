"""Recipes as files: what is accepted, and what the errors say."""

from __future__ import annotations

import pytest

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.recipes import list_recipes, load_recipe
from optimum_flexcompress.recipes.document import parse_document


GOOD = """\
description: Two stages.
seed: 7
data:
  max_length: 32
stages:
  finetune:
    epochs: 2
    learning_rate: 2e-4
  distill:
    teacher: finetune
    layers: [0, 2]
"""


def write(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def stage(recipe, name):
    return next(spec for spec in recipe.stages if spec.name == name).stage.settings


def test_reads_a_file(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert (recipe.name, recipe.description, recipe.seed) == ("mine", "Two stages.", 7)
    assert [spec.name for spec in recipe.stages] == ["finetune", "distill"]
    assert recipe.data.max_length == 32
    # YAML 1.1 reads 2e-4 as text.
    assert stage(recipe, "finetune").learning_rate == 2e-4
    assert stage(recipe, "distill").layers == [0, 2]


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_recipes_of_the_package_are_valid(name):
    recipe = load_recipe(name)
    assert recipe.description
    types = [spec.type for spec in recipe.stages]
    assert types[-1] == "benchmark" or types[-2:] == ["benchmark", "choose"]


def test_lists_the_recipes_of_the_issue():
    assert {"distil-int8", "minilm-int8"} <= set(list_recipes())


def test_overrides_win_and_reach_into_groups():
    recipe = load_recipe(
        "distil-int8",
        [
            "stages.distill.epochs=2",
            "stages.distill.layers=[1, 3]",
            "stages.distill.methods.distillation.temperature=4.5",
            "stages.finetune.arguments.label_smoothing_factor=0.1",
            "data.max_train_samples=100",
            "seed=3",
        ],
    )
    distill = stage(recipe, "distill")
    assert (distill.epochs, distill.layers) == (2.0, [1, 3])
    assert distill.methods["distillation"]["temperature"] == 4.5
    assert distill.methods["distillation"]["logits_weight"] == 1.0
    assert stage(recipe, "finetune").arguments == {"label_smoothing_factor": 0.1}
    assert (recipe.data.max_train_samples, recipe.seed) == (100, 3)


def test_everything_that_was_resolved_is_in_the_dictionary():
    values = load_recipe("distil-int8", ["stages.distill.epochs=2"]).to_dict()
    assert values["stages"]["distill"]["epochs"] == 2.0
    assert values["stages"]["distill"]["batch_size"] == 32


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    epochs: 2",
            "    epoch: 2",
            'mine.yaml, line 7: unknown key "epoch" in stages.finetune. Did you mean "epochs"?',
        ),
        ("max_length: 32", "max_lenght: 32", 'line 4: unknown key "max_lenght" in data. Did you mean "max_length"?'),
        ("seed: 7", "sed: 7", 'line 2: unknown key "sed". Did you mean "seed"?'),
        ("  distill:", "  distil:", 'line 9: there is no stage type "distil". Did you mean "distill"?'),
        ("epochs: 2", "epochs: two", "line 7: stages.finetune.epochs must be a number, not 'two'"),
        ("epochs: 2", "epochs: -2", "line 7: stages.finetune: epochs must be greater than 0 and finite, not -2"),
        ("epochs: 2", "epochs: .nan", "line 7: stages.finetune: epochs must be greater than 0 and finite, not nan"),
        (
            "teacher: finetune",
            "teacher: finetun",
            'line 10: stages.distill reads "finetun", which is no stage above it.',
        ),
        ("layers: [0, 2]", "layers: [0, a]", "line 11: stages.distill.layers must be"),
        ("layers: [0, 2]", "layers: 1.5", "line 11: stages.distill: layers must be a share between 0 and 1"),
        ("layers: [0, 2]", "layers: 0", "line 11: stages.distill: layers must be at least 1"),
        ("max_length: 32", "max_length: 0", "line 4: data: max_length must be at least 1"),
        ("seed: 7", "seed: seven", "line 2: seed must be a whole number"),
        ("seed: 7", "seed: 7\nseed: 8", 'line 3: the key "seed" is there twice'),
        ("seed: 7", "seed: [7", "this is not valid YAML"),
        ("  distill:", "  input:", 'line 9: "input" cannot name a stage'),
        ("  distill:", "  ../up:", 'line 9: "../up" cannot name a stage'),
    ],
)
def test_errors_name_the_line_and_the_nearest_key(tmp_path, old, new, message):
    assert GOOD.count(old) == 1
    with pytest.raises(FlexCompressError) as error:
        load_recipe(write(tmp_path, GOOD.replace(old, new)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.distil.epochs=2", 'the recipe has no stage "distil". Did you mean "distill"?'),
        ("stages.distill.epoch=2", 'unknown key "epoch" in stages.distill. Did you mean "epochs"?'),
        ("stages.distill.epochs=-1", "--set stages.distill.epochs=-1: stages.distill: epochs must be greater than 0"),
        ("stages.distill=2", "name the setting too"),
        ("stage.distill.epochs=2", 'unknown key "stage". Did you mean "stages"?'),
        ("stages.distill.epochs.x=2", "stages.distill.epochs is a value, not a group"),
        ("stages.distill.epochs", "write it as key=value"),
        ("stages.distill.epochs=[", "not valid YAML"),
        ("stages.quantize.mode=dynamc", "must be one of dynamic, static"),
    ],
)
def test_errors_of_overrides_quote_them(override, message):
    with pytest.raises(FlexCompressError) as error:
        load_recipe("distil-int8", [override])
    assert message in str(error.value)
    assert f"--set {override}" in str(error.value) or "stage." in override


def test_a_stage_can_only_read_what_stands_above_it(tmp_path):
    text = "stages:\n  distill: {teacher: finetune}\n  finetune: {}\n"
    with pytest.raises(FlexCompressError, match='reads "finetune", which is no stage above it'):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_without_settings_is_refused(text):
    with pytest.raises(FlexCompressError, match=r"x\.yaml must hold"):
        parse_document(text, "x.yaml")


def test_a_recipe_without_stages_is_refused(tmp_path):
    with pytest.raises(FlexCompressError, match="has no stages"):
        load_recipe(write(tmp_path, "seed: 1\n"))


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(FlexCompressError, match='Did you mean "distil-int8"'):
        load_recipe("distill-int8")


def test_missing_recipe_file(tmp_path):
    with pytest.raises(FlexCompressError, match="there is no recipe file"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_binary_recipe_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FlexCompressError, match="not UTF-8"):
        load_recipe(str(path))
