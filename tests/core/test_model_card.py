"""The card says how to load the folder it lies in."""

from __future__ import annotations

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
from optimum_flexcompress.model_card import write_model_card
from tests.tiny import build


def test_card_names_the_import_where_it_is_needed(tmp_path):
    ragged = select(build("bert", "BertForMaskedLM"), Kept(range(20)))
    path = write_model_card(
        tmp_path, ragged, methods=["distillation"], base_model="org/base", metrics={"accuracy": 0.5}
    )
    card = ModelCard.load(path)
    assert "import optimum_flexcompress" in card.text
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
