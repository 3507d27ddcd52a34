"""Recipes that prune, from end to end on a tiny model, and the stage by itself."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from optimum_flexcompress import VIBPruningConfig
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import Report, open_artifact
from optimum_flexcompress.evaluation.pruning import PruningReport
from optimum_flexcompress.recipes import list_recipes, load_recipe, run_recipe
from optimum_flexcompress.structure import count_parameters
from optimum_flexcompress.trainer import FlexCompressTrainer


RECIPES = ["fast-vtrans", "faster-vtrans", "vtrans"]
STEPS = 40
# Masks of so small a model move in a few steps, and sizes have to be fine.
MASKS = ["mask_learning_rate=0.5", "align=1", "batch_size=8", "learning_rate=1e-3", f"max_steps={STEPS}"]
TIMING = ["rounds=3", "max_seconds=0.05", "stream_rows=4", "batch_sizes=[2]", "memory=false", "threads=1"]
QUICK = [
    "data.max_length=24",
    "stages.finetune.epochs=1",
    *(f"stages.prune.{setting}" for setting in MASKS),
    *(f"stages.benchmark.{setting}" for setting in TIMING),
]
PICTURES = {f"pruning_{name}.png" for name in ("attention", "curves", "heads", "sizes")}


@pytest.fixture(scope="module")
def compress(tmp_path_factory, model_folder, data_folder):
    def compress(recipe, *overrides, output=None, quick=QUICK):
        said = []
        result = run_recipe(
            load_recipe(str(recipe), [*quick, *overrides]),
            str(model_folder),
            str(data_folder),
            "text-classification",
            output or tmp_path_factory.mktemp("runs") / "out",
            say=said.append,
        )
        return result, "\n".join(said)

    return compress


@pytest.fixture(scope="module", params=RECIPES)
def result(request, compress):
    overrides = ["stages.prune.data_fraction=0.5"] if request.param != "vtrans" else []
    result, said = compress(request.param, *overrides)
    return SimpleNamespace(recipe=request.param, said=said, **vars(result))


def load(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def test_the_package_has_them():
    assert set(RECIPES) <= list_recipes().keys()


def test_the_pruned_model_has_the_size_that_was_asked_for(result):
    dense, pruned = (load(result.folders[name]) for name in ("finetune", "prune"))
    sparsity = 1 - count_parameters(pruned)["prunable"] / count_parameters(dense)["prunable"]
    wanted = 0.5 if result.recipe == "faster-vtrans" else 0.7
    assert sparsity == pytest.approx(wanted, abs=0.01 * (1 - wanted))
    metrics = result.metrics["prune"]
    assert metrics["sparsity"] == pytest.approx(sparsity) and metrics["parameters"] == pruned.num_parameters()
    assert 0 <= metrics["accuracy"] <= 1
    assert f"prune: {sparsity:.1%} of the parameters of the layers are gone; left are " in result.said


def test_what_was_removed_is_written_and_shown(result):
    files = {path.name for path in result.folders["prune"].iterdir()}
    assert files >= {"model.safetensors", "tokenizer.json", "pruning.json", "stage.json", *PICTURES}
    assert "training_args.bin" not in files
    report = PruningReport.load(result.folders["prune"])
    assert report.sparsity == pytest.approx(result.metrics["prune"]["sparsity"])
    assert report.attention["tokens"] > 100
    assert len(report.curves) == STEPS and report.curves[-1]["vib_target"] > 0.4
    page = (result.folders["benchmark"] / "report.html").read_text()
    assert "What was pruned: prune" in page and "heads that are left" in page


def test_export_and_int8_say_what_the_pruned_model_says(result):
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folders["export"])
    batch = tokenizer(["where is my card", "is the rate fair today or not"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = load(result.folders["prune"])(**batch).logits
    found = open_artifact(result.folders["export"], "text-classification").predict(batch)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    report = Report.load(result.folders["benchmark"])
    assert [model.name for model in report.models] == ["finetune", "prune", "export", "quantize"]
    assert report["prune"].parameters < report["finetune"].parameters


def test_masks_alone_leave_the_other_weights(result):
    """`faster` trains no weight: the classifier is that of the dense model, but for the dims that are gone."""
    dense, pruned = (load(result.folders[name]) for name in ("finetune", "prune"))
    weight, kept = dense.classifier.weight, pruned.classifier.weight
    same = {tuple(column.tolist()) for column in kept.T} <= {tuple(column.tolist()) for column in weight.T}
    assert same == (result.recipe == "faster-vtrans")


ALONE = """\
data: {max_length: 24}
stages:
  finetune: {epochs: 1, batch_size: 8}
  prune:
    target_sparsity: 0.6
    save_at_sparsities: [0.3, 0.6]
    align: 1
    mask_learning_rate: 0.5
    batch_size: 8
    max_steps: 40
    learning_rate: 1e-3
    # In the middle of an epoch Transformers does not find its way back into batches by length.
    group_by_length: false
    probe_samples: 8
    methods: {distillation: {}}
