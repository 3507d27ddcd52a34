"""BART."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from .base import Architecture, AttentionTable, ConfigKeys, FeedForwardTable, StackTable


def _attention(path: str, norm: str) -> AttentionTable:
    return AttentionTable(
        module=path,
        query=f"{path}.q_proj",
        key=f"{path}.k_proj",
        value=f"{path}.v_proj",
        output=f"{path}.out_proj",
        norm=norm,
        head_size="head_dim",
        head_counts=("num_heads",),
    )


def _width_constants(config: PretrainedConfig) -> tuple:
    # Embeddings are scaled by `sqrt(d_model)`.
    return (config.d_model,) if config.scale_embedding else ()


ENCODER = StackTable(
    layers="encoder.layers",
    attention=_attention("self_attn", "self_attn_layer_norm"),
    ffn=FeedForwardTable(up=(("fc1",),), down="fc2", norm="final_layer_norm"),
    config=ConfigKeys(
        layers=("encoder_layers", "num_hidden_layers"), heads=("encoder_attention_heads",), ffn=("encoder_ffn_dim",)
    ),
    norm_first=False,
    layer_drop="layerdrop",
)


def _export_objection(config: PretrainedConfig) -> str | None:
    # Optimum puts the end token into its dummy inputs.
    if config.eos_token_id is not None:
        return None
    return "config.json has no eos_token_id, which the export of a bart model needs: set model.config.eos_token_id."


BART = Architecture(
    family="bart",
    model_types=("bart",),
    stacks={
        "encoder": ENCODER,
        "decoder": replace(
            ENCODER,
            layers="decoder.layers",
            cross_attention=_attention("encoder_attn", "encoder_attn_layer_norm"),
            config=ConfigKeys(
                layers=("decoder_layers",), heads=("decoder_attention_heads",), ffn=("decoder_ffn_dim",)
            ),
            causal=True,
        ),
    },
    hidden_size=("d_model",),
    embeddings=("shared", "*coder.embed_tokens", "*coder.embed_positions"),
    embedding_outputs=("encoder.layernorm_embedding", "decoder.layernorm_embedding"),
    embedding_norms=("encoder.layernorm_embedding", "decoder.layernorm_embedding"),
    reads=("lm_head", "classification_head.out_proj", "qa_outputs"),
    writes=("*coder.layernorm_embedding",),
    both=("classification_head.dense",),
    width_constants=_width_constants,
    export_objection=_export_objection,
)
