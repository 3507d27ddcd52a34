"""Text to text with an encoder-decoder: translation, summarisation, transliteration."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PretrainedConfig, PreTrainedModel

from ..errors import FlexCompressError, MissingExtraError
from .base import Column, Prepared, Task, effective_length, map_splits, texts


IGNORED = -100


class Text2TextGeneration(Task):
    """`AutoModelForSeq2SeqLM`. Predictions are generated; `chrf` is the main figure, as it suits short outputs too."""

    name = "text2text-generation"
    auto_class_name = "AutoModelForSeq2SeqLM"
    ort_class_path = "optimum_flexcompress.modeling_ort:FlexORTModelForSeq2SeqLM"
    main_metric = "chrf"
    generation = True
    columns = (
        Column("source", ("source", "input", "document", "article", "dialogue", "body", "src", "text")),
        Column("target", ("target", "output", "summary", "highlights", "subject", "tgt", "label", "title")),
    )

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
        """See [`Task.prepare`]. `max_length` bounds source and target alike.

        With `model` (not just its configuration), batches also carry `decoder_input_ids`.
        """
        require_sacrebleu()
        data = _without_pairs(data, columns)
        chosen = self.find_columns(data, columns)
        for split in data.values():
            texts(split, chosen["source"])
            texts(split, chosen["target"])
        length = effective_length(max_length, processor)

        def tokenise(rows: dict[str, list]) -> dict[str, list]:
            result = dict(processor(rows[chosen["source"]], truncation=True, max_length=length, padding=False))
            targets = processor(text_target=rows[chosen["target"]], truncation=True, max_length=length, padding=False)
            result["labels"] = targets["input_ids"]
            return result

        network = model if isinstance(model, PreTrainedModel) else None
        return Prepared(
            dataset=map_splits(data, tokenise),
            collator=DataCollatorForSeq2Seq(processor, model=network, label_pad_token_id=IGNORED),
            compute_metrics=generation_metrics(processor),
            main_metric="chrf",
            unit="percent",
            generation=True,
        )


def require_sacrebleu() -> None:
    """Says early that the scorer is missing, rather than after training.

    Raises:
        MissingExtraError: It is.
    """
    if importlib.util.find_spec("sacrebleu") is None:
        raise MissingExtraError("sacrebleu", "report")


def _without_pairs(data: DatasetDict, columns: Mapping[str, str] | None) -> DatasetDict:
    """The `translation` column of the Hub (`{"en": ..., "de": ...}`) as one column for each language."""
    first = next(iter(data.values()))
    if "translation" not in first.column_names:
        return data
    pairs = first["translation"][0]
    if not isinstance(pairs, Mapping) or not columns or {"source", "target"} - set(columns):
        languages = ", ".join(pairs) if isinstance(pairs, Mapping) else "not a mapping"
        raise FlexCompressError(
            f"The column 'translation' holds several languages ({languages}): say which is which, for example "
            '--columns source=en target=de, or columns={"source": "en", "target": "de"}.'
        )
    return DatasetDict({name: split.flatten().rename_columns(_languages(split)) for name, split in data.items()})


def _languages(split: Any) -> dict[str, str]:
    flat = split.flatten().column_names
    return {name: name.partition(".")[2] for name in flat if name.startswith("translation.")}


def generation_metrics(tokenizer: Any):
    """Metrics of generated token ids.

    Args:
        tokenizer: Decodes them.

    Returns:
        A `compute_metrics`: sacrebleu's chrF and BLEU (0 to 100), the share of outputs that match exactly, the word
        error rate, and the mean number of generated tokens.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        ids = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        ids = np.asarray(ids)
        outputs = decode(ids, tokenizer)
        references = decode(np.asarray(prediction.label_ids), tokenizer)
        valid = (ids != IGNORED) & (ids != tokenizer.pad_token_id)
        return {**text_metrics(outputs, references), "generated_length": float(valid.sum(axis=-1).mean())}

    return compute


def decode(ids: np.ndarray, tokenizer: Any) -> list[str]:
    """Token ids `(B, N)`, -100 for padding, as texts without special tokens."""
    ids = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def text_metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compares texts with their references.

    Args:
        outputs: What was generated.
        references: One reference for each.

    Returns:
        `chrf` and `bleu` in 0 to 100, `exact_match` and `wer` as shares (`wer` may pass 1).
    """
    require_sacrebleu()
    from sacrebleu.metrics import BLEU, CHRF

    words = sum(len(reference.split()) for reference in references)
    errors = sum(edit_distance(output.split(), reference.split()) for output, reference in zip(outputs, references))
    return {
        "chrf": float(CHRF().corpus_score(list(outputs), [list(references)]).score),
        "bleu": float(BLEU().corpus_score(list(outputs), [list(references)]).score),
        "exact_match": float(np.mean([output == reference for output, reference in zip(outputs, references)])),
        "wer": errors / words if words else float(errors > 0),
    }


def edit_distance(left: Sequence[Any], right: Sequence[Any]) -> int:
    """The least number of insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(right) + 1))
    for i, item in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (item != other))
    return row[-1]
