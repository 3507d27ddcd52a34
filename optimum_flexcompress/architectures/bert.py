"""BERT."""

from __future__ import annotations

from transformers import PretrainedConfig

from .base import Architecture, AttentionTable, ConfigKeys, FeedForwardTable, StackTable


ENCODER = StackTable(
    layers="encoder.layer",
    attention=AttentionTable(
        module="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        norm="attention.output.LayerNorm",
        head_size="attention_head_size",
        head_counts=("num_attention_heads",),
        widths=("all_head_size",),
    ),
    ffn=FeedForwardTable(up=(("intermediate.dense",),), down="output.dense", norm="output.LayerNorm"),
    config=ConfigKeys(layers=("num_hidden_layers",), heads=("num_attention_heads",), ffn=("intermediate_size",)),
    norm_first=False,
)

FIRST_TOKEN = {
    "ForSequenceClassification": True,
    "ForMultipleChoice": True,
    "ForNextSentencePrediction": True,
    "ForPreTraining": False,
    "Model": False,
}


def dropping_objection(config: PretrainedConfig) -> str | None:
    """Why the layers of a BERT-like encoder cannot drop tokens, if they cannot."""
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        return (
            f'its attention counts distances between the tokens that are left (position_embedding_type="{kind}"): use '
            "a model with absolute positions"
        )
    return None


EMBEDDINGS = ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings")

BERT = Architecture(
    family="bert",
    model_types=("bert",),
    stacks={"encoder": ENCODER},
    hidden_size=("hidden_size",),
    embeddings=EMBEDDINGS,
    embedding_outputs=("embeddings",),
    embedding_norms=("embeddings.LayerNorm",),
    reads=("classifier", "qa_outputs", "cls.predictions.decoder", "cls.seq_relationship"),
    writes=("embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"),
    both=("pooler.dense", "cls.predictions.transform.dense"),
    fixed=("cls.predictions.bias", "encoder.layer.*.attention.self.distance_embedding"),
    first_token=FIRST_TOKEN,
    dropping_objection=dropping_objection,
)