"""


@pytest.fixture
def alone(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(ALONE)
    return file


def test_several_sizes_from_one_run_that_was_interrupted(compress, alone, tmp_path, monkeypatch):
    whole, _ = compress(alone, quick=[], output=tmp_path / "whole")
    original = FlexCompressTrainer.training_step

    def interrupt(self, *args, **kwargs):
        if self.compression_config is not None and self.state.global_step == 22:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FlexCompressTrainer, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress(alone, quick=[], output=tmp_path / "out")
    resumed, said = compress(alone, quick=[], output=tmp_path / "out")
    assert "prune: going on from checkpoint-20" in said
    dense = count_parameters(load(whole.folders["finetune"]))["prunable"]
    for level in ("", "sparsity-0.3", "sparsity-0.6"):
        one, two = (load(run.folders["prune"] / level) for run in (whole, resumed))
        wanted = float(level.rpartition("-")[2] or 0.6)
        assert 1 - count_parameters(one)["prunable"] / dense == pytest.approx(wanted, abs=0.01 * (1 - wanted) + 1e-3)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(two.state_dict()[name], value)
        assert (whole.folders["prune"] / level / "tokenizer.json").is_file()
    curves = [PruningReport.load(run.folders["prune"]).curves for run in (whole, resumed)]
    assert [entry["step"] for entry in curves[0]] == [entry["step"] for entry in curves[1]]
    assert not (tmp_path / "out" / ".scratch").exists()


def test_every_setting_of_the_method_is_one_of_the_stage(alone):
    recipe = load_recipe(str(alone), ["stages.prune.kl_multipliers.ffn=2.0", "stages.prune.prune=[heads, ffn]"])
    settings = recipe.stages[1].stage.settings
    expected = VIBPruningConfig(
        target_sparsity=0.6,
        save_at_sparsities=[0.3, 0.6],
        align=1,
        mask_learning_rate=0.5,
        kl_multipliers={"ffn": 2.0},
        prune=["heads", "ffn"],
    )
    assert settings.method() == expected.to_dict()
    assert (settings.epochs, settings.max_steps) == (3.0, 40)
    assert recipe.stages[1].stage.inputs() == ["finetune"]


HALF = """\
data: {max_length: 24}
stages:
  finetune: {epochs: 8, batch_size: 8, learning_rate: 3e-3, attention_dropout: 0}
  # A rate at which nothing is learned.
  distill: {teacher: finetune, layers: 0.5, max_steps: 2, learning_rate: 10.0}
  depth: {type: keep, model: distill, instead: finetune}
  prune:
    model: depth
    target_sparsity: 0.75
    sparsity_of: finetune
    align: 1
    mask_learning_rate: 0.5
    batch_size: 8
    max_steps: 80
    probe_samples: 0
