"""The card says how to load the folder it lies in."""

from __future__ import annotations

from huggingface_hub import ModelCard

from optimum_flexcompress import Kept, keep_layers, select
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
    assert write_model_card(tmp_path, stock, base_model=str(tmp_path)) == path  # its own card is renewed
    card = ModelCard.load(path)
    assert "import optimum_flexcompress" not in card.text
    assert card.data.base_model is None
    assert str(tmp_path) not in path.read_text().replace(tmp_path.name, "")


def test_somebody_elses_card_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert write_model_card(tmp_path, build("bert", "BertModel")) is None
    assert (tmp_path / "README.md").read_text() == "mine"
