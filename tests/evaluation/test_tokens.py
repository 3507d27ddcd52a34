"""Which words survive to which layer: what is found, and how it is shown."""

from __future__ import annotations

import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from optimum_flexcompress import LengthConfig, lengths_of, set_lengths
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import TokenTrace, plot_lengths, plot_words, trace_tokens
from optimum_flexcompress.evaluation.tokens import Word, step_name
from optimum_flexcompress.token_dropping import kept_positions
from tests.evaluation.test_report import Page
from tests.tasks.toys import word_tokenizer
from tests.tiny import build


PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "don",
    "'",
    "t",
    "un",
    "##block",
    "##ing",
    "my",
    "card",
    ".",
    "?",
]
TEXT = "Don't  unblocking my card?"


@pytest.fixture
def word_pieces(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=32)


@pytest.fixture
def model():
    return build("bert", "BertForSequenceClassification")


def shown(trace: TokenTrace) -> str:
    """The text as it is put together from pieces."""
    return "".join(" " * (word.space and index > 0) + word.text for index, word in enumerate(trace.words))


def test_pieces_are_joined_to_words(model, word_pieces):
    trace = trace_tokens(model, word_pieces, TEXT, lengths=[8, 5, 2])
    assert [word.pieces for word in trace.words] == [
        ["[CLS]"], ["Don"], ["'"], ["t"], ["un", "block", "ing"], ["my"], ["card"], ["?"], ["[SEP]"],
    ]  # fmt: skip
    assert shown(trace) == "[CLS] Don't unblocking my card? [SEP]"
    assert [word.special for word in trace.words] == [True, *[False] * 7, True]
    assert trace.tokens == 11 and trace.counts == [8, 5, 2] and trace.layers == 3
    assert lengths_of(model) is None


def test_kept_are_the_positions_that_the_model_keeps(model, word_pieces):
    set_lengths(model, [0.8, 0.5, 0.3], max_length=16)
    trace = trace_tokens(model, word_pieces, TEXT)
    encoded = word_pieces(TEXT, return_tensors="pt")
    assert trace.kept == [layer[0] for layer in kept_positions(model, encoded)]
    assert trace.counts == LengthConfig((0.8, 0.5, 0.3), "fractions").at(11)
    assert trace.lengths == lengths_of(model).to_dict()
    # Classification reads the first token.
    assert all(layer[0] == 0 for layer in trace.kept)


def test_a_model_that_keeps_everything(model, word_pieces):
    trace = trace_tokens(model, word_pieces, TEXT)
    assert trace.lengths is None and trace.counts == [11] * 3 and trace.steps() == [(0, 3)]
    assert "every layer keeps all" in trace.describe()


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>"], vocab_size=64, show_progress=False,
                                  initial_alphabet=[])  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), add_prefix_space=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=64)


def metaspace():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Replace("  ", " "), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(special_tokens=["<pad>", "</s>", "<unk>"], vocab_size=24, unk_token="<unk>",
                                      show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=64)


@pytest.mark.parametrize(("family", "name", "make"), [("bart", "BartModel", byte_level), ("t5", "T5Model", metaspace)])
def test_other_kinds_of_pieces(family, name, make):
    text = TEXT.replace("  ", " ")
    trace = trace_tokens(build(family, name), make(), text, lengths=[0.9, 0.6, 0.3])
    # The unigram model leaves some of the white space by itself.
    assert re.sub(r"</?s>|␣", "", shown(trace)).strip() == text
    assert any(len(word.pieces) > 1 for word in trace.words)
    assert trace.counts == LengthConfig((0.9, 0.6, 0.3), "fractions").at(trace.tokens)


def test_two_texts_and_separate_words(model):
    tokenizer = word_tokenizer()
    pair = trace_tokens(model, tokenizer, "where is anna", "anna lives in paris")
    assert shown(pair) == "[CLS] where is anna [SEP] anna lives in paris [SEP]"
    separate = trace_tokens(model, tokenizer, ["Anna", "lives", "in", "Paris"])
    assert shown(separate) == "[CLS] Anna lives in Paris [SEP]"


def test_long_texts_are_cut(model):
    tokenizer = word_tokenizer()
    assert trace_tokens(model, tokenizer, "good film " * 50).tokens == 64
    assert trace_tokens(model, tokenizer, "good film " * 50, max_length=10).tokens == 10


@pytest.mark.parametrize(
    ("family", "name", "tokens"), [("bert", "BertModel", 64), ("roberta", "RobertaModel", 62), ("t5", "T5Model", 102)]
)
def test_tokenizers_without_a_limit(family, name, tokens):
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = int(1e30)
    assert trace_tokens(build(family, name), tokenizer, "good film " * 50).tokens == tokens


