"""Extractive question answering: windows over long contexts, and answers put together from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, EvalPrediction, PretrainedConfig, PreTrainedModel

from ..errors import FlexCompressError
from .base import Column, Prepared, Task, effective_length, texts
from .squad import squad_scores


# A question may fill half of its window, and windows overlap by a third, the usual 128 tokens of 384. From this
# length on, that leaves room to move forward beside the special tokens.
SHORTEST_WINDOW = 48
N_BEST = 20
LONGEST_ANSWER = 30


class QuestionAnswering(Task):
    """`AutoModelForQuestionAnswering`, on the flat SQuAD schema (`id`, `question`, `context`, `answers`)."""

    name = "question-answering"
    auto_class_name = "AutoModelForQuestionAnswering"
    ort_class_path = "optimum.onnxruntime:ORTModelForQuestionAnswering"
    main_metric = "f1"
    default_max_length = 384
    columns = (
        Column("question", ("question", "query")),
        Column("context", ("context", "passage", "paragraph")),
        Column("answers", ("answers", "answer")),
        Column("id", ("id", "question_id", "qid"), required=False),
    )

    def read_output(self, output: Any, batch: Mapping[str, Any]) -> Any:
        """Start and end logits."""
        return output["start_logits"], output["end_logits"]

    def prepare(
        self,
        data: DatasetDict,
        processor: Any,
        *,
        max_length: int = 384,
        columns: Mapping[str, str] | None = None,
        label_names: Sequence[str] | None = None,
        model: PreTrainedModel | PretrainedConfig | None = None,
    ) -> Prepared:
        """See [`Task.prepare`]. A context longer than `max_length` becomes several overlapping rows."""
        if not getattr(processor, "is_fast", False):
            raise FlexCompressError(
                f"{self.name} needs a fast tokenizer (one with a tokenizer.json), which this model does not have: save one beside it "
                "with AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)."
            )
        chosen = self.find_columns(data, columns)
        length = effective_length(max_length, processor)
        features, windows = DatasetDict(), {}
        for name, split in data.items():
            examples = _examples(split, chosen)
            features[name], origin, offsets = make_windows(examples, processor, length, name)
            windows[name] = Windows(examples, origin, offsets, *_positions(features[name]))
        return Prepared(
            dataset=features,
            collator=DataCollatorWithPadding(processor),
            compute_metrics=_metrics(windows),
            main_metric="f1",
            unit="percent",
            windows=windows,
        )


@dataclass
class Examples:
    """Questions in columns.

    Attributes:
        ids: A name for each question.
        questions: The questions.
        contexts: Where their answers are.
        answers: For each question its accepted answers, none where it has none.
        starts: Where each answer starts, in characters.
    """

    ids: list[str]
    questions: list[str]
    contexts: list[str]
    answers: list[list[str]]
    starts: list[list[int]]


@dataclass
class Windows:
    """Where the rows of a split come from.

    Attributes:
        examples: The questions.
        origin: For each row the index of its question.
        offsets: For each row `(N, 2)`, the characters of the context that each token covers; -1 elsewhere.
        start_positions: For each row the label.
        end_positions: For each row the label.
    """

    examples: Examples
    origin: np.ndarray
    offsets: list[np.ndarray]
    start_positions: np.ndarray
    end_positions: np.ndarray


def _examples(split: Dataset, chosen: Mapping[str, str]) -> Examples:
    ids = [str(value) for value in split[chosen["id"]]] if "id" in chosen else [str(i) for i in range(len(split))]
    if len(set(ids)) != len(ids):
        ids = [f"{value}#{index}" for index, value in enumerate(ids)]
    contexts = texts(split, chosen["context"])
    answers, starts = [], []
    for row, (value, context) in enumerate(zip(split[chosen["answers"]], contexts)):
        texts_, starts_ = _answer_lists(value, context, row, chosen["answers"])
        answers.append(texts_)
        starts.append(starts_)
    # The original data has questions with spaces in front; they only cost room.
    questions = [question.lstrip() for question in texts(split, chosen["question"])]
    return Examples(ids, questions, contexts, answers, starts)


def _answer_lists(value: Any, context: str, row: int, column: str) -> tuple[list[str], list[int]]:
    """Answers as the flat schema has them (a dict of lists), as a list of dicts, or as plain text."""
    if value is None or value == "" or value == []:
        return [], []
    if isinstance(value, str):
        value = [{"text": value, "answer_start": context.find(value)}]
    try:
        if isinstance(value, Mapping):
            found, starts = list(value["text"]), [int(start) for start in value["answer_start"]]
        else:
            found, starts = [item["text"] for item in value], [int(item["answer_start"]) for item in value]
    except (KeyError, TypeError) as error:
        raise FlexCompressError(
            f'Column {column!r}, row {row}: answers must look like {{"text": [...], "answer_start": [...]}}, '
            f"not {value!r:.80}."
        ) from error
    return found, starts


def make_windows(
    examples: Examples, tokenizer: Any, max_length: int, name: str = "data"
) -> tuple[Dataset, np.ndarray, list[np.ndarray]]:
    """Cuts questions with their contexts into overlapping windows.

    Args:
        examples: The questions.
        tokenizer: A fast tokenizer.
        max_length: Tokens of a window, question and special tokens included.
        name: Of the split, for the progress bar.

    Returns:
        The rows with `start_positions` and `end_positions` (the first token where the answer is not inside); for
        each row the index of its question; for each row the `(N, 2)` character offsets, -1 outside of the context.

    Raises:
        FlexCompressError: `max_length` leaves no room for a context.
    """
    if max_length < SHORTEST_WINDOW:
        raise FlexCompressError(
            f"max_length={max_length} leaves no room for a context beside its question: choose at least "
            f"{SHORTEST_WINDOW}."
        )
    question_first = tokenizer.padding_side == "right"
    pieces: dict[str, list] = {}
    origin: list[int] = []
    offsets: list[np.ndarray] = []
    for begin in tqdm(range(0, len(examples.ids), 256), desc=f"Preparing {name}", unit="batch", leave=False):
        rows = slice(begin, begin + 256)
        questions = [_shorten(text, tokenizer, max_length // 2) for text in examples.questions[rows]]
        contexts = examples.contexts[rows]
        encoded = tokenizer(
            *((questions, contexts) if question_first else (contexts, questions)),
            truncation="only_second" if question_first else "only_first",
            max_length=max_length,
            stride=max_length // 3,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False,
        )
        sample = encoded.pop("overflow_to_sample_mapping")
        mapping = encoded.pop("offset_mapping")
        starts, ends = [], []
        for row, source in enumerate(sample):
            inside = np.array([part == int(question_first) for part in encoded.sequence_ids(row)])
            spans = np.where(inside[:, None], np.asarray(mapping[row], dtype=np.int32), -1)
            origin.append(begin + source)
            offsets.append(spans)
            start, end = _label(examples, begin + source, spans)
            starts.append(start)
            ends.append(end)
        for key, values in encoded.items():
            pieces.setdefault(key, []).extend(values)
        pieces.setdefault("start_positions", []).extend(starts)
        pieces.setdefault("end_positions", []).extend(ends)
    return Dataset.from_dict(pieces), np.asarray(origin), offsets


def _shorten(question: str, tokenizer: Any, limit: int) -> str:
    # A token covers at least one character: short texts need no look.
    if len(question) <= limit:
        return question
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return question if len(encoded) <= limit else question[: encoded[limit - 1][1]]


def _label(examples: Examples, index: int, spans: np.ndarray) -> tuple[int, int]:
    """The tokens of the first answer; (0, 0), the first special token, where the window does not hold all of it."""
    if not examples.answers[index] or examples.starts[index][0] < 0:
        return 0, 0
    begin = examples.starts[index][0]
    end = begin + len(examples.answers[index][0])
    covering = np.flatnonzero((spans[:, 0] >= 0) & (spans[:, 0] < end) & (spans[:, 1] > begin))
    if not len(covering) or spans[covering[0], 0] > begin or spans[covering[-1], 1] < end:
        return 0, 0
    return int(covering[0]), int(covering[-1])


def _positions(features: Dataset) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(features["start_positions"]), np.asarray(features["end_positions"])


def answers_from_logits(
    windows: Windows, start_logits: np.ndarray, end_logits: np.ndarray, unanswerable: bool | None = None
) -> dict[str, str]:
    """The best answer to each question, over all of its windows.

    Candidates of a window are the pairs among its `N_BEST` best starts and ends that lie in the context, in order,
    at most `LONGEST_ANSWER` tokens long; the score is the sum of the two logits.

    Args:
        windows: Where the rows come from.
        start_logits: `(rows, N)`.
        end_logits: `(rows, N)`.
        unanswerable: Whether the empty answer is a candidate, scored at the first token (the least score over the
            windows counts); None: where some question of the split has no answer.

    Returns:
        Question id -> answer.
    """
    if unanswerable is None:
        unanswerable = not all(windows.examples.answers)
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    for row, (source, spans) in enumerate(zip(windows.origin, windows.offsets)):
        length = len(spans)
        start, end = start_logits[row, :length], end_logits[row, :length]
        null[source] = min(null.get(source, np.inf), float(start[0] + end[0]))
        inside = spans[:, 0] >= 0
        starts = _top(np.where(inside, start, -np.inf))
        ends = _top(np.where(inside, end, -np.inf))
        lengths = ends[None, :] - starts[:, None] + 1
        scores = start[starts][:, None] + end[ends][None, :]
        scores = np.where((lengths >= 1) & (lengths <= LONGEST_ANSWER), scores, -np.inf)
        if not scores.size or not np.isfinite(scores.max()):
            continue
        i, j = np.unravel_index(int(scores.argmax()), scores.shape)
        if source not in best or scores[i, j] > best[source][0]:
            context = windows.examples.contexts[source]
            best[source] = (float(scores[i, j]), context[spans[starts[i], 0] : spans[ends[j], 1]])
    answers = {}
    for source, key in enumerate(windows.examples.ids):
        score, text = best.get(source, (-np.inf, ""))
        answers[key] = "" if unanswerable and null.get(source, -np.inf) > score else text
    return answers


def _top(logits: np.ndarray) -> np.ndarray:
    order = np.argsort(-logits, kind="stable")[:N_BEST]
    return order[np.isfinite(logits[order])]


def find_windows(windows: Mapping[str, Windows], label_ids: Any, rows: int) -> Windows:
    """The split that predictions belong to, recognised by its labels.

    A Trainer hands over predictions and labels but not the name of the split.

    Raises:
        FlexCompressError: They belong to no whole split.
    """
    for window in windows.values():
        if len(window.origin) != rows:
            continue
        if label_ids is None or (
            np.array_equal(np.asarray(label_ids[0]).reshape(-1), window.start_positions)
            and np.array_equal(np.asarray(label_ids[1]).reshape(-1), window.end_positions)
        ):
            return window
    raise FlexCompressError(
        f"These {rows} predictions belong to no prepared split (sizes: "
        f"{ {name: len(window.origin) for name, window in windows.items()} }): evaluate whole splits; to use fewer "
        "examples, shorten the data set before `prepare`."
    )


def _metrics(windows: Mapping[str, Windows]):
    def compute(prediction: EvalPrediction) -> dict[str, float]:
        start, end = prediction.predictions[:2]
        window = find_windows(windows, prediction.label_ids, len(start))
        references = dict(zip(window.examples.ids, window.examples.answers))
        return squad_scores(answers_from_logits(window, start, end), references)

    return compute
