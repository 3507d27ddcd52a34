"""GPT-2: one `Conv1D` computes query, key and value."""

from __future__ import annotations

from transformers import PretrainedConfig

from .base import Architecture, AttentionTable, ConfigKeys, FeedForwardTable, StackTable


def _objection(config: PretrainedConfig) -> str | None:
    if config.scale_attn_by_inverse_layer_idx:
        return (
            "this GPT-2 scales attention by the number of its layer (`scale_attn_by_inverse_layer_idx`), which a "
            "removed layer would change: use a GPT-2 without that option"
        )
    return None


GPT2 = Architecture(
    family="gpt2",
    model_types=("gpt2",),
    stacks={
        "decoder": StackTable(
            layers="h",
            attention=AttentionTable(
                module="attn",
                query="attn.c_attn",
                key="attn.c_attn",
                value="attn.c_attn",
                output="attn.c_proj",
                norm="ln_1",
                head_size="head_dim",
                head_counts=("num_heads",),
                widths=("split_size",),
            ),
            ffn=FeedForwardTable(up=(("mlp.c_fc",),), down="mlp.c_proj", norm="ln_2"),
            config=ConfigKeys(layers=("n_layer",), heads=("n_head",), ffn=("n_inner",)),
            causal=True,
            final_norm="ln_f",
        )
    },
    hidden_size=("n_embd",),
    embeddings=("wte", "wpe"),
    embedding_outputs=("wte", "wpe"),
    reads=("lm_head", "score", "qa_outputs", "classifier"),
    writes=("ln_f",),
    objection=_objection,
)
