"""RoBERTa: BERT's encoder under other heads."""

from __future__ import annotations

from .base import Architecture
from .bert import EMBEDDINGS, ENCODER, FIRST_TOKEN, dropping_objection


ROBERTA = Architecture(
    family="roberta",
    model_types=("roberta", "xlm-roberta", "camembert"),
    stacks={"encoder": ENCODER},
    hidden_size=("hidden_size",),
    embeddings=EMBEDDINGS,
    embedding_outputs=("embeddings",),
    embedding_norms=("embeddings.LayerNorm",),
    reads=("classifier", "classifier.out_proj", "qa_outputs", "lm_head.decoder"),
    writes=("embeddings.LayerNorm", "lm_head.layer_norm"),
    both=("pooler.dense", "classifier.dense", "lm_head.dense"),
    fixed=("lm_head.bias", "encoder.layer.*.attention.self.distance_embedding"),
    first_token=FIRST_TOKEN,
    dropping_objection=dropping_objection,
    # Positions are counted from the one after that of padding, which has the id of the padding token.
    unused_positions=lambda config: config.pad_token_id + 1,
)
