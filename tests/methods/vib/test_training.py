"""Whole runs: sizes, checkpoints, modes, stacking, resuming."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from optimum_flexcompress import DistillationConfig, FlexCompressError, ModelStructure
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.structure import count_parameters
from tests.methods.toys import FAMILIES, assert_same, data_of, logs_of, model_of, weights
from tests.methods.vib.helpers import config_of, trainer_of


def _sparsity(model, dense) -> float:
    return 1 - count_parameters(model)["prunable"] / dense


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_lands_on_the_request_and_loads(family, tmp_path):
    trainer = trainer_of(tmp_path, family)
    dense = count_parameters(trainer.model)["prunable"]
    trainer.train()
    model = trainer.model
    assert abs(_sparsity(model, dense) - 0.5) <= 0.01 * 0.5
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "out"))
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert ModelStructure.of(loaded) == ModelStructure.of(model)
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)
    trainer.model = loaded
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss)
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert "MaskHooks" not in repr(hooks) and "forward" not in vars(module)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_generation_with_a_cache_after_pruning(family, tmp_path):
    trainer = trainer_of(tmp_path, family, steps=60)
    trainer.train()
    model = trainer.model.eval()
    batch = data_of(family, 3)[:]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if family in ("gpt2", "llama"):
        inputs = {name: value.flip(1) for name, value in inputs.items()}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert (
        model.generate(**inputs, **options).tolist() == model.generate(**inputs, **options, use_cache=False).tolist()
    )


class _Evaluations(TrainerCallback):
    """Losses of evaluations, of the masked model while it trains."""

    def __init__(self):
        self.losses = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.losses.append(metrics["eval_loss"])


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
def test_the_masked_model_evaluates_as_the_finalised_one(family, tmp_path):
    evaluations = _Evaluations()
    trainer = trainer_of(
        tmp_path, family, steps=40, eval_strategy="steps", eval_steps=20, settings={"mask_learning_rate": 0.5}
    )
    trainer.add_callback(evaluations)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations.losses[-2], rel=1e-4)


def test_hidden_state_distillation_of_a_masked_model(tmp_path):
    logits, states = "loss_logits", "loss_hidden_states"
    trainer = trainer_of(
        tmp_path,
        settings={"hold_fraction": 0.2},
        others=[DistillationConfig(hidden_states_weight=1.0)],
        teacher="self",
        steps=120,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if states in entry]
    assert logs[0][states] < 0.05  # the student starts as its teacher, with a little noise
    assert max(entry[states] for entry in logs) > 2 * logs[0][states]
    folded = next(i for i, entry in enumerate(logs) if entry["loss_vib_kl"] == 0)
    assert logs[-1][states] < max(entry[states] for entry in logs[:folded])
    assert all(entry[logits] == entry[logits] for entry in logs)
    assert logs[-1]["vib_sparsity"] == pytest.approx(0.5, abs=0.005)
    # Both figures are there: of the layers, and with the embeddings.
    assert 0 < logs[-1]["vib_sparsity_with_embeddings"] < logs[-1]["vib_sparsity"]


def test_faster_trains_masks_only(tmp_path):
    data = data_of("bert", 100)
    trainer = trainer_of(tmp_path, data=data, settings={"mode": "faster", "target_sparsity": 0.4})
    before = weights(trainer.model)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
            if state.global_step == 79:
                assert_same(weights(model), before)
            seen.append(len(train_dataloader.dataset))

    trainer.add_callback(Watch())
    trainer.train()
    assert set(seen) == {3}
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    dense = sum(before[name].numel() for name in before if ".layer." in name)
    assert abs(_sparsity(trainer.model, dense) - 0.4) <= 0.01 * 0.6
    # The weights have no gradients, and the masks have.
    assert all(entry["grad_norm"] > 0 for entry in logs_of(trainer) if "grad_norm" in entry)


def test_fast_repeats_a_little_of_the_data(tmp_path):
    trainer = trainer_of(
        tmp_path, data=data_of("bert", 200), steps=-1, num_train_epochs=1, settings={"mode": "fast", "min_steps": 60}
    )
    trainer.train()
    assert trainer.state.global_step == 60
    assert trainer.state.epoch == 30  # 6 of 200 samples, in batches of 4
    assert len(trainer.train_dataset) == 200


def test_checkpoints_on_the_way(tmp_path):
    trainer = trainer_of(tmp_path, settings={"target_sparsity": 0.6, "save_at_sparsities": [0.2, 0.4, 0.6]}, steps=120)
    model_class, dense = type(trainer.model), count_parameters(trainer.model)["prunable"]
    trainer.train()
    sizes = {}
    for level in (0.2, 0.4, 0.6):
        folder = tmp_path / f"sparsity-{level}"
        assert (folder / "flexcompress_config.json").is_file()
        sizes[level] = model_class.from_pretrained(folder)
        assert abs(_sparsity(sizes[level], dense) - level) <= 0.01 * (1 - level)
    assert_same(weights(sizes[0.6]), weights(trainer.model))


def test_killed_and_resumed_is_not_killed(tmp_path):
    for stop in (20, 70):  # while masks train, and after they are folded
        settings = {"save_strategy": "steps", "save_steps": stop, "lr_scheduler_type": "constant"}
        whole = trainer_of(tmp_path / f"whole{stop}", **settings)
        whole.train()

        class Kill(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                raise KeyboardInterrupt

        killed = trainer_of(tmp_path / f"killed{stop}", callbacks=[Kill()], **settings)
        with pytest.raises(KeyboardInterrupt):
            killed.train()
        resumed = trainer_of(tmp_path / f"killed{stop}", **settings)
        resumed.train(resume_from_checkpoint=True)
        assert ModelStructure.of(resumed.model) == ModelStructure.of(whole.model)
        assert_same(weights(resumed.model), weights(whole.model))


def test_only_a_finished_model_becomes_the_best(tmp_path):
    trainer = trainer_of(
        tmp_path,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    dense = count_parameters(trainer.model)["prunable"]
    trainer.train()
    assert int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1]) >= 60
    assert abs(_sparsity(trainer.model, dense) - 0.5) <= 0.005


def test_accumulated_batches_count_once(tmp_path):
    logs = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = trainer_of(
            tmp_path,
            steps=30,
            settings={"mask_learning_rate": 0.5},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss_vib_kl" in entry])
    for name in ("loss_vib_kl", "loss_vib_constraint"):
        assert logs[0][0][name] == pytest.approx(logs[1][0][name], rel=1e-5), name


def test_gradient_checkpointing_draws_the_same_noise_twice(tmp_path):
    results = []
    for checkpointing in (False, True):
        trainer = trainer_of(
            tmp_path, steps=40, settings={"mask_learning_rate": 0.5}, gradient_checkpointing=checkpointing
        )
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(*results, atol=1e-5, rtol=1e-4)


class _Poison(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            with torch.no_grad():
                self.trainer._runner.methods[0].modules["masks"].mu[3] = torch.nan


def test_nan_in_a_mask_is_said(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=5)
    trainer.add_callback(_Poison(trainer))
    with pytest.raises(FlexCompressError, match="NaN.*lower learning rate"):
        trainer.train()
    assert (tmp_path / "checkpoint-5").is_dir()
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def test_checkpoints_after_a_nan_push_no_good_one_out(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=5, save_total_limit=1, logging_steps=500)
    trainer.add_callback(_Poison(trainer))
    with pytest.raises(FlexCompressError, match="NaN.*earlier checkpoint"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


def test_a_run_that_ends_early_says_how_far_it_got(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 30

    trainer = trainer_of(tmp_path, callbacks=[Stop()])
    with pytest.raises(FlexCompressError, match=r"after 30 steps.*sparsity of 0\.[0-9]+, 0\.500 is wanted"):
        trainer.train()


def test_bad_requests_fail_before_training(tmp_path):
    with pytest.raises(FlexCompressError, match="nearest is"):
        trainer_of(tmp_path, settings={"target_sparsity": 0.999})
    with pytest.raises(FlexCompressError, match="too few to move"):
        trainer_of(tmp_path, steps=10, settings={"mode": "faster"}).train()
    layer_scaled = model_of("gpt2")
    layer_scaled.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(FlexCompressError, match="scale_attn_by_inverse_layer_idx"):
        trainer_of(tmp_path, model=layer_scaled, data=data_of("gpt2"))


def test_a_pruned_model_can_be_pruned_again(tmp_path):
    first = trainer_of(tmp_path, settings={"target_sparsity": 0.3})
    first.train()
    once = count_parameters(first.model)["prunable"]
    second = trainer_of(tmp_path, model=first.model, settings={"target_sparsity": 0.3})
    second.train()
    assert abs(_sparsity(second.model, once) - 0.3) <= 0.01 * 0.7
    assert describe(second.model).hidden_size <= describe(first.model).hidden_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_sparsity": 0}, "share between 0 and 1"),
        ({"target_sparsity": 1}, "share between 0 and 1"),
        ({"target_sparsity": 1.5}, "share between 0 and 1"),
        ({"target_sparsity": float("nan")}, "give a number"),
        ({"target_sparsity": None}, "one target"),
        ({"target_macs": 0.5}, "one target"),
        ({"target_sparsity": None, "target_macs": 1}, "whole model"),
        ({"mode": "fastest"}, '"faster"'),
        ({"noise": "row"}, "sequence"),
        ({"align": 0}, "at least 1"),
        ({"prune": ["head"]}, '"heads"'),
        ({"prune": []}, "list of"),
        ({"save_at_sparsities": [0.7]}, "beyond the target"),
        ({"save_at_sparsities": 0.3}, "give a list"),
        ({"ramp_fraction": 0.9, "hold_fraction": 0.3}, "make 1.2"),
        ({"kl_multipliers": {"dims": 1.0}}, "Known: ffn"),
        ({"beta": 0}, "above 0"),
        ({"include_embeddings": True, "target_sparsity": None, "target_macs": 0.5}, "leave it out"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(FlexCompressError, match=message):
        config_of(**settings)