"""


@pytest.mark.parametrize(("max_drop", "layers", "gone"), [("100%", 2, 0.5), ("1%", 4, 0.75)])
def test_as_much_goes_whether_or_not_layers_went_before(compress, tmp_path, max_drop, layers, gone):
    file = tmp_path / "half.yaml"
    file.write_text(HALF)
    result, said = compress(file, f"stages.depth.max_drop={max_drop}", output=tmp_path / "out", quick=[])
    assert "pruning depth to sparsity 0.75 of finetune (vtrans)" in said
    dense, pruned = (load(result.folders[name]) for name in ("finetune", "prune"))
    assert len(pruned.bert.encoder.layer) == layers
    assert 1 - count_parameters(pruned)["prunable"] / count_parameters(dense)["prunable"] == pytest.approx(
        0.75, abs=0.01
    )
    # What the stage itself has taken away.
    assert result.metrics["prune"]["sparsity"] == pytest.approx(gone, abs=0.01)
    with pytest.raises(
        FlexCompressError, match="target_sparsity is 0.4 of finetune, of which depth has lost 0.5 alre"
    ):
        compress(file, "stages.prune.target_sparsity=0.4", output=tmp_path / "other", quick=[])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target_sparsity=1.5", r"stages\.prune: target_sparsity is 1.5: give a share between 0 and 1"),
        ("target_sparsity=null", r"stages\.prune: .* needs one target"),
        ("target_macs=0.5", r"stages\.prune: .* needs one target"),
        ("target_sparsty=0.5", 'unknown key "target_sparsty" in stages.prune. Did you mean "target_sparsity"'),
        ("mode=fastest", r'stages\.prune: mode is .fastest.. Did you mean "faster"'),
        ("save_at_sparsities=[0.9]", r"stages\.prune: save_at_sparsities has 0.9, beyond the target"),
        ("align=0", r"stages\.prune: align is 0: give an integer of at least 1"),
        ("probe_samples=-1", "probe_samples must be at least 0"),
        ("methods.vib_pruning.beta=1", "methods has vib_pruning: its settings stand beside methods"),
        ("methods.distillation.temprature=2", 'stages.prune: .*Did you mean "temperature"'),
        ("methods.distilation.temperature=2", 'stages.prune: .*Did you mean "distillation"'),
        ("sparsity_of=finetune", "sparsity_of goes with target_sparsity alone: leave it out, or save_at_sparsities"),
        ("align=32", r"stages\.prune: A sparsity of 0.6 cannot be reached with align=32 .*: the nearest is"),
        ("teacher=finetun", 'reads "finetun", which is no stage above it. Did you mean "finetune"'),
        ("max_steps=15", "The masks get .* steps, too few to move: .* train for at least"),
    ],
)
def test_bad_settings_are_one_sentence(compress, alone, tmp_path, override, message):
    with pytest.raises(FlexCompressError, match=message) as caught:
        compress(alone, f"stages.prune.{override}", quick=[], output=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "prune").exists()


@pytest.mark.parametrize("target", ["target_macs: 0.5", "target_latency: 1000"])
def test_targets_that_need_the_model_to_run(compress, alone, tmp_path, target):
    alone.write_text(alone.read_text().replace("target_sparsity: 0.6\n", f"{target}\n    sequence_length: 16\n"))
    # The check is what is looked at: it has no weights to run.
    message = "takes .* ms by the table" if "latency" in target else "save_at_sparsities has 0.6, beyond the target"
    with pytest.raises(FlexCompressError, match=message):
        compress(alone, quick=[], output=tmp_path / "out")


def test_without_a_teacher_and_without_probing(compress, alone):
    result, _ = compress(alone, "stages.prune.methods={}", "stages.prune.probe_samples=0", quick=[])
    config = json.loads((result.folders["prune"] / "flexcompress_config.json").read_text())
    assert [method["method_type"] for method in config["methods"]] == ["vib_pruning"]
    assert PruningReport.load(result.folders["prune"]).attention is None
    assert not list(result.folders["prune"].glob("*.png"))
