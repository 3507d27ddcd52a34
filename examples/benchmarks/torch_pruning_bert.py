"""The baseline of `vib_text.py`: a BERT pruned by Torch-Pruning (extra `benchmarks`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch_pruning as tp
from transformers import BertForSequenceClassification

from optimum_flexcompress import ModelStructure
from optimum_flexcompress.config_sizes import write_sizes
from optimum_flexcompress.structure import count_parameters


TOLERANCE = 0.01
"""How much more than was requested may be left: aligned sizes are coarse, and the next smaller one may be far off."""


def prune(
    model: BertForSequenceClassification,
    importance: str,
    sparsity: float,
    dense: int,
    batches: Iterable[dict[str, torch.Tensor]],
    align: int = 8,
) -> BertForSequenceClassification:
    """Removes hidden dims, heads and FFN dims, all at the same pace, until the layers are as sparse as requested.

    Args:
        model: Pruned in place.
        importance: `magnitude` or `taylor`.
        sparsity: Share of the parameters of the layers that is to be gone.
        dense: Parameters of the layers before any pruning.
        batches: With labels; the gradients of their loss give the Taylor importance.
        align: Sizes of the residual stream and of FFNs are multiples of this.

    Returns:
        The model, with its sizes in its configuration, so that it is saved, loaded and exported like any other.
    """
    model.eval()
    scores = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    layers = model.bert.encoder.layer
    attentions = [layer.attention.self for layer in layers]
    example = torch.full((2, 16), 7)
    pruner = tp.pruner.BasePruner(
        model,
        {"input_ids": example, "attention_mask": torch.ones_like(example)},
        importance=scores[importance](),
        # Heads are ranked over all layers, and so are FFN dims.
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=0.98,
        head_pruning_ratio=0.98,
        # One head a step: it would take a layer's last head, or stop with an error where a step has none to take.
        iterative_steps=sum(attention.num_attention_heads for attention in attentions),
        ignored_layers=[model.classifier],
        num_heads={
            part: attention.num_attention_heads
            for attention in attentions
            for part in (attention.query, attention.key, attention.value)
        },
        prune_num_heads=True,
        prune_head_dims=False,
        round_to=align,
        output_transform=lambda output: output.logits.sum(),
    )
    model.zero_grad()
    if importance == "taylor":
        for batch in batches:
            model(**batch).loss.backward()
    wanted = (1 - sparsity) * dense * (1 + TOLERANCE)
    while count_parameters(model)["prunable"] > wanted and pruner.current_step < pruner.iterative_steps:
        for group in pruner.step(interactive=True):
            group.prune()
            if count_parameters(model)["prunable"] <= wanted:
                break
    model.zero_grad()
    for attention in attentions:
        attention.all_head_size = attention.query.out_features
        attention.num_attention_heads = attention.all_head_size // attention.attention_head_size
    write_sizes(model, ModelStructure.of(model), {})
    return model
