"""Text classification: kinds of problem, labels, metrics, and what mistakes say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from sklearn.metrics import f1_score
from transformers import BertConfig, EvalPrediction

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.tasks.metrics import ranks
from tests.tasks.toys import reviews, splits, word_tokenizer
from tests.tiny import build


TASK = get_task("text-classification")
TOKENIZER = word_tokenizer()


def prepare(data, **more):
    return TASK.prepare(data, TOKENIZER, **more)


def test_names_become_ids_and_rows_stay_unpadded():
    prepared = prepare(reviews())
    assert prepared.label_names == ["neg", "pos"]
    assert prepared.dataset["train"]["labels"][:] == [1, 0, 1, 0]
    assert prepared.dataset["test"]["input_ids"][1] == [2, TOKENIZER.convert_tokens_to_ids("bad"), 3]
    assert prepared.model_kwargs["id2label"] == {0: "neg", 1: "pos"}
    assert (prepared.main_metric, prepared.greater_is_better, prepared.generation) == ("accuracy", True, False)


def test_batches_are_padded_to_their_longest_row():
    prepared = prepare(reviews())
    batch = prepared.collator([prepared.dataset["test"][i] for i in range(2)])
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 0, 0, 0]
    assert torch.equal(batch["labels"], torch.tensor([1, 0]))


def test_max_length_counts_special_tokens():
    assert len(prepare(reviews(), max_length=4).dataset["test"]["input_ids"][0]) == 4


def test_pairs_of_texts():
    data = splits(train={"premise": ["good film"], "hypothesis": ["bad plot"], "label": [0]})
    row = prepare(data).dataset["train"][0]
    assert sum(row["token_type_ids"]) == 3 and len(row["input_ids"]) == 7


def test_a_question_and_a_sentence_are_a_pair():
    rows = {"question": ["who is good"], "sentence": ["the film"], "label": [0]}
    assert TASK.find_columns(splits(train=rows)) == {"text": "question", "text_pair": "sentence", "label": "label"}
    alone = TASK.find_columns(splits(train=rows), {"text": "sentence"})
    assert alone == {"text": "sentence", "label": "label"}


def test_the_training_split_names_the_columns_whatever_comes_first():
    data = splits(test={"text": ["bad"]}, train={"text": ["good", "bad"], "label": ["pos", "neg"]})
    assert list(prepare(data).dataset) == ["train"]


def test_an_empty_label_is_none():
    data = splits(train={"text": ["good", "bad", "film"], "label": ["pos", "neg", ""]})
    with pytest.raises(FlexCompressError, match="a row without a label: remove such rows"):
        prepare(data)
    data = splits(train={"text": ["good", "bad"], "label": ["pos", "neg"]}, test={"text": ["film"], "label": [""]})
    assert list(prepare(data).dataset) == ["train"] and prepare(data).label_names == ["neg", "pos"]


def test_a_split_without_the_texts():
    data = splits(train={"text": ["good"], "label": [0]}, test={"words": ["good"], "label": [0]})
    with pytest.raises(FlexCompressError, match="A split has no column 'text'.*it has words, label"):
        prepare(data)


def test_the_models_ids_count():
    config = BertConfig(id2label={0: "POS", 1: "NEG"}, label2id={"POS": 0, "NEG": 1})
    assert prepare(reviews(), model=config).dataset["train"]["labels"][:] == [0, 1, 0, 1]


def test_declared_ids_are_moved_to_the_models_by_name():
    data = splits(train={"text": ["good"] * 3, "label": [0, 1, 2]})
    names = ["contradiction", "entailment", "neutral"]
    data = data.cast_column("label", ClassLabel(names=names))
    config = BertConfig(id2label={0: "ENTAILMENT", 1: "NEUTRAL", 2: "CONTRADICTION"})
    prepared = prepare(data, model=config)
    assert prepared.dataset["train"]["labels"][:] == [2, 0, 1]
    assert prepare(data).label_names == names


def test_plain_ids_fit_named_classes_in_their_order():
    data = splits(test={"text": ["good", "bad"], "label": [1, 0]})
    config = BertConfig(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    prepared = prepare(data, model=config)
    assert prepared.label_names == ["negative", "positive"]
    assert prepared.dataset["test"]["labels"][:] == [1, 0]


def test_stars_from_one_to_five_are_five_classes():
    prepared = prepare(splits(train={"text": ["good"] * 5, "stars": [5, 4, 3, 2, 1]}))
    assert prepared.label_names == ["1", "2", "3", "4", "5"]
    assert prepared.dataset["train"]["labels"][:] == [4, 3, 2, 1, 0]


def test_a_class_missing_from_the_training_split_keeps_its_place():
    prepared = prepare(splits(train={"text": ["good"] * 3, "label": [0, 1, 3]}, test={"text": ["bad"], "label": [2]}))
    assert len(prepared.label_names) == 4 and prepared.dataset["test"]["labels"][:] == [2]


def test_several_labels_at_once():
    data = splits(train={"text": ["good", "bad", "film"], "labels": [["a", "b"], [], ["c"]]})
    prepared = prepare(data)
    assert prepared.label_names == ["a", "b", "c"]
    assert prepared.dataset["train"]["labels"][:] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert prepared.model_kwargs["problem_type"] == "multi_label_classification"
    logits = np.array([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])
    metrics = prepared.compute_metrics(EvalPrediction(logits, np.array(prepared.dataset["train"]["labels"][:])))
    # 2 of 3 predicted labels right, 2 of 3 true ones found; rows 2 and 3 are right as a whole.
    assert metrics["f1"] == pytest.approx(2 / 3) and metrics["accuracy"] == pytest.approx(2 / 3)


def test_regression():
    data = splits(train={"text": ["good", "bad"], "score": [0.5, 2.0]})
    prepared = prepare(data)
    assert prepared.dataset["train"]["labels"][:] == [0.5, 2.0] and prepared.model_kwargs["num_labels"] == 1
    whole = splits(train={"text": ["good", "bad"], "score": [1, 2]})
    assert prepare(whole, model=BertConfig(num_labels=1)).dataset["train"]["labels"][:] == [1.0, 2.0]
    truth, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([[1.0], [2.0], [3.0], [8.0]])
    metrics = prepared.compute_metrics(EvalPrediction(predicted, truth))
    assert metrics["mse"] == pytest.approx(4.0) and metrics["mae"] == pytest.approx(1.0)
    assert metrics["spearman"] == pytest.approx(1.0)
    assert metrics["pearson"] == pytest.approx(np.corrcoef(predicted[:, 0], truth)[0, 1])
    constant = prepared.compute_metrics(EvalPrediction(np.zeros((4, 1)), truth))
    assert constant["pearson"] == 0.0


def test_ties_share_their_rank():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_metrics_take_the_first_of_several_outputs():
    logits, labels = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), np.array([0, 1, 0])
    metrics = prepare(reviews()).compute_metrics(EvalPrediction((logits, np.zeros((3, 2, 2))), labels))
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["f1"] == pytest.approx(f1_score(labels, [0, 1, 1], average="macro"))


def test_splits_without_labels_are_left_out():
    data = splits(train={"text": ["good", "bad"], "label": [1, 0]}, test={"text": ["film"], "label": [-1]})
    assert set(prepare(data).dataset) == {"train"}
    with pytest.raises(FlexCompressError, match="No row has a label"):
        prepare(splits(test={"text": ["film"], "label": [-1]}))


def test_missing_columns_are_named_and_can_be_mapped():
    data = splits(train={"review": ["good"], "verdict": ["yes"], "n": [1]}).rename_column("review", "opinion")
    with pytest.raises(FlexCompressError, match="needs a column 'text'.*opinion, verdict, n.*--columns text=opinion"):
        prepare(data)
    prepared = prepare(data, columns={"text": "opinion", "label": "verdict"})
    assert prepared.label_names == ["yes"]
    with pytest.raises(FlexCompressError, match="no column 'opinions'"):
        prepare(data, columns={"text": "opinions"})
    with pytest.raises(FlexCompressError, match="no column role 'txt'.*text, text_pair, label"):
        prepare(data, columns={"txt": "opinion"})


def test_unknown_label_says_which_and_what_is_known():
    config = BertConfig(id2label={0: "positive", 1: "negative"}, label2id={"positive": 0, "negative": 1})
    data = splits(test={"text": ["good"], "label": ["positiv"]})
    with pytest.raises(FlexCompressError, match="'positiv', which is not a class. Did you mean \"positive\""):
        prepare(data, model=config)


def test_rows_that_are_no_text_or_have_no_label():
    with pytest.raises(FlexCompressError, match="row 1: None is no text"):
        prepare(splits(train={"text": ["good", None], "label": [0, 1]}))
    with pytest.raises(FlexCompressError, match="row without a label"):
        prepare(splits(train={"text": ["good", "bad"], "label": ["a", None]}))


def test_models_without_a_padding_token_get_one(tmp_path):
    build("gpt2", "GPT2ForSequenceClassification", pad_token_id=None).save_pretrained(tmp_path)
    word_tokenizer(pad_token=None, eos_token="[SEP]").save_pretrained(tmp_path)
    model, tokenizer = TASK.load_model(tmp_path), TASK.load_processor(tmp_path)
    assert model.config.pad_token_id == model.config.eos_token_id == 2
    assert tokenizer.pad_token == "[SEP]"


def test_loading_what_is_no_model(tmp_path):
    with pytest.raises(FlexCompressError, match="no folder"):
        TASK.load_model(tmp_path / "missing")
    with pytest.raises(FlexCompressError, match=r"holds no config\.json"):
        TASK.load_model(tmp_path)
    model = build("bert", "BertForSequenceClassification")
    model.save_pretrained(tmp_path)
    with pytest.raises(FlexCompressError, match="ignore_mismatched_sizes"):
        TASK.load_model(tmp_path, num_labels=7)
    assert TASK.load_model(tmp_path, num_labels=7, ignore_mismatched_sizes=True).num_labels == 7
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FlexCompressError, match="damaged"):
        TASK.load_model(tmp_path)


@pytest.mark.parametrize(("family", "name"), [("bert", "BertModel"), ("bart", "BartModel"), ("t5", "T5Model")])
def test_a_folder_without_a_tokenizer(tmp_path, family, name):
    build(family, name).save_pretrained(tmp_path)
    with pytest.raises(FlexCompressError, match="No tokenizer can be loaded from .*: save it beside the model"):
        TASK.load_processor(tmp_path)
