"""VIB pruning, length-adaptive training and MiniLM distillation in one config."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from optimum_flexcompress import (
    FlexCompressConfig,
    FlexCompressError,
    LengthAdaptiveConfig,
    LengthConfig,
    MiniLMConfig,
    set_lengths,
)
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.origin import Origin
from optimum_flexcompress.structure import count_parameters
from tests.methods.toys import data_of, model_of
from tests.methods.vib.helpers import config_of, trainer_of


ADAPTIVE = LengthAdaptiveConfig(num_sandwich=1, unit="fractions", layer_drop=0.0)


def test_all_three(tmp_path):
    """One run leaves a model of the requested size that takes any lengths, and has learned from relations."""
    trainer = trainer_of(
        tmp_path,
        others=[ADAPTIVE, MiniLMConfig(relation_heads=4)],
        teacher="self",
        steps=60,
        logging_steps=10,
        model=model_of("bert", layers=3, hidden=32, heads=4),
    )
    dense = count_parameters(trainer.model)["prunable"]
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"loss_vib_kl", "loss_smallest", "loss_random", "loss_task", "vib_sparsity"} <= logged
    assert sum(name.startswith("loss_minilm") or "relation" in name for name in logged) >= 1
    model = trainer.model.eval()
    assert 1 - count_parameters(model)["prunable"] / dense == pytest.approx(0.5, abs=0.005)
    assert Origin.of(describe(model)).matches(describe(model))

    trainer.save_model(str(tmp_path / "out"))
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(4)])
    batch.pop("labels")
    lengths = LengthConfig.parse([0.8, 0.6, 0.4])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    shorter = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", length_config=[0.8, 0.6, 0.4]
    ).eval()
    with torch.no_grad():
        full = model(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, full)
        dropped = shorter(**batch).logits
        assert not torch.allclose(dropped, full, atol=1e-4)
        torch.testing.assert_close(set_lengths(model, lengths)(**batch).logits, dropped)


def test_terms_of_masks_come_once_per_step(tmp_path):
    """The sub-models run under the same masks, and only the full pass has the terms that move them."""
    alone = trainer_of(tmp_path / "alone", steps=40, logging_steps=40)
    alone.train()
    stacked = trainer_of(tmp_path / "stacked", steps=40, logging_steps=40, others=[ADAPTIVE])
    stacked.train()
    kl = [run.state.log_history[0]["loss_vib_kl"] for run in (alone, stacked)]
    assert kl[1] == pytest.approx(kl[0], rel=0.5)


def test_no_teacher_for_what_learns_from_one(tmp_path):
    with pytest.raises(FlexCompressError, match="teacher"):
        trainer_of(tmp_path, others=[ADAPTIVE, MiniLMConfig(relation_heads=4)])


def test_the_same_method_twice():
    with pytest.raises(FlexCompressError, match='methods has "vib_pruning" twice: give each method once'):
        FlexCompressConfig(methods=[config_of(), config_of(target_sparsity=0.3)])


def test_data_is_shared(tmp_path):
    """`fast` takes its share of the data for all methods."""
    settings = {"mode": "fast", "data_fraction": 0.25, "min_steps": 40}
    trainer = trainer_of(
        tmp_path, settings=settings, others=[ADAPTIVE], steps=-1, num_train_epochs=1, data=data_of("bert", 64)
    )
    assert len(trainer.get_train_dataloader().dataset) == 16
    trainer.train()
    assert trainer.state.max_steps == 40
