"""Toy models and data for the tests of training."""

from __future__ import annotations

import copy

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
    TrainingArguments,
    ViTConfig,
)


VOCABULARY = 64


def config_of(family: str, layers: int = 2, hidden: int = 16, heads: int = 2, dropout: float = 0.0):
    """A tiny config of each family."""
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0}
    bert_like = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 2 * hidden,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    configs: dict[str, PretrainedConfig] = {
        "bert": BertConfig(**common, **bert_like, max_position_embeddings=32),
        "roberta": RobertaConfig(**common, **bert_like, max_position_embeddings=34),
        "distilbert": DistilBertConfig(
            **common,
            n_layers=layers,
            dim=hidden,
            n_heads=heads,
            hidden_dim=2 * hidden,
            dropout=dropout,
            attention_dropout=dropout,
            seq_classif_dropout=dropout,
            max_position_embeddings=32,
        ),
        "gpt2": GPT2Config(
            **common,
            n_layer=layers,
            n_embd=hidden,
            n_head=heads,
            n_positions=32,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "llama": LlamaConfig(
            **common,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=2 * heads,
            num_key_value_heads=heads,
            head_dim=hidden // (2 * heads),
            intermediate_size=2 * hidden,
            max_position_embeddings=32,
            attention_dropout=dropout,
        ),
        "t5": T5Config(
            **common,
            num_layers=layers,
            d_model=hidden,
            num_heads=heads,
            d_kv=hidden // heads,
            d_ff=2 * hidden,
            dropout_rate=dropout,
            decoder_start_token_id=0,
        ),
        "bart": BartConfig(
            **common,
            encoder_layers=layers,
            decoder_layers=layers,
            d_model=hidden,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=2 * hidden,
            decoder_ffn_dim=2 * hidden,
            max_position_embeddings=32,
            dropout=dropout,
            attention_dropout=dropout,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        ),
        "vit": ViTConfig(**bert_like, image_size=8, patch_size=4, num_channels=3),
    }
    return configs[family]


FAMILY_CLASSES = {
    "bert": AutoModelForSequenceClassification,
    "roberta": AutoModelForSequenceClassification,
    "distilbert": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "bart": AutoModelForSeq2SeqLM,
    "vit": AutoModelForImageClassification,
}
FAMILIES = sorted(FAMILY_CLASSES)


def model_of(family: str, seed: int = 0, num_labels: int = 3, auto_class=None, **kwargs):
    """A tiny random model; its weights are spread wide enough that attention is far from uniform."""
    # T5 draws its initial weights from wide distributions by itself.
    spread = 1.0 if family == "t5" else 4.0
    config = config_of(family, **kwargs)
    config.num_labels = num_labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (auto_class or FAMILY_CLASSES[family]).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(spread)
    return model.eval()


def data_of(family: str, rows: int = 16, num_labels: int = 3, seed: int = 0, length: int = 9) -> Dataset:
    """Rows of uneven lengths, padded, with labels for the family's head."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        pixels = torch.randn(rows, 3, 8, 8, generator=generator)
        labels = torch.randint(num_labels, (rows,), generator=generator)
        return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels.tolist()}).with_format("torch")
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    mask = torch.arange(length)[None] < lengths[:, None]
    data = {"input_ids": ids * mask, "attention_mask": mask.long()}
    if family in ("gpt2", "llama"):
        data["labels"] = ids.masked_fill(~mask, -100)
    elif family in ("t5", "bart"):
        targets = torch.randint(4, VOCABULARY, (rows, length - 2), generator=generator)
        sizes = torch.randint(2, length - 1, (rows,), generator=generator)
        data["labels"] = targets.masked_fill(torch.arange(length - 2)[None] >= sizes[:, None], -100)
    else:
        data["labels"] = torch.randint(num_labels, (rows,), generator=generator)
    return Dataset.from_dict({name: value.tolist() for name, value in data.items()}).with_format("torch")


def arguments(folder, **kwargs) -> TrainingArguments:
    """Quiet arguments for a few CPU steps."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
        **kwargs,
    }
    return TrainingArguments(**settings)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance) -> None:
    """Equal in every bit, or within a tolerance."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        if tolerance:
            torch.testing.assert_close(value, second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        else:
            assert torch.equal(value, second[name]), name


def twin(model):
    return copy.deepcopy(model)