def test_what_cannot_be_traced(model, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    with pytest.raises(FlexCompressError, match="BertTokenizer does not tell .* load the fast tokenizer"):
        trace_tokens(model, BertTokenizer(str(tmp_path / "vocab.txt")), TEXT)
    with pytest.raises(FlexCompressError, match="The lengths are for 2 layers"):
        trace_tokens(model, word_tokenizer(), "good film", lengths=[4, 2])
    with pytest.raises(FlexCompressError, match="is a decoder, which cannot drop tokens"):
        trace_tokens(build("gpt2", "GPT2LMHeadModel"), word_tokenizer(), "good film")


@pytest.fixture
def trace() -> TokenTrace:
    words = [
        Word(["[CLS]"], [3], special=True),
        Word(["un", "block"], [1, 3]),
        Word(["<b>$x$"], [0]),
        Word(["!"], [1], space=False),
        Word(["[SEP]"], [1], special=True),
    ]
    return TokenTrace(words, 3, LengthConfig((5, 2, 2)).to_dict())


def test_layers_that_drop_nothing_share_a_row(trace):
    assert trace.counts == [5, 2, 2] and trace.kept == [[0, 1, 2, 4, 5], [0, 2], [0, 2]]
    assert trace.steps() == [(0, 0), (1, 1), (2, 3)]
    assert [step_name(*step) for step in trace.steps()] == ["input", "layer 1", "layers 2–3"]
    assert step_name(0, 2) == "up to layer 2"
    assert TokenTrace.from_dict(trace.to_dict()) == trace


def test_the_page_shows_each_layer_and_fetches_nothing(trace):
    html = trace.to_html("My <title>")
    page = Page(html)
    assert page.fetched == [] and not re.search(r"@import|url\(|<script|<link", html)
    assert "My &lt;title&gt;" in html and "&lt;b&gt;$x$" in html and "prefers-color-scheme: dark" in html
    rows = re.findall(r"<li>(.*?)</li>", html, re.DOTALL)
    marked = [re.findall(r"<mark[^>]*>(.*?)</mark>", row) for row in rows]
    assert marked == [
        ["[CLS]", "un", "block", "&lt;b&gt;$x$", "!", "[SEP]"],
        ["[CLS]", "un", "block", "!", "[SEP]"],
        ["[CLS]", "block"],
    ]
    # What is dropped is no part of what is read aloud, and fades once it has been struck through.
    assert re.findall(r"<s [^>]*>", rows[1]) == ['<s aria-hidden="true">']
    assert re.findall(r'class="([^"]*)"', rows[2])[1:] == ["special", "gone", " special"]
    assert "6 tokens" in rows[0] and "2 tokens" in rows[2]


@pytest.mark.parametrize(
    ("ending", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".html", b"<!DOCTYPE html>")]
)
def test_saved_by_ending(trace, tmp_path, ending, start):
    assert trace.save(tmp_path / f"words{ending}").read_bytes().startswith(start)


def test_endings_that_are_no_picture(trace, tmp_path):
    with pytest.raises(FlexCompressError, match=r"words\.txt is no picture: .*\.png, \.svg, \.pdf"):
        trace.save(tmp_path / "words.txt")
    assert not list(tmp_path.iterdir())


def test_a_long_text_is_broken_into_lines(trace):
    short = plot_words(trace).get_size_inches()
    trace.words = trace.words * 40
    long = plot_words(trace)
    assert long.get_size_inches()[0] == short[0] and long.get_size_inches()[1] > 3 * short[1]
    texts = [text for axes in long.axes for text in axes.texts]
    renderer = FigureCanvasAgg(long).get_renderer()
    assert all(text.get_window_extent(renderer).x1 <= long.bbox.x1 for text in texts)


def test_bars_of_several_configurations(tmp_path):
    figure = plot_lengths({"a": [1.0, 0.5, 0.25], "b": [40, 30, 20]}, 64, tmp_path / "kept.png")
    heights = [[bar.get_height() for bar in group] for group in figure.axes[0].containers]
    assert heights == [[64, 32, 16], [40, 30, 20]]
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    whole = plot_lengths({"a": [1.0, 0.5], "full": "full"}, 10, layers=2)
    assert [bar.get_height() for bar in whole.axes[0].containers[1]] == [10, 10]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({}, "no length configuration to draw"),
        ({"full": None}, "full keeps all tokens: give layers="),
        ({"a": [3, 4]}, "more than the 3 of the layer before"),
    ],
)
def test_bars_that_cannot_be(lengths, message):
    with pytest.raises(FlexCompressError, match=message):
        plot_lengths(lengths, 10)
