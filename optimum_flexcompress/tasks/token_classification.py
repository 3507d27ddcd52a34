"""Token classification: a tag for each word, as in named-entity recognition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import DatasetDict
from sklearn.metrics import accuracy_score, f1_score
from transformers import DataCollatorForTokenClassification, EvalPrediction, PretrainedConfig, PreTrainedModel

from ..errors import FlexCompressError
from .base import Column, Prepared, Task, effective_length, first_output, load_pretrained, map_splits
from .labels import LabelMap, model_kwargs, without_unlabelled


IGNORED = -100


class TokenClassification(Task):
    """`AutoModelForTokenClassification`. The first piece of a word carries its tag; the others are ignored."""

    name = "token-classification"
    auto_class_name = "AutoModelForTokenClassification"
    ort_class_path = "optimum.onnxruntime:ORTModelForTokenClassification"
    main_metric = "f1"
    columns = (
        Column("tokens", ("tokens", "words")),
        Column("tags", ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels", "label")),
    )

    def load_processor(self, path: Any) -> Any:
        """See [`Task.load_processor`]; byte-level tokenizers are told that words come one by one."""
        tokenizer = super().load_processor(path)
        if getattr(tokenizer, "add_prefix_space", True) is False:
            pad_token = tokenizer.pad_token
            tokenizer = load_pretrained(type(tokenizer), path, add_prefix_space=True)
            tokenizer.pad_token = pad_token
        return tokenizer

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
        """See [`Task.prepare`]."""
        if not getattr(processor, "is_fast", False):
            raise FlexCompressError(
                f"{self.name} needs a fast tokenizer (one with a tokenizer.json), which this model does not have: save one beside it "
                "with AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)."
            )
        chosen = self.find_columns(data, columns)
        data = without_unlabelled(data, chosen["tags"])
        labels = LabelMap(data, chosen["tags"], label_names, model)
        length = effective_length(max_length, processor)

        def tokenise(rows: dict[str, list]) -> dict[str, list]:
            for words, tags in zip(rows[chosen["tokens"]], rows[chosen["tags"]]):
                if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
                    raise FlexCompressError(
                        f"Columns {chosen['tokens']!r} and {chosen['tags']!r} must hold lists of the same length, one "
                        f"tag for each word; a row has {words!r:.60} and {tags!r:.60}."
                    )
            encoded = processor(
                rows[chosen["tokens"]], is_split_into_words=True, truncation=True, max_length=length, padding=False
            )
            result = dict(encoded)
            result["labels"] = [
                _spread([labels(tag) for tag in tags], encoded.word_ids(row))
                for row, tags in enumerate(rows[chosen["tags"]])
            ]
            return result

        return Prepared(
            dataset=map_splits(data, tokenise),
            collator=DataCollatorForTokenClassification(processor, label_pad_token_id=IGNORED),
            compute_metrics=token_metrics(labels.names),
            label_names=labels.names,
            main_metric="f1",
            unit="share",
            model_kwargs=model_kwargs(labels.names),
        )


def _spread(tags: list[int], word_ids: list[int | None]) -> list[int]:
    previous, spread = None, []
    for word in word_ids:
        spread.append(IGNORED if word is None or word == previous else tags[word])
        previous = word
    return spread


def token_metrics(names: Sequence[str]):
    """Metrics for these tags: entity F1 where they are in a chunk scheme (`B-PER`, ...), macro F1 of tokens otherwise.

    Args:
        names: The tags, in the order of their ids.

    Returns:
        A `compute_metrics`.
    """
    chunked = any(name[:2] in ("B-", "I-") for name in names)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predicted = first_output(prediction.predictions).argmax(axis=-1)
        truth = np.asarray(prediction.label_ids)
        valid = truth != IGNORED
        result = {"accuracy": float(accuracy_score(truth[valid], predicted[valid]))}
        if not chunked:
            result["f1"] = float(f1_score(truth[valid], predicted[valid], average="macro", zero_division=0))
            return result
        right = found = wanted = 0
        for row, mask in enumerate(valid):
            mine = entities([names[tag] for tag in predicted[row][mask]])
            gold = entities([names[tag] for tag in truth[row][mask]])
            right, found, wanted = right + len(mine & gold), found + len(mine), wanted + len(gold)
        precision = right / found if found else 0.0
        recall = right / wanted if wanted else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        return {"f1": f1, "precision": precision, "recall": recall, **result}

    return compute


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities in a sequence of tags, read as the CoNLL scorer does.

    An entity ends where the kind changes, at `O`, before `B-` or `S-`, and after `E-` or `S-`; one that starts with
    `I-` counts too (IOB1, IOB2 and IOBES are all read).

    Args:
        tags: One tag for each word.

    Returns:
        `(kind, first, last)` for each entity, positions inclusive.
    """
    found, kind, start, closed = set(), None, 0, True
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, tag_kind = tag.partition("-")
        inside = prefix in ("B", "I", "E", "S") and bool(tag_kind)
        begins = inside and (closed or prefix in ("B", "S") or tag_kind != kind)
        if not closed and (begins or not inside):
            found.add((kind, start, position - 1))
            closed = True
        if begins:
            kind, start, closed = tag_kind, position, False
        if inside and prefix in ("E", "S"):
            found.add((kind, start, position))
            closed = True
    return found
