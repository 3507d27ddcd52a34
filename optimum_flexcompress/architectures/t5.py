"""T5: relative position biases in the first layer of a stack, RMS norms, an optionally gated feed-forward network."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PretrainedConfig

from .base import Architecture, AttentionTable, ConfigKeys, FeedForwardTable, StackTable


def _position_bias(owner: nn.Module, positions: torch.Tensor) -> torch.Tensor:
    """The relative bias between tokens that are no longer neighbours."""
    bucket = owner._relative_position_bucket(
        positions[:, None, :] - positions[:, :, None],
        bidirectional=not owner.is_decoder,
        num_buckets=owner.relative_attention_num_buckets,
        max_distance=owner.relative_attention_max_distance,
    )
    return owner.relative_attention_bias(bucket).permute(0, 3, 1, 2)


def _attention(layer: int, name: str, **kwargs) -> AttentionTable:
    path = f"layer.{layer}.{name}"
    return AttentionTable(
        module=path,
        query=f"{path}.q",
        key=f"{path}.k",
        value=f"{path}.v",
        output=f"{path}.o",
        norm=f"layer.{layer}.layer_norm",
        head_size="key_value_proj_dim",
        head_counts=("n_heads",),
        widths=("inner_dim",),
        returns_position_bias=True,
        rebuild_position_bias=_position_bias,
        scaled=False,
        maps=2,
        **kwargs,
    )


def _ffn(layer: int) -> FeedForwardTable:
    path = f"layer.{layer}.DenseReluDense"
    return FeedForwardTable(
        up=((f"{path}.wi",), (f"{path}.wi_0", f"{path}.wi_1")),
        down=f"{path}.wo",
        norm=f"layer.{layer}.layer_norm",
    )


def _width_constants(config: PretrainedConfig) -> tuple:
    # The tied output is scaled by `d_model ** -0.5`.
    return (config.d_model,) if config.tie_word_embeddings else ()


ENCODER = StackTable(
    layers="encoder.block",
    attention=_attention(0, "SelfAttention", position_bias="relative_attention_bias"),
    ffn=_ffn(1),
    config=ConfigKeys(layers=("num_layers",), heads=("num_heads",), head_size=("d_kv",), ffn=("d_ff",)),
    final_norm="encoder.final_layer_norm",
    between=(("layer.1", 0),),
)

T5 = Architecture(
    family="t5",
    model_types=("t5",),
    stacks={
        "encoder": ENCODER,
        "decoder": replace(
            ENCODER,
            layers="decoder.block",
            cross_attention=_attention(1, "EncDecAttention"),
            ffn=_ffn(2),
            config=replace(ENCODER.config, layers=("num_decoder_layers",)),
            causal=True,
            final_norm="decoder.final_layer_norm",
            between=(),
        ),
    },
    hidden_size=("d_model",),
    embeddings=("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    embedding_outputs=("encoder.embed_tokens", "decoder.embed_tokens"),
    reads=("lm_head", "classification_head.out_proj", "classifier", "qa_outputs"),
    writes=("encoder.final_layer_norm", "decoder.final_layer_norm"),
    both=("classification_head.dense",),
    fixed=("*.relative_attention_bias",),
    width_constants=_width_constants,
)
