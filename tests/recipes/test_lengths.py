"""Recipes that let an encoder drop tokens, from end to end on a tiny model, and their stages one by one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict

from optimum_flexcompress import FlexCompressConfig, LengthConfig, set_lengths
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import Report, TokenTrace, open_artifact
from optimum_flexcompress.recipes import list_recipes, load_recipe, run_recipe
from optimum_flexcompress.recipes.inputs import open_data
from optimum_flexcompress.recipes.stages import DataSettings
from optimum_flexcompress.search import Front
from optimum_flexcompress.search.length_scoring import LengthScorer
from optimum_flexcompress.tasks import get_task


TRAINED = {"length-adaptive": ["finetune", "adapt"], "quala-minilm": ["finetune", "minilm", "distill", "adapt"]}
TEXTS = ["where is my card", "is the exchange rate fair today or not", "my top up failed"]
# 48 training rows, of which a fifth is held out.
HELD_OUT = 9


def quick(recipe):
    training = [setting for stage in TRAINED[recipe] for setting in (f"{stage}.epochs=1", f"{stage}.batch_size=8")]
    search = ["search.population=4", "search.trials=8", "pick.max_cost=80%"]
    # Fused graphs have tests of their own, and take their time.
    graphs = ["int8-full.options={fuse: false}", "int8.options={fuse: false}"]
    timing = ["rounds=3", "max_seconds=0.05", "stream_rows=4", "batch_sizes=[2]", "memory=false", "threads=1"]
    settings = [*training, *search, *graphs, *(f"benchmark.{setting}" for setting in timing)]
    return ["data.max_length=24", *(f"stages.{setting}" for setting in settings)]


@pytest.fixture(scope="module")
def compress(tmp_path_factory, model_folder, data_folder):
    def compress(recipe, *overrides, output=None, model=model_folder, data=data_folder):
        said = []
        result = run_recipe(
            load_recipe(recipe, [*(quick(recipe) if recipe in TRAINED else []), *overrides]),
            str(model),
            str(data),
            "text-classification",
            output or tmp_path_factory.mktemp("runs") / "out",
            say=said.append,
        )
        return result, "\n".join(said)

    return compress


@pytest.fixture(scope="module")
def length_adaptive(compress):
    return compress("length-adaptive")[0]


@pytest.fixture(scope="module", params=sorted(TRAINED))
def result(request, compress):
    """What each recipe leaves."""
    name = request.param
    run = request.getfixturevalue("length_adaptive") if name == "length-adaptive" else compress(name)[0]
    return SimpleNamespace(recipe=name, **vars(run))


def test_they_are_listed():
    assert list_recipes().keys() >= TRAINED.keys()


def test_the_pick_flows_into_the_graphs(result):
    pick = Front.load(result.folders["pick"]).picked.lengths
    configs = {
        name: json.loads((result.folders[name] / "config.json").read_text()).get("length_config")
        for name in ("adapt", "export-full", "int8-full", "export", "int8")
    }
    assert configs["export"] == configs["int8"] == pick.to_dict()
    assert configs["adapt"] is configs["export-full"] is configs["int8-full"] is None
    assert pick.unit == "fractions" and min(pick.values) < 1


def test_the_graphs_say_what_the_model_says(result):
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folders["adapt"])
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(result.folders["adapt"]).eval()
    for name, lengths in (("export-full", None), ("export", Front.load(result.folders["pick"]).picked.lengths)):
        set_lengths(model, lengths)
        with torch.no_grad():
            expected = model(**batch).logits.numpy()
        found = open_artifact(result.folders[name], "text-classification").predict(batch)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_search_scores_on_what_was_held_out(result):
    front = Front.load(result.folders["search"])
    assert len(front.scored) == 8 and front.picked is None
    assert f"all {HELD_OUT} examples" in front.options["examples"]
    names = {path.name for path in result.folders["search"].iterdir()}
    assert {"front.json", "front.png", "stage.json"} <= names and "search.db" not in names
    assert not (result.output / ".scratch").exists()


def test_the_report_shows_what_lengths_gain(result):
    report = Report.load(result.folders["benchmark"])
    pick = Front.load(result.folders["pick"]).picked.lengths
    assert [model.name for model in report.models if model.lengths] == ["int8"]
    assert report["int8"].lengths["config"] == pick.to_dict()
    assert report["int8"].macs["24"] < report["int8-full"].macs["24"]
    assert [row[:2] for row in report.length_rows()[1]] == [["int8", "int8-full"]]
    trace = TokenTrace.from_dict(report["int8"].words)
    assert trace.traced_in == "adapt" and trace.counts == pick.at(trace.tokens)
    page = (result.folders["benchmark"] / "report.html").read_text()
    assert "What dropping tokens gains" in page and "Which words survive to which layer" in page


def test_the_model_card_of_what_was_adapted(result):
    config = FlexCompressConfig.from_pretrained(result.folders["adapt"])
    methods = [method.method_type for method in config.methods]
    assert methods == (
        ["length_adaptive"] if result.recipe == "length-adaptive" else ["length_adaptive", "distillation"]
    )
    assert 0 <= result.metrics["adapt"]["accuracy"] <= 1


SEARCH = """\
data: {max_length: 24}
stages:
  search: {model: input, trials: 5, population: 3, samples: 8}
  pick: {max_cost: 0.8}
  export: {model: input, lengths: pick, fuse: false}
