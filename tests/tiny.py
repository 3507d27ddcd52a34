"""Tiny models of every family and head, with random weights, and inputs for them."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel


VOCABULARY = 64
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
_BERT = {
    **_TEXT,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "num_labels": 3,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "num_labels": 3,
}

CONFIGS = {
    "bert": ("BertConfig", _BERT),
    "roberta": ("RobertaConfig", {**_BERT, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertConfig",
        {**_TEXT, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "num_labels": 3},
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 40,
            "num_labels": 3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "t5": ("T5Config", _T5),
    "t5-gated-untied": (
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    ),
    "bart": (
        "BartConfig",
        {
            **_TEXT,
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            "scale_embedding": True,
            "num_labels": 3,
        },
    ),
    "vit": (
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "image_size": 16,
            "patch_size": 8,
            "num_labels": 3,
            "encoder_stride": 8,
        },
    ),
}

CLASSES = {
    "bert": [
        "BertModel",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMaskedLM",
    ],
    "roberta": [
        "RobertaModel",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaForQuestionAnswering",
        "RobertaForMaskedLM",
    ],
    "distilbert": [
        "DistilBertModel",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
        "DistilBertForQuestionAnswering",
        "DistilBertForMaskedLM",
    ],
    "gpt2": [
        "GPT2Model",
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2ForQuestionAnswering",
    ],
    "llama": [
        "LlamaModel",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaForQuestionAnswering",
    ],
    "mistral": ["MistralForCausalLM"],
    "qwen2": ["Qwen2ForCausalLM"],
    "t5": [
        "T5Model",
        "T5ForConditionalGeneration",
        "T5ForSequenceClassification",
        "T5ForTokenClassification",
        "T5ForQuestionAnswering",
        "T5EncoderModel",
    ],
    "t5-gated-untied": ["T5ForConditionalGeneration"],
    "bart": [
        "BartModel",
        "BartForConditionalGeneration",
        "BartForSequenceClassification",
        "BartForQuestionAnswering",
        "BartForCausalLM",
    ],
    "vit": ["ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"],
}

ALL = [(family, name) for family, names in CLASSES.items() for name in names]
GENERATIVE = [
    ("gpt2", "GPT2LMHeadModel"),
    ("llama", "LlamaForCausalLM"),
    ("mistral", "MistralForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("t5", "T5ForConditionalGeneration"),
    ("t5-gated-untied", "T5ForConditionalGeneration"),
    ("bart", "BartForConditionalGeneration"),
]


def build(family: str, name: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A model in evaluation mode whose weights are far from their initial zeros and ones."""
    config_name, values = CONFIGS[family]
    if "QuestionAnswering" in name:
        values = {**values, "num_labels": 2}
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config_name)(**{**values, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    return (
        bool(model.config.is_encoder_decoder) and hasattr(model, "get_decoder") and "Encoder" not in str(type(model))
    )


def inputs_for(model: PreTrainedModel, seed: int = 0, batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Inputs with padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - 2 * row :] = 0
    inputs = {"input_ids": ids.where(mask.bool(), model.config.pad_token_id or 0), "attention_mask": mask}
    name = type(model).__name__
    if name in ("T5Model", "BartModel", "T5ForConditionalGeneration", "BartForConditionalGeneration"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, 5), generator=generator)
    if name in ("T5ForSequenceClassification", "BartForSequenceClassification"):
        # These heads read the last end-of-sentence token, and every row must have equally many.
        ids = inputs["input_ids"]
        ids[ids == model.config.eos_token_id] = 5
        ids[:, 3] = model.config.eos_token_id
    return inputs


def outputs_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every floating-point output that a caller would use."""
    with torch.no_grad():
        outputs = model(**inputs)
    return {
        name: value
        for name, value in outputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "encoder_last_hidden_state"
    }
