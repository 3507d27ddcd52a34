"""Reads one text file of records (CSV, TSV, JSON, JSON lines, plain text; packed or not) into a `datasets.Dataset`.

The files are read by this module rather than by the `datasets` builders because those guess: pandas turns the text
`null` into a missing value, a stray quote swallows the lines up to the next one, and a row with a field too many
shifts silently. Here a malformed line is an error that names the line.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
from pathlib import Path
from typing import Any, TextIO

import pyarrow
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from .errors import FlexCompressError


PACKED = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
INTEGER = re.compile(r"-?(0|[1-9]\d*)")
# Leading zeros make a code, not a number: 007 stays text.
NUMBER = re.compile(r"-?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def split_ending(path: str | Path) -> tuple[str, str]:
    """The name without endings, and the ending without packing: `dev.v1.tsv.xz` gives `("dev.v1", ".tsv")`."""
    path = Path(path)
    if path.suffix.lower() in PACKED:
        path = path.with_suffix("")
    return path.stem, path.suffix.lower()


def read_file(path: str | Path) -> Dataset:
    """Reads one file.

    Args:
        path: A file whose ending is one of `READERS`, optionally packed (`.xz`, `.gz`, `.bz2`), UTF-8.

    Returns:
        The rows, in memory, in the order of the file.

    Raises:
        FlexCompressError: The ending is not known, or the file is empty, malformed, truncated or not UTF-8.
    """
    path = Path(path)
    ending = split_ending(path)[1]
    if ending not in READERS:
        raise FlexCompressError(
            f"{path} has the ending {ending or 'none'!r}, which is not a data file: use one of {known_endings()}."
        )
    try:
        if ending == ".parquet":
            data = Dataset.from_parquet(str(path), keep_in_memory=True)
        else:
            opener = PACKED.get(path.suffix.lower(), open)
            with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
                data = READERS[ending](file, path)
    except UnicodeDecodeError as error:
        raise FlexCompressError(f"{path} is not UTF-8 text ({error.reason}): convert it to UTF-8 first.") from error
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise FlexCompressError(f"{path} cannot be unpacked ({error}): it is damaged, fetch it again.") from error
    except (pyarrow.ArrowException, DatasetGenerationError) as error:
        raise FlexCompressError(f"{path} cannot be read: it is damaged or no Parquet file; write it again.") from error
    except OSError as error:
        raise FlexCompressError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) == 0:
        raise FlexCompressError(f"{path} holds no rows: give a file with at least one example.")
    return data


def known_endings() -> str:
    """The endings as a sentence part."""
    return ", ".join(sorted(READERS)) + f" (also packed: {', '.join(PACKED)})"


def _read_csv(file: TextIO, path: Path) -> Dataset:
    return _read_table(file, path, {"delimiter": ",", "quotechar": '"', "strict": True})


def _read_tsv(file: TextIO, path: Path) -> Dataset:
    # Tab-separated values know no quoting: a quotation mark is text, as in SST-2.
    return _read_table(file, path, {"delimiter": "\t", "quoting": csv.QUOTE_NONE})


def _read_table(file: TextIO, path: Path, dialect: dict[str, Any]) -> Dataset:
    old_limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(file, **dialect)
        header = next(reader, None)
        if not header:
            raise FlexCompressError(f"{path} is empty: the first line must name the columns.")
        header = [name.strip() for name in header]
        doubled = sorted({name for name in header if header.count(name) > 1})
        if doubled:
            raise FlexCompressError(f"{path} has more than one column named {doubled[0]!r}: rename one.")
        columns: list[list[str]] = [[] for _ in header]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise FlexCompressError(
                    f"{path}, line {reader.line_num}: {len(row)} fields where the header has {len(header)} "
                    f"({', '.join(header)}); mend that line."
                )
            for column, field in zip(columns, row):
                column.append(field)
    except csv.Error as error:
        raise FlexCompressError(f"{path}, line {reader.line_num}: {error}; mend that line.") from error
    finally:
        csv.field_size_limit(old_limit)
    return Dataset.from_dict({name: _typed(column) for name, column in zip(header, columns)})


def _typed(column: list[str]) -> list[Any]:
    """Numbers where the whole column is numbers (empty fields become None), text as it is otherwise."""
    filled = [field for field in column if field]
    if filled and all(INTEGER.fullmatch(field) and len(field) < 19 for field in filled):
        return [int(field) if field else None for field in column]
    if filled and all(NUMBER.fullmatch(field) for field in filled):
        return [float(field) if field else None for field in column]
    return column


def _read_json(file: TextIO, path: Path) -> Dataset:
    text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        # `.json` is also a common name for JSON lines: then the first line is a whole value by itself.
        if error.msg == "Extra data":
            return _read_jsonl(io.StringIO(text), path)
        raise FlexCompressError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if isinstance(content, list) and content and isinstance(content[0], dict) and "paragraphs" in content[0]:
        return _from_records(flatten_squad(content, path), path)
    if isinstance(content, dict) and content and all(isinstance(column, list) for column in content.values()):
        lengths = {len(column) for column in content.values()}
        if len(lengths) != 1:
            raise FlexCompressError(f"{path}: the columns have different lengths, {sorted(lengths)}.")
        return Dataset.from_dict(content)
    if isinstance(content, list) and all(isinstance(record, dict) for record in content):
        return _from_records(content, path)
    raise FlexCompressError(
        f"{path} must hold a list of objects, an object of equally long lists, or the nested SQuAD schema."
    )


def _read_jsonl(file: TextIO, path: Path) -> Dataset:
    records = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FlexCompressError(f"{path}, line {number}: not valid JSON ({error.msg}).") from error
        if not isinstance(record, dict):
            raise FlexCompressError(f"{path}, line {number}: each line must be one JSON object.")
        records.append(record)
    return _from_records(records, path)


def _from_records(records: list[dict[str, Any]], path: Path) -> Dataset:
    """Rows to columns; a key missing from a record becomes None."""
    names = list(dict.fromkeys(name for record in records for name in record))
    try:
        return Dataset.from_dict({name: [record.get(name) for record in records] for name in names})
    except (TypeError, ValueError) as error:  # pyarrow's ArrowInvalid and ArrowTypeError are among these
        raise FlexCompressError(f"{path}: a column mixes types ({error}); give each column one type.") from error


def _read_txt(file: TextIO, path: Path) -> Dataset:
    return Dataset.from_dict({"text": [line.rstrip("\r\n") for line in file if line.strip()]})


def flatten_squad(articles: list[dict[str, Any]], path: Path | str = "the file") -> list[dict[str, Any]]:
    """The official nested SQuAD schema (1.1 and 2.0) as one record for each question.

    Args:
        articles: The list under `data`: articles of paragraphs of questions.
        path: Named in errors.

    Returns:
        Records with `id`, `title`, `context`, `question` and `answers`, the last one a dict of the lists `text` and
        `answer_start` (empty where the question has no answer).

    Raises:
        FlexCompressError: A paragraph or a question lacks a key of the schema.
    """
    records = []
    for article in articles:
        for paragraph in article.get("paragraphs", ()):
            try:
                context = paragraph["context"]
                for question in paragraph["qas"]:
                    answers = question.get("answers") or []
                    records.append(
                        {
                            "id": str(question.get("id", len(records))),
                            "title": article.get("title", ""),
                            "context": context,
                            "question": question["question"],
                            "answers": {
                                "text": [answer["text"] for answer in answers],
                                "answer_start": [int(answer["answer_start"]) for answer in answers],
                            },
                        }
                    )
            except KeyError as error:
                raise FlexCompressError(
                    f"{path} is not in the SQuAD schema: {error} is missing in {article.get('title', 'an article')!r}."
                ) from error
    return records


READERS = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": None,
}
