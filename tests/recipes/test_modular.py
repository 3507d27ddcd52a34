"""The stages of Modular Transformers, on a tiny model."""

from __future__ import annotations

import json

import pytest
import transformers

from optimum_flexcompress.architectures import describe
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation.assemblies import draw_against_ratio, draw_assemblies
from optimum_flexcompress.evaluation.report import Report
from optimum_flexcompress.methods.modular import MODULES_NAME, ModularModel
from optimum_flexcompress.methods.modular.strategies import choose
from optimum_flexcompress.recipes import load_recipe, run_recipe
from tests.methods.modular.helpers import deep
from tests.tasks.toys import word_tokenizer


SEQ2SEQ = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}
PAIRS = [("the film was good", "good"), ("bad plot", "bad"), ("anna lives in paris", "paris"), ("very good", "good")]
RECIPE = """\
data: {max_length: 24}
stages:
  finetune: {epochs: 1, batch_size: 16, arguments: {use_cpu: true, disable_tqdm: true}}
  modular:
    model: finetune
    epochs: 1
    batch_size: 16
    arguments: {use_cpu: true, disable_tqdm: true}
    modules: {granularities: [2, 4]}
  half: {type: assemble, model: modular, ratio: 2}
  quarter: {type: assemble, model: modular, ratio: 4}
"""


@pytest.fixture
def compress(tmp_path, model_folder, data_folder):
    """Runs a recipe given as text; returns the result and what was said."""

    def compress(text=RECIPE, *overrides):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        said = []
        result = run_recipe(
            load_recipe(str(file), overrides),
            str(model_folder),
            str(data_folder),
            "text-classification",
            tmp_path / "out",
            say=said.append,
        )
        return result, "\n".join(said)

    return compress


def test_one_training_gives_two_sizes(compress):
    result, said = compress()
    folder = result.folders["modular"]
    assert (folder / MODULES_NAME).is_file() and (folder / "assemblies.png").stat().st_size > 1000
    modular = ModularModel.from_pretrained(folder)
    assert modular.depths == {"encoder": 4} and modular.granularities == {"encoder": [2, 4]}
    for name, layers in (("half", 2), ("quarter", 1)):
        small = transformers.AutoModelForSequenceClassification.from_pretrained(result.folders[name])
        assert small.config.num_hidden_layers == layers
        assert (result.folders[name] / "tokenizer.json").is_file()
        assert f"# {name}\n" in (result.folders[name] / "README.md").read_text()
    assert "half: encoder: [0-1] [2-3]" in said
    assert result.metrics["half"]["ratio"] == 2


def test_a_plan_that_has_changed_is_assembled_anew(compress, tmp_path):
    plan = tmp_path / "plan.json"
    text = RECIPE[: RECIPE.index("  half:")] + f"  mine: {{type: assemble, model: modular, strategy: {plan}}}\n"
    for pieces, layers in (
        ([{"granularity": 2, "block": 0}, {"layer": 2}, {"layer": 3}], 3),
        ([{"granularity": 4, "block": 0}], 1),
    ):
        plan.write_text(json.dumps({"encoder": pieces}))
        result, _ = compress(text)
        small = transformers.AutoModelForSequenceClassification.from_pretrained(result.folders["mine"])
        assert small.config.num_hidden_layers == layers
    assert result.skipped == ["finetune", "modular"]
    assert compress(text)[0].skipped == ["finetune", "modular", "mine"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.quarter.ratio=5"], "ratio of 5 is out of reach"),
        (["stages.half.strategy=speed-first"], "this model has the encoder alone"),
        (["stages.half.model=finetune"], "trains no modules to assemble"),
        (["stages.modular.modules.granularities=[3]"], "which no granularity of 3 divides"),
        (["stages.modular.modules.initialization=frist"], 'Did you mean "first"'),
    ],
)
def test_what_will_fail_is_said_before_anything_runs(compress, tmp_path, overrides, message):
    with pytest.raises(FlexCompressError, match=message):
        compress(RECIPE, *overrides)
    assert not (tmp_path / "out" / "finetune").exists()


def test_the_recipe_that_comes_with_the_package():
    recipe = load_recipe("modular", [])
    types = [spec.type for spec in recipe.stages]
    assert types == ["finetune", "modular", "assemble", "assemble", "export", "quantize", "benchmark"]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_recipe_that_comes_with_the_package_on_an_encoder_decoder(tmp_path, family):
    deep(family, SEQ2SEQ[family]).save_pretrained(tmp_path / "model")
    word_tokenizer(cls_token="[CLS]", eos_token="[SEP]").save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"source": source, "target": target} for source, target in 4 * PAIRS]
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["data.max_length=12", "stages.finetune.epochs=1", "stages.modular.epochs=1"]
    settings += [
        f"stages.{stage}.arguments={{use_cpu: true, disable_tqdm: true}}" for stage in ("finetune", "modular")
    ]
    settings += ["stages.benchmark.rounds=3", "stages.benchmark.max_seconds=0.05", "stages.benchmark.stream_rows=2"]
    settings += ["stages.benchmark.memory=false", "stages.benchmark.batch_sizes=[1]"]
    result = run_recipe(
        load_recipe("modular", settings),
        str(tmp_path / "model"),
        str(tmp_path / "data"),
        "text2text-generation",
        tmp_path / "out",
        say=lambda line: None,
    )
    for name, layers in (("half", 3), ("third", 2)):
        small = transformers.AutoModelForSeq2SeqLM.from_pretrained(result.folders[name])
        assert {len(stack.layers) for stack in describe(small).stacks.values()} == {layers}
    report = Report.load(result.folders["benchmark"])
    assert [model.name for model in report.models] == ["finetune", "half", "third", "export", "quantize"]
    assert all("chrf" in model.metrics for model in report.models)


def test_pictures(tmp_path):
    depths, granularities = {"encoder": 12, "decoder": 12}, {"encoder": [2, 3, 4, 6], "decoder": [2, 3, 4, 6]}
    plans = {
        f"{strategy} {ratio}x": choose(strategy, ratio, depths, granularities).to_dict()
        for strategy in ("size-first", "speed-first")
        for ratio in (1.5, 3, 6)
    }
    draw_assemblies(plans, tmp_path / "assemblies.svg")
    text = (tmp_path / "assemblies.svg").read_text()
    assert text.count("<path") > sum(len(pieces) for plan in plans.values() for pieces in plan.values())
    lines = {"size-first": [(1, 3.0), (6, 9.0)], "speed-first": [(1, 3.0), (3, 5.0)]}
    assert draw_against_ratio({"PER %": lines, "ms": lines}, tmp_path / "ratio.png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assemblies.svg", "ratio.png"]
