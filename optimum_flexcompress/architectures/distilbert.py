"""DistilBERT."""

from __future__ import annotations

from .base import Architecture, AttentionTable, ConfigKeys, FeedForwardTable, StackTable


DISTILBERT = Architecture(
    family="distilbert",
    model_types=("distilbert",),
    stacks={
        "encoder": StackTable(
            layers="transformer.layer",
            attention=AttentionTable(
                module="attention",
                query="attention.q_lin",
                key="attention.k_lin",
                value="attention.v_lin",
                output="attention.out_lin",
                norm="sa_layer_norm",
                head_size="attention_head_size",
                head_counts=("n_heads",),
                widths=("dim",),
            ),
            ffn=FeedForwardTable(up=(("ffn.lin1",),), down="ffn.lin2", norm="output_layer_norm"),
            config=ConfigKeys(layers=("n_layers",), heads=("n_heads",), ffn=("hidden_dim",)),
            norm_first=False,
            mask="attn_mask",
            hidden_output=-1,
        )
    },
    hidden_size=("dim",),
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
    embedding_outputs=("embeddings",),
    embedding_norms=("embeddings.LayerNorm",),
    reads=("classifier", "qa_outputs", "vocab_projector"),
    writes=("embeddings.LayerNorm", "vocab_layer_norm"),
    both=("pre_classifier", "vocab_transform"),
    first_token={"ForSequenceClassification": True, "ForMultipleChoice": True, "Model": False},
)
