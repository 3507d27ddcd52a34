"""Masked language modelling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from ..errors import FlexCompressError
from .base import Column, Prepared, Task, effective_length
from .language_modeling import IGNORED, make_blocks, perplexity_metrics, token_losses


MASKED_SHARE = 0.15
MASK_SEED = 0


class FillMask(Task):
    """`AutoModelForMaskedLM`.

    Training rows are masked anew in every batch (80 % masks, 10 % random, 10 % kept, as in BERT). The rows of the
    other splits are masked once, always the same tokens, so that models are compared on the same task.
    """

    name = "fill-mask"
    auto_class_name = "AutoModelForMaskedLM"
    ort_class_path = "optimum.onnxruntime:ORTModelForMaskedLM"
    main_metric = "perplexity"
    greater_is_better = False
    columns = (Column("text", ("text", "content", "document", "sentence")),)

    def prepare(
        self,
        data: DatasetDict,
        processor: Any,
        *,
        max_length: int = 128,
        columns: Mapping[str, str] | None = None,
        label_names: Sequence[str] | None = None,
        model: PreTrainedModel | PretrainedConfig | None = None,
    ) -> Prepared:
        """See [`Task.prepare`]. Texts are joined and cut into blocks of `max_length`."""
        if processor.mask_token_id is None:
            raise FlexCompressError(
                f"{self.name} needs a tokenizer with a mask token, which this model does not have: choose another task or model."
            )
        chosen = self.find_columns(data, columns)
        blocks = make_blocks(data, chosen["text"], processor, effective_length(max_length, processor), wrap=True)
        for name, split in blocks.items():
            if name != "train":
                blocks[name] = split.map(
                    lambda rows: mask_tokens(rows["input_ids"], processor),
                    batched=True,
                    batch_size=None,
                    keep_in_memory=True,
                    desc=f"Masking {name}",
                )
        return Prepared(
            dataset=blocks,
            collator=MaskingCollator(processor),
            compute_metrics=perplexity_metrics(shift=False),
            main_metric="perplexity",
            greater_is_better=False,
            preprocess_logits=token_losses(shift=False),
        )


class MaskingCollator:
    """Masks rows that are not masked yet; pads both kinds.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.random = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED_SHARE)
        self.fixed = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.fixed(rows) if "labels" in rows[0] else self.random(rows)


def mask_tokens(blocks: list[list[int]], tokenizer: Any, seed: int = MASK_SEED) -> dict[str, list[list[int]]]:
    """Masks 15 % of the tokens that are not special, at least one in each block, the same ones for the same seed.

    Args:
        blocks: Token ids.
        tokenizer: The tokenizer.
        seed: Of the choice.

    Returns:
        `input_ids` with masks and `labels` with the original ids there, -100 elsewhere.
    """
    generator = np.random.default_rng(seed)
    special = set(tokenizer.all_special_ids)
    masked, labels = [], []
    for block in blocks:
        ids = np.asarray(block)
        candidates = np.flatnonzero([token not in special for token in block])
        count = min(len(candidates), max(1, round(MASKED_SHARE * len(candidates))))
        chosen = generator.choice(candidates, size=count, replace=False) if count else candidates
        label = np.full_like(ids, IGNORED)
        label[chosen] = ids[chosen]
        ids = ids.copy()
        ids[chosen] = tokenizer.mask_token_id
        masked.append(ids.tolist())
        labels.append(label.tolist())
    return {"input_ids": masked, "labels": labels}
