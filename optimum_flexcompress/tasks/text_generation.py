"""Text generation with a causal language model, judged by its perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import DatasetDict
from transformers import DataCollatorForTokenClassification, PretrainedConfig, PreTrainedModel

from .base import Column, Prepared, Task, effective_length
from .language_modeling import IGNORED, make_blocks, perplexity_metrics, token_losses


class TextGeneration(Task):
    """`AutoModelForCausalLM`."""

    name = "text-generation"
    auto_class_name = "AutoModelForCausalLM"
    ort_class_path = "optimum_flexcompress.modeling_ort:FlexORTModelForCausalLM"
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
        """See [`Task.prepare`]. Texts are joined, an end token after each, and cut into blocks of `max_length`."""
        chosen = self.find_columns(data, columns)
        blocks = make_blocks(data, chosen["text"], processor, effective_length(max_length, processor), wrap=False)
        for name, split in blocks.items():
            blocks[name] = split.add_column("labels", split["input_ids"][:])
        return Prepared(
            dataset=blocks,
            collator=DataCollatorForTokenClassification(processor, label_pad_token_id=IGNORED),
            compute_metrics=perplexity_metrics(shift=True),
            main_metric="perplexity",
            greater_is_better=False,
            preprocess_logits=token_losses(shift=True),
        )
