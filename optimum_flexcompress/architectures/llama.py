"""LLaMA, and the families that share its layers (Mistral, Qwen2): grouped queries, gated feed-forward, RMS norms."""

from __future__ import annotations

from .base import Architecture, AttentionTable, ConfigKeys, FeedForwardTable, StackTable


LLAMA = Architecture(
    family="llama",
    model_types=("llama", "mistral", "qwen2"),
    stacks={
        "decoder": StackTable(
            layers="layers",
            attention=AttentionTable(
                module="self_attn",
                query="self_attn.q_proj",
                key="self_attn.k_proj",
                value="self_attn.v_proj",
                output="self_attn.o_proj",
                norm="input_layernorm",
                head_size="head_dim",
            ),
            ffn=FeedForwardTable(
                up=(("mlp.gate_proj", "mlp.up_proj"),), down="mlp.down_proj", norm="post_attention_layernorm"
            ),
            config=ConfigKeys(
                layers=("num_hidden_layers",),
                heads=("num_attention_heads",),
                kv_heads=("num_key_value_heads",),
                head_size=("head_dim",),
                ffn=("intermediate_size",),
                per_layer=("layer_types",),
            ),
            causal=True,
            final_norm="norm",
        )
    },
    hidden_size=("hidden_size",),
    embeddings=("embed_tokens",),
    embedding_outputs=("embed_tokens",),
    reads=("lm_head", "score", "qa_outputs"),
    writes=("norm",),
)
