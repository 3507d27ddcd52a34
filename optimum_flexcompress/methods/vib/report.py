"""What a pruning has removed, and what it attended to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...evaluation.pruning import PruningReport
from .attention import KINDS, probe_attention


def report_pruning(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Sequence[str] | Sequence[Mapping[str, torch.Tensor]] | None = None,
    log_history: Iterable[Mapping[str, Any]] = (),
) -> PruningReport:
    """Compares a pruned model with what it was pruned from.

    ```python
    dense = AutoModelForSequenceClassification.from_pretrained("fine-tuned")
    trainer.train()
    report = report_pruning(dense, trainer.model, tokenizer, texts, trainer.state.log_history)
    report.save("report")  # pruning.json and pictures
    ```

    Args:
        before: The model that the run started from.
        after: The pruned model.
        tokenizer: Their tokenizer, to probe attention.
        inputs: Texts or batches to probe attention on, see [`probe_attention`]; `None` leaves that out.
        log_history: Of the run, as `trainer.state` has it.

    Returns:
        The report.

    Raises:
        FlexCompressError: The second model was not made from the first by surgery, or attention cannot be probed.
    """
    attention = None
    if inputs is not None:
        inputs = list(inputs)
        shares = [probe_attention(model, tokenizer, inputs) for model in (before, after)]
        attention = {
            "kinds": list(KINDS),
            "tokens": shares[0].tokens,
            "before": shares[0].stacks,
            "after": shares[1].stacks,
        }
    return PruningReport.of(before, after, attention, log_history)
