"""The card says how to load the folder it lies in."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from transformers import ElectraConfig, ElectraModel, TrainingArguments

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressConfig,
    FlexCompressTrainer,
    Kept,
    keep_layers,
    select,
)
from optimum_flexcompress.evaluation import Report
from optimum_flexcompress.model_card import Measured, rename_card, write_model_card
from tests.tiny import build


RESULTS = Path(__file__).parents[2] / "examples" / "benchmarks" / "results"


def test_card_names_the_import_where_it_is_needed(tmp_path):
    ragged = select(build("bert", "BertForMaskedLM"), Kept(range(20)))
    path = write_model_card(
        tmp_path, ragged, methods=["distillation"], base_model="org/base", metrics={"accuracy": 0.5}
    )
    card = ModelCard.load(path)
    assert "import optimum_flexcompress  # install optimum-flexcompress from its repository" in card.text
    assert "hidden size 20" in card.text
    assert "| accuracy | 0.5 |" in card.text
    assert card.data.base_model == "org/base"
    assert card.data.tags == ["optimum-flexcompress", "distillation"]

    stock = keep_layers(build("bert", "BertForMaskedLM"), [0])
    # Its own card is renewed; a folder's name says nothing to others.
    assert write_model_card(tmp_path, stock, base_model=str(tmp_path / "run")) == path
    card = ModelCard.load(path)
    assert "import optimum_flexcompress" not in card.text
    assert card.data.base_model is None
    assert str(tmp_path) not in path.read_text().replace(tmp_path.name, "")


def test_somebody_elses_card_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert write_model_card(tmp_path, build("bert", "BertModel")) is None
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_family_without_a_table_gets_a_card_too(tmp_path):
    sizes = {"hidden_size": 16, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = ElectraModel(ElectraConfig(vocab_size=20, num_hidden_layers=1, **sizes))
    text = write_model_card(tmp_path, model).read_text()
    assert f"{model.num_parameters():,} parameters." in text


def test_figures_of_a_benchmark(tmp_path):
    report = Report.load(RESULTS / "quickstart.json")
    student = keep_layers(build("bert", "BertForSequenceClassification"), [0])
    measured = Measured(report, report.models[-1].name, "org/banking77")
    card = ModelCard.load(write_model_card(tmp_path, student, measured=measured, name="me/student"))
    assert card.data.datasets == ["org/banking77"] and card.data.model_name == "me/student"
    result = next(result for result in card.data.eval_results if result.metric_type == "accuracy")
    assert result.metric_value == report.models[-1].metrics["accuracy"]
    assert (result.task_type, result.dataset_type, result.dataset_split) == (report.task, "org/banking77", "test")
    for words in ("92.21 %", "92.27 % (+0.06 pt)", "| parameters | 22.7 M | ", "avx512_vnni", "onnxruntime 1."):
        assert words in card.text, words
    assert "| time, 1x64 | " in card.text and "x faster) |" in card.text


def test_the_licence_of_the_base_is_passed_on(tmp_path):
    (tmp_path / "base").mkdir()
    licence = "license: other\nlicense_name: house\nlicense_link: LICENSE\nbase_model: org/first\n"
    (tmp_path / "base" / "README.md").write_text(f"---\n{licence}---\n\n# Base\n")
    path = write_model_card(tmp_path, build("bert", "BertModel"), base_model=tmp_path / "base")
    data = ModelCard.load(path).data
    assert (data.license, data.license_name, data.license_link) == ("other", "house", "LICENSE")
    assert data.base_model == "org/first"
    given = {"base_model": tmp_path / "base", "licence": "mit", "metadata": {"language": "en"}}
    data = ModelCard.load(write_model_card(tmp_path, build("bert", "BertModel"), **given)).data
    assert (data.license, data.language) == ("mit", "en")


def test_a_model_gets_another_name(tmp_path):
    path = write_model_card(tmp_path, build("bert", "BertModel"), name="first")
    rename_card(tmp_path, "me/there")
    card = ModelCard.load(path)
    assert card.data.model_name == "me/there" and "first" not in card.text
    path.write_text("mine")
    rename_card(tmp_path, "me/there")
    assert path.read_text() == "mine"


def test_the_trainer_writes_it(tmp_path):
    teacher = build("bert", "BertForSequenceClassification")
    student = keep_layers(build("bert", "BertForSequenceClassification"), [0])
    rows = [{"input_ids": [5, 6, i + 7], "attention_mask": [1] * 3, "labels": i % 3} for i in range(4)]
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True)
    trainer = FlexCompressTrainer(
        student,
        arguments,
        train_dataset=rows,
        teacher_model=teacher,
        compression_config=FlexCompressConfig(methods=[DistillationConfig()]),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["optimum-flexcompress", "distillation"]
    assert "encoder: 1 layers" in card.text
