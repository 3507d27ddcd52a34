"""ViT."""

from __future__ import annotations

from transformers import PretrainedConfig

from .base import Architecture, AttentionTable, ConfigKeys, FeedForwardTable, StackTable


def _objection(config: PretrainedConfig) -> str | None:
    if config.pooler_output_size != config.hidden_size:
        return "the pooler of this ViT has a width of its own (`pooler_output_size`): set it to `hidden_size`"
    return None


VIT = Architecture(
    family="vit",
    model_types=("vit",),
    stacks={
        "encoder": StackTable(
            layers="encoder.layer",
            attention=AttentionTable(
                module="attention.attention",
                query="attention.attention.query",
                key="attention.attention.key",
                value="attention.attention.value",
                output="attention.output.dense",
                norm="layernorm_before",
                head_size="attention_head_size",
                head_counts=("num_attention_heads",),
                widths=("all_head_size",),
            ),
            ffn=FeedForwardTable(up=(("intermediate.dense",),), down="output.dense", norm="layernorm_after"),
            config=ConfigKeys(
                layers=("num_hidden_layers",), heads=("num_attention_heads",), ffn=("intermediate_size",)
            ),
            final_norm="layernorm",
            mask=None,
            between=(("layernorm_after", 0), ("output", 1)),
        )
    },
    hidden_size=("hidden_size", "pooler_output_size"),
    embeddings=(
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection",
    ),
    embedding_outputs=("embeddings",),
    reads=("classifier", "decoder.0"),
    writes=("layernorm",),
    both=("pooler.dense",),
    objection=_objection,
    first_token={"ForImageClassification": True, "Model": False},
)
