"""Whole recipes and searches that end on the Hub: what is pushed, what its card says, and how a push is made up for."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from optimum_flexcompress.evaluation import Report
from tests.recipes.conftest import data_folder, model_folder  # noqa: F401  fixtures
from tests.tasks.toys import word_tokenizer
from tests.tiny import build


QUICK = {
    "data.max_length": "24",
    "stages.finetune.epochs": "1",
    "stages.distill.epochs": "1",
    "stages.benchmark.rounds": "3",
    "stages.benchmark.max_seconds": "0.1",
    "stages.benchmark.stream_rows": "4",
    "stages.benchmark.batch_sizes": "[2]",
    "stages.benchmark.memory": "false",
    "stages.benchmark.threads": "1",
}


@pytest.fixture(scope="module")
def compress(client, tmp_path_factory, model_folder, data_folder):  # noqa: F811
    """The command, on a model whose card names its licence and what it was made from."""
    root = tmp_path_factory.mktemp("compress")
    model = root / "model"
    shutil.copytree(model_folder, model)
    (model / "README.md").write_text("---\nlicense: mit\nbase_model: bob/pretrained\n---\n\n# Fine-tuned\n")
    settings = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
    arguments = ["-m", model, "--dataset", data_folder, "--task", "text-classification", "-o", root / "out"]
    arguments += ["--recipe", "distil-int8", *settings]

    def compress(*more, **options):
        return client.cli("compress", *arguments, *more, **options)

    compress.folder = root / "out"
    return compress


def test_a_recipe_that_cannot_push_in_the_end_pushes_when_it_is_run_again(hub, compress):
    options = ["--push-to-hub", "--hub-model-id", "analysts/student-int8"]
    hub.break_at = ("POST", "/api/models/analysts/student-int8/commit")
    try:
        code, _, err = compress(*options, impatient=True)
    finally:
        hub.break_at = None
    assert code == 1 and "analysts/student-int8 was not pushed: the connection to the Hub failed" in err
    assert set(hub.files("analysts/student-int8")) == {".gitattributes"}
    code, out, _ = compress(*options)
    assert code == 0 and out.count("finished in an earlier run, skipped") == 5
    assert "Pushed quantize to analysts/student-int8" in out
    files = hub.files("analysts/student-int8")
    assert {"model.onnx", "config.json", "tokenizer.json", "README.md"} <= set(files) and "stage.json" not in files

    report = Report.load(compress.folder / "benchmark")
    card = ModelCard(files["README.md"].decode())
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == report["quantize"].metrics
    assert (card.data.license, card.data.base_model) == ("mit", "bob/pretrained")
    assert card.data.tags == ["optimum-flexcompress", "distillation", "int8", "onnx"]
    for words in (
        "| accuracy | ",
        "before (`finetune`) | this model (`quantize`)",
        "| time, 2x24 | ",
        " faster) |",
        "| weights on disk | ",
        report.environment["cpu"],
        f"onnxruntime {report.environment['versions']['onnxruntime']}",
        "3. `export`: exporting distill to ONNX",
        'from_pretrained("analysts/student-int8")',
    ):
        assert words in card.text, words


def test_another_stage_can_be_pushed(hub, compress):
    code, out, err = compress("--push-to-hub", "--hub-stage", "distill", "--hub-model-id", "student", "--json")
    assert code == 0 and "Pushed distill to ada/student" in err
    pushed = json.loads(out)["pushed"]
    assert (pushed["stage"], pushed["repository"]) == ("distill", "ada/student")
    assert pushed["url"].startswith(f"{hub.url}/ada/student/commit/")
    card = ModelCard(hub.files("ada/student")["README.md"].decode())
    assert card.data.library_name == "transformers" and "loads in Transformers without any plugin" in card.text
    # What was fine-tuned and no more has no card of ours.
    assert not (compress.folder / "finetune" / "README.md").exists()


def test_a_recipe_starts_from_an_id(hub, client, compress, data_folder, tmp_path):  # noqa: F811
    (tmp_path / "export.yaml").write_text("stages:\n  finetune: {}\n  export: {model: finetune}\n")
    options = ["--dataset", data_folder, "--task", "text-classification", "--recipe", tmp_path / "export.yaml"]
    code, out, err = client.cli("compress", "-m", "ada/student", *options, "-o", tmp_path / "out", "--push-to-hub")
    assert code == 0, err
    assert "ada/student is trained for the task already" in out and "Pushed export to ada/out" in out
    card = ModelCard(hub.files("ada/out")["README.md"].decode())
    assert card.data.base_model == "ada/student" and card.data.license == "mit"
    assert card.data.tags == ["optimum-flexcompress", "distillation", "onnx"]


@pytest.mark.parametrize("options", [["--recipe", "distil-int8"], ["--dry-run"]])
def test_a_model_that_is_not_on_the_hub_is_missed_before_the_data(client, tmp_path, options):
    more = ["--dataset", tmp_path / "nothing.csv", "--task", "text-classification", "-o", tmp_path / "none"]
    code, _, err = client.cli("compress", "-m", "ada/nothing", *more, *options)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert code == 1 and "There is no folder ada/nothing here, and no model of that name on the Hub" in line
    assert err.rstrip().endswith(line) and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("stage", "message"), [("quantise", 'Did you mean "quantize"?'), ("benchmark", "that makes a model")]
)
def test_a_stage_that_makes_no_model(compress, stage, message):
    code, _, err = compress("--push-to-hub", "--hub-stage", stage)
    assert code == 1 and "error: The recipe distil-int8 has no stage" in err and message in err


def test_the_pick_of_a_search_is_pushed(hub, client, tmp_path):
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    build("bert", "BertForSequenceClassification", **names).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [f"{'the film was very good ' * (i % 3 + 1)},{'xyz'[i % 3]}" for i in range(12)]
    (tmp_path / "validation.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    upload = ["--push-to-hub", "--hub-model-id", "picked"]
    quick = ["--population", "4", "--trials", "6", "--batch-size", "4", "--max-length", "16", "--no-picture"]
    pick = ["--max-cost", "90%", "--save-pick", tmp_path / "pick"]
    data = ["--dataset", tmp_path / "validation.csv", "-o", tmp_path / "front"]
    code, out, err = client.cli("search", "-m", tmp_path / "model", *data, *quick, *pick, *upload)
    assert code == 0, err
    assert "Pushed to ada/picked" in out
    card = ModelCard(hub.files("ada/picked")["README.md"].decode())
    assert card.text.startswith("\n# ada/picked") and "length_config=[...]" in card.text