"""


@pytest.fixture
def search(compress, length_adaptive, tmp_path):
    """Runs a recipe that searches, picks and exports what another one has trained."""
    file = tmp_path / "search.yaml"
    file.write_text(SEARCH)

    def search(*overrides, output="out"):
        adapted = length_adaptive.folders["adapt"]
        return compress(str(file), *overrides, model=adapted, output=tmp_path / output)

    return search


def test_another_limit_keeps_the_search(search, tmp_path):
    first, _ = search()
    cost = Front.load(first.folders["pick"]).picked.relative_cost
    with pytest.raises(FlexCompressError, match=r"No configuration of the front is as cheap as asked: the cheapest"):
        search("stages.pick.max_cost=0.01")
    # What the first run left is still there.
    assert Front.load(first.folders["pick"]).picked.relative_cost == cost
    result, said = search("stages.pick.max_drop=100%", "stages.pick.max_cost=null")
    assert result.skipped == ["search"]
    assert "pick: choosing lengths from the front of search" in said
    front = Front.load(result.folders["pick"])
    assert front.picked == front.points[0] and front.asked == {"max_drop": 1.0}


def test_an_interrupted_search_goes_on(search, tmp_path, monkeypatch):
    whole, _ = search(output="whole")
    original, scored = LengthScorer.__call__, []

    def interrupt(self, candidate):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(candidate)
        return original(self, candidate)

    with monkeypatch.context() as patch:
        patch.setattr(LengthScorer, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            search()
    # No stage has finished, and yet there is something to go on from.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".scratch", "run.json"]
    resumed, said = search()
    assert "search: 3 configurations were scored before" in said
    fronts = [Front.load(run.folders["search"]) for run in (whole, resumed)]
    assert [point.candidate for point in fronts[0].scored] == [point.candidate for point in fronts[1].scored]
    assert [point.metric for point in fronts[0].points] == [point.metric for point in fronts[1].points]


def test_lengths_by_hand(compress, length_adaptive, tmp_path):
    file = tmp_path / "by-hand.yaml"
    file.write_text(
        "data: {max_length: 24}\n"
        "stages:\n"
        "  export: {model: input, lengths: [16, 12, 8, 4], fuse: false}\n"
        "  static: {type: quantize, model: export, mode: static, calibration_samples: 8}\n"
    )
    result, said = compress(str(file), model=length_adaptive.folders["adapt"])
    for name in ("export", "static"):
        config = json.loads((result.folders[name] / "config.json").read_text())
        assert config["length_config"]["counts"] == [16, 12, 8, 4]
    assert "exporting input to ONNX, lengths [16, 12, 8, 4]" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapt.methods={distillation: {}}", r"stages\.adapt: methods lacks length_adaptive: add it"),
        ("adapt.teacher=finetune", "stages.adapt: teacher teaches nothing: add distillation"),
        ("adapt.methods.distillation={}", "stages.adapt: .*teacher"),
        ("adapt.methods.length_adaptive.length_drp=0.1", 'stages.adapt: .*Did you mean "length_drop"'),
        ("adapt.methods.length_adaptive.length_drop=1.5", "stages.adapt: length_adaptive.length_drop is 1.5"),
        ("search.trials=0", r"stages\.search: trials must be at least 1"),
        ("search.objective=flops", "stages.search.objective must be one of macs, latency"),
        ("search.model=export", 'reads "export", which is no stage above it'),
        ("pick.front=adapt", 'stages.pick: front names "adapt", which is no stage of the type search'),
        ("pick.max_drop=2", "stages.pick: max_drop is 2.0: give a share between 0 and 1"),
        ("pick.max_latency=5", "stages.pick: max_latency needs measured latencies"),
        ("export.lengths=search", 'stages.export: lengths names "search", which is no stage of the type pick'),
        ("export.lengths=[8, 6, 4]", "stages.export: The lengths are for 3 layers, the encoder .* has 4"),
        ("export.lengths=[8, 9, 4, 2]", "stages.export: The length of layer 1 is 9, more than the 8"),
        ("export.lengths=[8, 4, 2, 0]", "stages.export: The length of layer 3 is 0"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(compress, tmp_path, override, message):
    with pytest.raises(FlexCompressError, match=message):
        compress("length-adaptive", f"stages.{override}", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_minilm_with_one_fixed_configuration(compress, tmp_path):
    methods = "{length_adaptive: {lengths: [8, 6, 4, 2]}, minilm: {}}"
    with pytest.raises(FlexCompressError, match=r"stages\.adapt: minilm compares .* distil first and set the lengths"):
        compress("length-adaptive", "stages.adapt.teacher=finetune", f"stages.adapt.methods={methods}",
                 output=tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_decoders_are_told_why(tmp_path, model_folder, data_folder, compress):
    from tests.tiny import build

    build("gpt2", "GPT2Model", vocab_size=400).save_pretrained(tmp_path / "gpt2")
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(FlexCompressError, match=r"stages\.adapt: .* is a decoder, which cannot drop tokens: every"):
        compress("length-adaptive", model=tmp_path / "gpt2", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_training_examples(compress, data_folder, tmp_path):
    file = data_folder / "test.csv"
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.csv").write_bytes(file.read_bytes())
    with pytest.raises(FlexCompressError, match="has no training split, of which the recipe holds out examples"):
        compress("length-adaptive", data=data, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestHoldingOut:
    """Which examples the search sees, and that nothing trains on them."""

    @staticmethod
    def folder(tmp_path, **rows):
        splits = {
            name: Dataset.from_dict(
                {"text": [f"{name} {row}" for row in range(count)], "label": ["a", "b"] * (count // 2)}
            )
            for name, count in rows.items()
        }
        DatasetDict(splits).save_to_disk(tmp_path / "data")
        return str(tmp_path / "data")

    @staticmethod
    def opened(data, held_out, **settings):
        said = []
        task = get_task("text-classification")
        inputs = open_data(task, data, DataSettings(**settings), 42, said.append, held_out=held_out)
        texts = {name: list(split["text"]) for name, split in inputs.data.items()}
        return texts, None if inputs.held_out is None else list(inputs.held_out["text"]), said

    def test_from_training(self, tmp_path):
        data = self.folder(tmp_path, train=100, test=10)
        texts, held_out, said = self.opened(data, 12)
        assert len(held_out) == 12 and len(texts["train"]) == 88 and not set(held_out) & set(texts["train"])
        assert "12 of the 100 training examples are held out" in said[0]
        assert self.opened(data, 12)[1] == held_out and self.opened(data, 0)[1] is None
        # At most a fifth.
        assert len(self.opened(data, 1000)[1]) == 20

    def test_splits_without_labels_are_left_out(self, tmp_path):
        """As in GLUE, whose test splits have the label -1, and in competitions, whose have none."""
        labelled = {"text": [f"row {row}" for row in range(20)], "label": [0, 1] * 10}
        blind = {"text": ["what"] * 5}
        for name, test in (("glue", {**blind, "label": [-1] * 5}), ("kaggle", blind)):
            splits = {"validation": labelled, "test": test} if name == "glue" else {"test": test}
            data = {"train": labelled, **splits}
            DatasetDict({split: Dataset.from_dict(rows) for split, rows in data.items()}).save_to_disk(tmp_path / name)
        texts, held_out, said = self.opened(str(tmp_path / "glue"), 4)
        assert set(texts) == {"train", "validation"} and len(texts["validation"]) == 20 and len(held_out) == 4
        assert "the split test of" in said[0] and "has no labels and is left out" in said[0]
        # Nothing is left to report on but a part of what there is to train on.
        texts, _, said = self.opened(str(tmp_path / "kaggle"), 0)
        assert not set(texts["train"]) & set(texts["test"]) and len(texts["train"]) + len(texts["test"]) == 20
        assert "has no split to evaluate on" in said[1]

    def test_beside_those_that_are_trained_on(self, tmp_path):
        texts, held_out, _ = self.opened(self.folder(tmp_path, train=100, test=10), 12, max_train_samples=50)
        assert (len(texts["train"]), len(held_out)) == (50, 12) and not set(held_out) & set(texts["train"])

    def test_from_validation_beside_a_test_split(self, tmp_path):
        texts, held_out, said = self.opened(self.folder(tmp_path, train=20, validation=10, test=10), 6)
        assert len(held_out) == 6 and all(text.startswith("validation") for text in held_out)
        assert len(texts["train"]) == 20 and said == []

    def test_validation_alone_is_for_the_report(self, tmp_path):
        texts, held_out, _ = self.opened(self.folder(tmp_path, train=20, validation=10), 4)
        assert all(text.startswith("train") for text in held_out) and len(texts["train"]) == 16

    def test_too_few(self, tmp_path):
        with pytest.raises(FlexCompressError, match="4 training examples, too few"):
            self.opened(self.folder(tmp_path, train=4, test=4), 4)


def test_lengths_are_read_as_the_package_reads_them():
    recipe = load_recipe("length-adaptive", ["stages.export.lengths=[1.0, 0.5]"])
    settings = next(spec.stage.settings for spec in recipe.stages if spec.name == "export")
    assert LengthConfig.parse(settings.lengths).unit == "fractions"
