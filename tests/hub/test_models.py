"""Models on the Hub by themselves: pushed from memory and from the Trainer, loaded by id and revision."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from optimum_flexcompress.errors import FlexCompressError
from tests.tiny import build, inputs_for


def _ragged():
    """A model that no stock configuration describes."""
    from optimum_flexcompress import Kept, select

    return select(build("bert", "BertForSequenceClassification"), Kept(range(20)))


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_for(build("bert", "BertForSequenceClassification"))).logits


def push_from_memory(repo: str, **options):
    """Pushes a compressed model as any model of Transformers is pushed."""
    model = _ragged()
    model.push_to_hub(repo, **options)
    return _logits(model)


def load(repo: str, **options):
    """Loads a model by its id."""
    from transformers import AutoModelForSequenceClassification

    import optimum_flexcompress  # noqa: F401

    return _logits(AutoModelForSequenceClassification.from_pretrained(repo, **options))


@pytest.fixture(scope="module")
def pushed(client):
    """A pushed model and its logits."""
    return "ada/ragged", client(push_from_memory, "ragged")


def test_a_model_pushes_itself_and_loads_by_its_id(hub, client, pushed):
    repo, logits = pushed
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files(repo))
    assert b"- optimum-flexcompress" in hub.files(repo)["README.md"]
    torch.testing.assert_close(client(load, repo), logits, rtol=0, atol=0)
    # A stranger can read what is public.
    torch.testing.assert_close(client(load, repo, token=None), logits, rtol=0, atol=0)


def test_a_branch_is_a_revision(hub, client, pushed):
    repo, logits = pushed
    client(push_from_memory, "ragged", revision="second")
    torch.testing.assert_close(client(load, repo, revision="second"), logits, rtol=0, atol=0)
    with pytest.raises(OSError, match="third is not a valid git identifier"):
        client(load, repo, revision="third")


def test_private_models_need_their_owner(hub, client):
    client(push_from_memory, "analysts/secret", private=True)
    assert hub.repos["analysts/secret"].private
    client(load, "analysts/secret")
    with pytest.raises(OSError, match="not a valid model identifier"):
        client(load, "analysts/secret", token="hf_bob")


def test_without_the_plugin_loading_stops(hub, pushed, tmp_path):
    repo, _ = pushed
    code = f"from transformers import AutoModelForSequenceClassification as A; A.from_pretrained('{repo}')"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0 and "size mismatch" in done.stderr + done.stdout


def trainer_for(folder: str, **arguments):
    """A trainer that prunes, and measures how often it is right."""
    from tests.methods.vib.helpers import trainer_of

    return trainer_of(folder, steps=40, compute_metrics=lambda prediction: {"accuracy": 0.75}, **arguments)


def train_and_push(folder: str, **arguments):
    """Trains, pushes what came out, and says what it answers."""
    trainer = trainer_for(folder, push_to_hub=True, **arguments)
    trainer.train()
    trainer.evaluate()
    url = trainer.push_to_hub(dataset_tags="org/data", dataset="Data", language="en", tags="taught")
    return str(url), [parameter.numel() for parameter in trainer.model.parameters()]


def sizes_of(repo: str):
    """The sizes of a model on the Hub, tensor by tensor."""
    from transformers import AutoModelForSequenceClassification

    import optimum_flexcompress  # noqa: F401

    model = AutoModelForSequenceClassification.from_pretrained(repo)
    return [parameter.numel() for parameter in model.parameters()]


def test_the_trainer_pushes_the_pruned_model_in_one_commit(hub, client, tmp_path):
    url, sizes = client(train_and_push, str(tmp_path / "pruned"))
    assert url == f"{hub.url}/ada/pruned/tree/main/"
    assert hub.repos["ada/pruned"].messages == ["initial commit", "End of training"]
    files = hub.files("ada/pruned")
    assert {"config.json", "model.safetensors", "flexcompress_config.json", "README.md"} <= set(files)
    assert not [name for name in files if "method" in name]
    assert client(sizes_of, "ada/pruned") == sizes
    card = ModelCard(files["README.md"].decode())
    assert card.data.tags == ["optimum-flexcompress", "vib_pruning", "taught", "generated_from_trainer"]
    assert card.data.language == ["en"] and card.data.datasets == ["org/data"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.75, "org/data")
    assert 'from_pretrained("ada/pruned")' in card.text and "learning_rate: " in card.text


def push_on_the_way(folder: str):
    """Saves, which pushes, in the middle of training."""
    from transformers import TrainerCallback

    trainer = trainer_for(folder, push_to_hub=True, hub_strategy="end", hub_model_id="analysts/on-the-way")

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 30:
                trainer.save_model()

    trainer.add_callback(Save())
    trainer.train()
    return [parameter.numel() for parameter in trainer.model.parameters()]


def test_what_is_saved_on_the_way_is_pushed_finished(hub, client, tmp_path):
    sizes = client(push_on_the_way, str(tmp_path / "run"))
    assert hub.repos["analysts/on-the-way"].messages == ["initial commit", "Model save"]
    assert sum(client(sizes_of, "analysts/on-the-way")) < 1.2 * sum(sizes)
    card = ModelCard(hub.files("analysts/on-the-way")["README.md"].decode())
    assert 'from_pretrained("analysts/on-the-way")' in card.text


def test_a_stock_trainer_stays_one(hub, client, tmp_path):
    client(push_stock, str(tmp_path / "stock"))
    assert "optimum-flexcompress" not in hub.files("ada/stock")["README.md"].decode()


def push_stock(folder: str):
    """Without methods."""
    from transformers import TrainingArguments

    from optimum_flexcompress import FlexCompressTrainer

    arguments = TrainingArguments(folder, push_to_hub=True, report_to="none", use_cpu=True)
    FlexCompressTrainer(build("bert", "BertForSequenceClassification"), arguments).push_to_hub()


def push_into_the_void(folder: str):
    """A push that fails after training; the waits between attempts are left out."""
    from unittest.mock import patch

    trainer = trainer_for(folder, hub_model_id="ada/void")
    trainer.train()
    with patch("huggingface_hub.utils._http.time.sleep"):
        trainer.push_to_hub()


def test_a_trainer_whose_push_fails_keeps_the_model(hub, client, tmp_path):
    folder = tmp_path / "run"
    hub.break_at = ("POST", "/api/models/ada/void/commit")
    try:
        with pytest.raises(FlexCompressError, match="the connection to the Hub failed") as caught:
            client(push_into_the_void, str(folder))
    finally:
        hub.break_at = None
    assert f"{folder} is kept" in str(
        caught.value
    ) and f"`hf upload ada/void {folder} . --exclude training_args.bin`" in str(caught.value)
    assert (folder / "model.safetensors").is_file() and (folder / "README.md").is_file()
    assert set(hub.files("ada/void")) == {".gitattributes"}


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "ada/none was not pushed: .* log in with `hf auth login`"),
        ("hf_wrong", "the Hub does not accept the token"),
        ("hf_bob", "it belongs to others"),
    ],
)
def test_a_trainer_that_may_not_push_says_so_at_once(hub, client, tmp_path, token, message):
    with pytest.raises(FlexCompressError, match=message):
        client(trainer_for, str(tmp_path), push_to_hub=True, hub_model_id="ada/none", token=token)
    assert "ada/none" not in hub.repos


def test_a_model_that_is_not_in_the_cache_without_the_hub(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    from optimum_flexcompress.hub import fetch_model

    def refuse(error):
        def refuse(*args, **kwargs):
            raise error("offline")

        return refuse

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse(OfflineModeIsEnabled))
    monkeypatch.setattr("optimum_flexcompress.hub.snapshot_download", refuse(LocalEntryNotFoundError))
    with pytest.raises(FlexCompressError) as caught:
        fetch_model("ada/model")
    assert str(caught.value) == (
        "There is no folder ada/model here, and HF_HUB_OFFLINE is set while no model of that name is in the cache: check "
        "the path, or unset HF_HUB_OFFLINE."
    )
