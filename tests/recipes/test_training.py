"""The stages that train, on a tiny model: what they write, and that an interruption costs nothing but time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.recipes import dropout as dropouts
from optimum_flexcompress.recipes import load_recipe, run_recipe
from optimum_flexcompress.recipes.allocator import keeps_freed_memory
from optimum_flexcompress.recipes.stages.training import usual_learning_rate
from optimum_flexcompress.structure import ModelStructure
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.trainer import FlexCompressTrainer


RECIPE = """\
data: {max_length: 24}
stages:
  finetune: {epochs: 2, batch_size: 8, learning_rate: 1e-3, arguments: {use_cpu: true, disable_tqdm: true}}
  distill:
    teacher: finetune
    layers: 2
    epochs: 2
    batch_size: 8
    learning_rate: 1e-3
    arguments: {use_cpu: true, disable_tqdm: true}
    methods: {distillation: {hidden_states_weight: 1.0}}
"""
# 48 training rows in batches of 8.
STEPS_PER_EPOCH = 6


@pytest.fixture
def compress(tmp_path, model_folder, data_folder):
    """Runs a recipe given as text; returns the result and what was said."""

    def compress(text=RECIPE, *overrides, output="out", model=model_folder, data=data_folder):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        said = []
        result = run_recipe(
            load_recipe(str(file), overrides),
            str(model),
            str(data),
            "text-classification",
            tmp_path / output,
            say=said.append,
        )
        return result, "\n".join(said)

    return compress


def weights(folder):
    return load_file(folder / "model.safetensors")


def load(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_learning_rate_that_is_left_out_goes_by_the_width(compress, model_folder):
    width = transformers.AutoConfig.from_pretrained(model_folder).hidden_size
    said = compress(RECIPE.replace("learning_rate: 1e-3, ", ""), "stages.distill.max_steps=1")[1]
    assert f"finetune: learning rate 0.0002, for a model of {width} dims" in said
    assert "distill: learning rate" not in said
    assert (usual_learning_rate(512), usual_learning_rate(768)) == (2e-4, 5e-5)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerators have a fast dropout of their own")
def test_dropout_is_fast_while_a_cpu_trains(compress, monkeypatch):
    calls = []
    monkeypatch.setattr(dropouts, "dropout", lambda values, p: calls.append(p) or values * 1)
    compress(RECIPE, "stages.finetune.max_steps=2", "stages.distill.skip=true")
    # Embeddings and, in each of four layers, attention maps and two outputs; then the head. Twice.
    assert len(calls) == 2 * (1 + 4 * 3 + 1) and set(calls) == {0.1}


@pytest.mark.skipif(not keeps_freed_memory(), reason="attention is plain only where freed memory can be kept")
def test_attention_is_plain_where_a_cpu_trains_with_bfloat16_or_dropout(compress, model_folder):
    def attention(*settings):
        recipe = load_recipe("distil-int8", [f"stages.finetune.{setting}" for setting in settings])
        context = SimpleNamespace(task=get_task("text-classification"))
        return recipe.stages[0].stage.load_for_training(context, model_folder).config._attn_implementation

    assert transformers.AutoConfig.from_pretrained(model_folder).attention_probs_dropout_prob > 0
    assert attention() == attention("attention_dropout=0.2") == "eager"
    assert attention("attention_dropout=0") == "sdpa"
    assert attention("attention_dropout=0", "arguments={bf16: true}") == "eager"
    result, _ = compress(RECIPE, "stages.finetune.arguments={bf16: true}", "stages.finetune.max_steps=2")
    # It is how the model is trained, and none of its properties.
    assert load(result.folders["finetune"]).config._attn_implementation == "sdpa"


def test_writes_a_teacher_and_a_smaller_student(compress):
    result, said = compress()
    teacher, student = load(result.folders["finetune"]), load(result.folders["distill"])
    assert (teacher.config.num_hidden_layers, student.config.num_hidden_layers) == (4, 2)
    assert student.config.id2label == teacher.config.id2label
    assert sorted(student.config.label2id) == ["card_arrival", "exchange_rate", "lost_or_stolen_card", "top_up_failed"]
    for name in ("finetune", "distill"):
        assert 0 <= result.metrics[name]["accuracy"] <= 1
        files = {path.name for path in result.folders[name].iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "stage.json"} <= files
        assert not {"training_args.bin", "optimizer.pt"} & files
    assert result.metrics["distill"]["parameters"] == student.num_parameters()
    assert not (result.output / ".scratch").exists()


def test_the_same_seed_gives_the_same_models(compress):
    first, _ = compress(output="first")
    second, _ = compress(output="second")
    other, _ = compress(RECIPE, "seed=1", output="other")
    for name in ("finetune", "distill"):
        one, two = weights(first.folders[name]), weights(second.folders[name])
        assert all(torch.equal(one[key], two[key]) for key in one)
    changed = weights(other.folders["finetune"])
    assert any(not torch.equal(value, changed[key]) for key, value in weights(first.folders["finetune"]).items())


@pytest.mark.parametrize("stage", ["finetune", "distill"])
@pytest.mark.parametrize("step", [1, 7])
def test_interrupted_and_resumed_equals_uninterrupted(compress, monkeypatch, stage, step):
    whole, _ = compress(output="whole")

    original = FlexCompressTrainer.training_step

    def interrupt(self, *args, **kwargs):
        distilling = self.compression_config is not None
        if distilling == (stage == "distill") and self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    every_third_step = f"stages.{stage}.arguments.save_steps=3"
    with monkeypatch.context() as patch:
        patch.setattr(FlexCompressTrainer, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress(RECIPE, every_third_step)
    resumed, said = compress(RECIPE, every_third_step)
    assert ("going on from checkpoint-6" in said) == (step == 7)
    assert resumed.skipped == (["finetune"] if stage == "distill" else [])
    for name in ("finetune", "distill"):
        one, two = weights(whole.folders[name]), weights(resumed.folders[name])
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_a_checkpoint_that_was_cut_off_is_passed_over(compress, monkeypatch, tmp_path):
    original = FlexCompressTrainer.training_step

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    every_third_step = "stages.finetune.arguments.save_steps=3"
    with monkeypatch.context() as patch:
        patch.setattr(FlexCompressTrainer, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress(RECIPE, every_third_step)
    (tmp_path / "out" / ".scratch" / "finetune" / "checkpoint-6" / "trainer_state.json").write_text('{"global')
    assert "going on from checkpoint-3" in compress(RECIPE, every_third_step)[1]


def test_checkpoints_of_other_settings_are_not_used(compress, monkeypatch):
    original = FlexCompressTrainer.training_step

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FlexCompressTrainer, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress()
    assert "going on from" not in compress(RECIPE, "stages.finetune.learning_rate=2e-3")[1]


def test_a_model_trained_for_the_task_is_taken_as_it_is(compress):
    first, _ = compress(output="first")
    trained = first.folders["finetune"]
    result, said = compress(model=trained)
    assert "is trained for the task already" in said
    one, two = weights(trained), weights(result.folders["finetune"])
    assert all(torch.equal(one[key], two[key]) for key in one)
    again, said = compress(RECIPE, "stages.finetune.skip_if_trained=false", model=trained, output="again")
    assert "is trained for the task already" not in said
    assert "skipped" not in again.metrics["finetune"]


def test_a_head_for_other_labels_is_replaced(compress, tmp_path):
    first, _ = compress(output="first")
    (tmp_path / "other.csv").write_text("text,label\n" + "my card is lost,yes\nwhere is it,no\n" * 8)
    result, said = compress(model=first.folders["finetune"], data=tmp_path / "other.csv")
    assert "so it gets a new head" in said
    assert load(result.folders["distill"]).config.label2id == {"no": 0, "yes": 1}


@pytest.mark.parametrize(("count", "fits"), [(4, True), (2, False), (6, False)])
def test_a_head_without_class_names_fits_by_their_number(compress, data_folder, model_folder, tmp_path, count, fits):
    from optimum_flexcompress.recipes.planner import measure
    from tests.tiny import build

    sizes = {"vocab_size": 400, "num_hidden_layers": 2, "num_labels": count}
    build("bert", "BertForSequenceClassification", **sizes).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    alone = RECIPE[: RECIPE.index("  distill:")]
    result, said = compress(alone, model=tmp_path / "model")
    assert ("is trained for the task already" in said) == fits == ("so it gets a new head" not in said)
    assert load(result.folders["finetune"]).config.num_labels == 4
    # The forecast says the same.
    recipe = load_recipe("full", ["stages.benchmark.threads=1", "data.max_length=16"])
    given = (str(tmp_path / "model"), str(data_folder), "text-classification")
    assert measure(recipe, *given, lambda line: None)[0].trained == fits


def test_training_arguments_that_the_trainer_refuses(compress):
    with pytest.raises(FlexCompressError, match="the training settings of finetune do not work: .*no_such_service"):
        compress(RECIPE, "stages.finetune.arguments.report_to=no_such_service")


def test_body_first_then_head(compress):
    """The shape of `minilm-int8`: a body without a head, then a student that starts from it."""
    text = (
        RECIPE.replace("  distill:\n    teacher: finetune", "  distill:\n    teacher: input\n    head: false")
        .replace("{distillation: {hidden_states_weight: 1.0}}", "{minilm: {task_loss_weight: 0.0}}")
        .replace("  distill:", "  body:\n    type: distill")
    )
    arguments = "arguments: {use_cpu: true, disable_tqdm: true}"
    text += f"  distill: {{teacher: finetune, model: body, epochs: 1, batch_size: 8, {arguments}}}\n"
    result, _ = compress(text)
    body = transformers.AutoModel.from_pretrained(result.folders["body"])
    student = load(result.folders["distill"])
    assert body.config.num_hidden_layers == student.config.num_hidden_layers == 2
    assert "accuracy" in result.metrics["distill"] and "accuracy" not in result.metrics["body"]


def test_a_share_of_the_layers(compress):
    result, _ = compress(RECIPE, "stages.distill.layers=0.25")
    assert load(result.folders["distill"]).config.num_hidden_layers == 1


def test_a_structure_file(compress, model_folder, tmp_path):
    structure = ModelStructure.of(transformers.AutoModel.from_pretrained(model_folder)).to_dict()
    for layer in structure["stacks"]["encoder"]["layers"]:
        layer["ffn"] = 16
    file = tmp_path / "small.json"
    import json

    file.write_text(json.dumps(structure))
    result, _ = compress(RECIPE, "stages.distill.layers=null", f"stages.distill.structure={file}")
    student = load(result.folders["distill"])
    assert {layer.ffn for layer in ModelStructure.of(student).stacks["encoder"].layers} == {16}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.distill.layers=9", "stages.distill: .* keep between 1 and 4"),
        ("stages.distill.layers=[0, 7]", "stages.distill: "),
        ("stages.distill.methods.distillation.temprature=3", 'Did you mean "temperature"?'),
        ("stages.distill.methods.distilation.temperature=3", 'Did you mean "distillation"?'),
        ("stages.distill.arguments.learning_rat=3", 'Did you mean "learning_rate"?'),
        ("stages.distill.arguments.output_dir=x", "the recipe takes care of it"),
        ("stages.distill.methods.minilm.relation_heads=7", "stages.distill: 7 relation heads do not divide"),
        ("stages.distill.methods.minilm.teacher_layer=5", "stages.distill: .* has 4 layers"),
        ("stages.distill.scheduler=linaer", 'Did you mean "linear"?'),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(compress, tmp_path, override, message):
    with pytest.raises(FlexCompressError, match=message):
        compress(RECIPE, override)
    assert not (tmp_path / "out").exists()


def test_a_student_that_is_bigger_than_its_teacher(compress, tmp_path):
    text = RECIPE.replace("layers: 2", "layers: 1").replace("  distill:", "  small:\n    type: distill")
    text += "  distill: {teacher: small, model: finetune}\n"
    with pytest.raises(FlexCompressError, match=r"stages\.distill: The student is bigger than its teacher"):
        compress(text)
    assert not (tmp_path / "out").exists()


def test_an_export_cannot_teach(compress, tmp_path):
    with pytest.raises(FlexCompressError, match=r'stages\.again: "export" leaves no PyTorch model'):
        compress(RECIPE + "  export: {}\n  again: {type: distill, teacher: export}\n")
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_a_training_split(compress, data_folder, tmp_path):
    with pytest.raises(FlexCompressError, match="needs a training split"):
        compress(data=data_folder / "test.csv")
    assert not (tmp_path / "out").exists()


def test_a_killed_command_goes_on(tmp_path, model_folder, data_folder):
    """The command line from end to end: a process that is interrupted, and one that finishes its work."""
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE.replace("{epochs: 2,", "{epochs: 200, checkpoints: 100,", 1))
    command = [str(Path(sys.executable).with_name("optimum-cli")), "flexcompress", "compress", "-m", str(model_folder)]
    command += ["--dataset", str(data_folder), "--task", "text-classification", "--recipe", str(file), "-o", "out"]
    options = {"cwd": tmp_path, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}

    def listen():
        # Shells start what runs in the background deaf to interrupts.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen, **options)
    states = tmp_path / "out" / ".scratch" / "finetune"
    deadline = time.monotonic() + 120
    while not any(states.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted: stages that finished are kept; run the same command again" in stderr
    assert "Traceback" not in stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".scratch", "run.json"]

    done = subprocess.run(command, capture_output=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert "finetune: going on from checkpoint-" in done.stdout
    assert (tmp_path / "out" / "distill" / "model.safetensors").is_file()
