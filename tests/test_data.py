"""Loading data: what each kind of source gives, and what each mistake says."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest
from datasets import Dataset, DatasetDict

from optimum_flexcompress.data import load_data, select_split, take
from optimum_flexcompress.errors import FlexCompressError


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_keeps_quotes_line_breaks_and_words_that_look_like_missing_values(tmp_path):
    file = write(tmp_path / "test.csv", 'text,label\n"a, ""b""\nc",0\nnull,1\nNA,1\n')
    data = load_data(file)
    assert list(data) == ["test"]
    assert data["test"]["text"][:] == ['a, "b"\nc', "null", "NA"]
    assert data["test"]["label"][:] == [0, 1, 1]


def test_tsv_has_no_quoting(tmp_path):
    file = write(tmp_path / "dev.tsv", 'sentence\tlabel\n"half a quote\t1\nit \'s " odd\t0\n')
    data = load_data(str(file))
    assert data["validation"]["sentence"][:] == ['"half a quote', "it 's \" odd"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["1", "-2", "0"], [1, -2, 0]),
        (["1", "", "3"], [1, None, 3]),
        (["1.5", "2", ".5e-1"], [1.5, 2.0, 0.05]),
        (["007", "1", "2"], ["007", "1", "2"]),
        (["1", "two", ""], ["1", "two", ""]),
        (["nan", "inf", "x"], ["nan", "inf", "x"]),
    ],
)
def test_columns_of_numbers_become_numbers(tmp_path, fields, expected):
    file = write(tmp_path / "train.csv", "id,value\n" + "".join(f"r{i},{field}\n" for i, field in enumerate(fields)))
    values = load_data(file)["train"]["value"][:]
    assert values == expected and [type(value) for value in values] == [type(value) for value in expected]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_json_lines_and_missing_keys(tmp_path, ending):
    file = write(tmp_path / f"train{ending}", '{"text": "a", "label": 1}\n\n{"text": "b"}\n')
    data = load_data(file)["train"]
    assert data["text"][:] == ["a", "b"]
    assert data["label"][:] == [1, None]


@pytest.mark.parametrize(
    "content", [[{"a": 1}, {"a": 2}], {"a": [1, 2]}, {"data": [{"a": 1}, {"a": 2}], "version": "3"}]
)
def test_json_shapes(tmp_path, content):
    file = write(tmp_path / "data.json", json.dumps(content))
    assert load_data(file)["train"]["a"][:] == [1, 2]


SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "City",
            "paragraphs": [
                {
                    "context": "Anna moved to Paris.",
                    "qas": [
                        {"id": "q1", "question": "Where?", "answers": [{"text": "Paris", "answer_start": 14}]},
                        {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def test_nested_squad_is_flattened_to_the_schema_of_the_hub(tmp_path):
    with lzma.open(tmp_path / "dev-v2.0.json.xz", "wt", encoding="utf-8") as file:
        json.dump(SQUAD, file)
    data = load_data(tmp_path / "dev-v2.0.json.xz")["validation"]
    assert data[0] == {
        "id": "q1",
        "title": "City",
        "context": "Anna moved to Paris.",
        "question": "Where?",
        "answers": {"text": ["Paris"], "answer_start": [14]},
    }
    assert data[1]["answers"] == {"text": [], "answer_start": []}


def test_folder_of_packed_files_named_by_split(tmp_path):
    with lzma.open(tmp_path / "train.csv.xz", "wt") as file:
        file.write("text,label\na,x\n")
    with gzip.open(tmp_path / "dev.csv.gz", "wt") as file:
        file.write("text,label\nb,y\n")
    write(tmp_path / "test-labeled.csv", "text,label\nc,x\n")
    write(tmp_path / "notes.csv", "nothing\n1\n")
    data = load_data(tmp_path)
    assert {name: split["text"][0] for name, split in data.items()} == {"train": "a", "validation": "b", "test": "c"}


def test_text_lines(tmp_path):
    file = write(tmp_path / "train.txt", "one\n\n two \n")
    assert load_data(file)["train"]["text"][:] == ["one", " two "]


def test_saved_data_sets(tmp_path):
    split = Dataset.from_dict({"text": ["a"]})
    DatasetDict({"train": split, "dev": split}).save_to_disk(tmp_path / "both")
    split.save_to_disk(tmp_path / "one")
    assert set(load_data(tmp_path / "both")) == {"train", "validation"}
    assert set(load_data(tmp_path / "one")) == {"train"}


def test_objects_pass_through():
    split = Dataset.from_dict({"text": ["a"]})
    assert load_data(split)["train"]["text"][:] == ["a"]
    assert set(load_data(DatasetDict({"val": split}))) == {"validation"}


def test_image_folder(tmp_path):
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "train" / label).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / label / "1.png")
    data = load_data(tmp_path)
    assert data["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("data.xlsx", "x", "'.xlsx'"),
        ("train.csv", "", "is empty"),
        ("train.csv", "text,label\n", "no rows"),
        ("train.csv", "text,label\na,b,c\n", "line 2: 3 fields where the header has 2"),
        ("train.csv", 'text,label\n"a,b\n', "line 2"),
        ("train.csv", "text,text\na,b\n", "more than one column named 'text'"),
        ("train.json", "{", "not valid JSON"),
        ("train.json", "3", "must hold a list of objects"),
        ("train.json", '{"a": [1], "b": [1, 2]}', "different lengths"),
        ("train.jsonl", '{"a": 1}\n[2]\n', "line 2"),
        ("train.jsonl", '{"a": 1}\n{"a": "x"}\n', "mixes types"),
        ("train.jsonl", "", "no rows"),
        ("train.json", '{"data": [{"title": "T", "paragraphs": [{"qas": []}]}]}', "'context' is missing in 'T'"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, text, words):
    file = write(tmp_path / name, text)
    with pytest.raises(FlexCompressError, match=words) as caught:
        load_data(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(FlexCompressError, match="not UTF-8"):
        load_data(tmp_path / "train.csv")


def test_truncated_archive(tmp_path):
    packed = lzma.compress(("text,label\n" + "abc,1\n" * 5000).encode())
    (tmp_path / "train.csv.xz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(FlexCompressError, match="cannot be unpacked"):
        load_data(tmp_path / "train.csv.xz")


def test_missing_paths_do_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_flexcompress.data._load_from_hub", lambda spec: pytest.fail("asked the Hub"))
    for spec in (tmp_path / "no.csv", "train.csv", "./folder", "a/b/c"):
        with pytest.raises(FlexCompressError, match="no file or folder"):
            load_data(spec)


def test_unreachable_hub_is_one_sentence(monkeypatch):
    from requests.exceptions import ConnectionError as Unreachable

    def fail(*args, **kwargs):
        raise Unreachable("Max retries exceeded with url: /api")

    monkeypatch.setattr("optimum_flexcompress.data.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    with pytest.raises(FlexCompressError, match="cannot be reached") as caught:
        load_data("owner/name")
    assert "\n" not in str(caught.value)


def test_without_the_hub_a_data_set_that_is_not_in_the_cache_is_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr("optimum_flexcompress.data.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("optimum_flexcompress.data.load_dataset", fail)
    with pytest.raises(FlexCompressError) as caught:
        load_data("owner/name")
    assert str(caught.value) == (
        "owner/name is no file or folder here, and HF_HUB_OFFLINE is set while the data set is not in the cache: give a "
        "path, or unset HF_HUB_OFFLINE."
    )


def test_folder_without_data(tmp_path):
    write(tmp_path / "readme.md", "x")
    with pytest.raises(FlexCompressError, match=r"found: readme\.md"):
        load_data(tmp_path)


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(FlexCompressError, match="damaged or no Parquet file"):
        load_data(tmp_path / "train.parquet")


def test_two_files_for_one_split(tmp_path):
    write(tmp_path / "dev.csv", "a\n1\n")
    write(tmp_path / "val.csv", "a\n1\n")
    with pytest.raises(FlexCompressError, match="two files for the split 'validation'"):
        load_data(tmp_path)


def test_splits_get_their_usual_names():
    one = Dataset.from_dict({"a": [1]})
    names = ["train_sft", "validation_matched", "validation_mismatched", "test_matched", "unsupervised"]
    loaded = load_data(DatasetDict(dict.fromkeys(names, one)))
    assert list(loaded) == ["train", "validation", "validation_mismatched", "test", "unsupervised"]
    # The exact name goes before one that only begins like it.
    loaded = load_data(DatasetDict(dict.fromkeys(("Train", "test_hard", "testing", "dev", "val_extra"), one)))
    assert list(loaded) == ["train", "test_hard", "test", "validation", "val_extra"]


@pytest.mark.parametrize(
    "names", [("dev", "validation"), ("training", "train"), ("eval", "test"), ("Dev", "val", "dev")]
)
def test_no_split_is_lost_to_another_of_its_kind(names):
    splits = {name: Dataset.from_dict({"a": [name]}) for name in names}
    loaded = load_data(DatasetDict(splits))
    assert sorted(split["a"][0] for split in loaded.values()) == sorted(names)
    usual = {"training": "train", "eval": "test"}.get(names[0], "validation")
    if usual in names:
        assert loaded[usual]["a"][0] == usual


def test_select_split():
    one = Dataset.from_dict({"a": [1]})
    data = DatasetDict({"train": one, "validation": one})
    assert select_split(data) == "validation"
    assert select_split(data, "dev") == "validation"
    with pytest.raises(FlexCompressError, match="no split 'test'.*Known: train, validation"):
        select_split(data, "test")


def test_take_is_random_ordered_and_repeatable():
    data = Dataset.from_dict({"a": list(range(100))})
    rows = take(data, 10)["a"][:]
    assert rows == sorted(set(rows)) and len(rows) == 10 and rows != list(range(10))
    assert take(data, 10)["a"][:] == rows != take(data, 10, seed=1)["a"][:]
    assert len(take(data, 1000)) == len(take(data, None)) == 100
    with pytest.raises(FlexCompressError, match="at least 1"):
        take(data, 0)
