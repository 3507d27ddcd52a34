"""Attention probing: shares on maps that are known, tokens by kind, and every family that reads text."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from optimum_flexcompress import FlexCompressError
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.evaluation.pruning import PruningReport
from optimum_flexcompress.kept import Kept, KeptLayer
from optimum_flexcompress.methods.vib import probe_attention, report_pruning
from optimum_flexcompress.methods.vib.attention import KINDS, attention_shares, token_kinds
from optimum_flexcompress.surgery import select
from tests.methods.toys import model_of
from tests.methods.vib.helpers import trainer_of


SPECIAL, CURRENT, PREVIOUS, NEXT, CONTENT, OTHER = range(6)
TEXTS = ["the card is lost , again", "my", "where is the transfer of money", "card money card"]
TEXT_FAMILIES = ["bert", "roberta", "distilbert", "gpt2", "llama", "t5", "bart"]


@pytest.fixture(scope="module")
def tokenizer():
    words = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        ",",
        *sorted({word for text in TEXTS for word in text.split()} - {","}),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_shares_of_constructed_attention():
    """Five tokens, [CLS] word word function [SEP], then a pad; each head attends to one thing only."""
    kinds = torch.tensor([[SPECIAL, CONTENT, CONTENT, OTHER, SPECIAL, SPECIAL]])
    valid = torch.tensor([[True] * 5 + [False]])
    length = 6
    to_first = torch.zeros(length, length)
    to_first[:, 0] = 1
    itself = torch.eye(length)
    # The last token and the pad have nothing after them, and attend to the first word.
    after = torch.zeros(length, length)
    after[range(4), range(1, 5)] = 1
    after[4, 1] = after[5, 1] = 1
    uniform = torch.full((length, length), 0.2)
    uniform[:, 5] = 0
    maps = torch.stack([to_first, itself, after, uniform])[None]
    shares = attention_shares(maps, kinds, valid) / 5
    torch.testing.assert_close(shares.sum(-1), torch.ones(4, dtype=torch.float64))
    expected = {
        0: {SPECIAL: 1.0},
        # Of the five tokens two are special.
        1: {SPECIAL: 0.4, CURRENT: 0.6},
        # 0->1, 1->2, 2->3 are next words, 3->4 a special one, 4->1 content far away.
        2: {NEXT: 0.6, SPECIAL: 0.2, CONTENT: 0.2},
        # 2 of 5 tokens special; next to words: 0 has the next, 1 itself and next, 2 all three, 3 itself and previous,
        # 4 the previous; the rest are content (1, 2) or other (3).
        3: {
            SPECIAL: 0.4,
            CURRENT: 3 / 25,
            PREVIOUS: 3 / 25,
            NEXT: 3 / 25,
            CONTENT: 4 / 25,
            OTHER: 2 / 25,
        },
    }
    for head, wanted in expected.items():
        row = torch.tensor([wanted.get(kind, 0.0) for kind in range(6)], dtype=torch.float64)
        torch.testing.assert_close(shares[head], row, msg=lambda text, head=head: f"head {head}: {text}")


def test_kinds_of_tokens(tokenizer):
    encoded = tokenizer(TEXTS[0])
    kinds = token_kinds([*encoded.input_ids, 0], [*encoded.attention_mask, 0], tokenizer)
    #        [CLS]    the    card     is     lost     ,      again    [SEP]    pad
    assert kinds == [SPECIAL, OTHER, CONTENT, OTHER, CONTENT, OTHER, CONTENT, SPECIAL, SPECIAL]
    own = token_kinds(encoded.input_ids, encoded.attention_mask, tokenizer, function_words={"card"})
    assert own == [SPECIAL, CONTENT, OTHER, CONTENT, CONTENT, OTHER, CONTENT, SPECIAL]


def test_parts_of_words_share_the_kind_of_the_word():
    """`un ##believ ##able` is content in all its parts, and so are `isn` and `t` function words."""
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "un", "##believ", "##able", "isn", "'", "t", "it"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    kinds = token_kinds([1, 10, 7, 8, 9, 4, 5, 6, 2], [1] * 9, fast)
    assert kinds == [SPECIAL, OTHER, OTHER, OTHER, OTHER, CONTENT, CONTENT, CONTENT, SPECIAL]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_every_family(family, tokenizer):
    model = model_of(family, layers=2, hidden=16, heads=2)
    attention = model.config._attn_implementation
    shares = probe_attention(model, tokenizer, TEXTS, batch_size=3)
    assert set(shares.stacks) == set(describe(model).stacks)
    for name, stack in describe(model).stacks.items():
        values = torch.tensor(shares.stacks[name])
        assert values.shape == (2, stack.layers[0].attention.num_heads, len(KINDS))
        torch.testing.assert_close(values.sum(-1), torch.ones(values.shape[:2]))
        assert (values[..., NEXT] == 0).all() == stack.is_causal
        assert values[..., CURRENT].min() > 0
    # Nothing is left behind, and padding changes nothing.
    assert model.config._attn_implementation == attention
    alone = probe_attention(model, tokenizer, TEXTS, batch_size=1)
    for name, layers in shares.stacks.items():
        torch.testing.assert_close(torch.tensor(alone.stacks[name]), torch.tensor(layers), rtol=1e-4, atol=1e-5)


def test_probing_agrees_with_the_models_own_maps(tokenizer):
    model = model_of("bert", layers=2, hidden=16, heads=2)
    batch = dict(tokenizer(TEXTS[:1], return_tensors="pt"))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    shares = probe_attention(model, tokenizer, [batch])
    length = batch["input_ids"].shape[1]
    for layer, found in zip(maps, shares.stacks["encoder"]):
        to_special = layer[0, :, :, [0, length - 1]].sum(-1).mean(-1)
        torch.testing.assert_close(torch.tensor(found)[:, SPECIAL], to_special)


def test_heads_that_stay_keep_their_shares(tokenizer):
    """Nothing but other heads of the first layer goes, so its heads attend as before, under their old numbers."""
    before = model_of("bert", layers=2, hidden=32, heads=4)
    layers = [KeptLayer(0, attention=[1, 3]), KeptLayer(1, attention=[], ffn=[])]
    after = select(copy.deepcopy(before), Kept(None, {"encoder": layers}))
    report = report_pruning(before, after, tokenizer, TEXTS)
    first, second = report.stacks["encoder"]
    assert (first.heads, first.kept_heads, first.kept_ffn, first.ffn) == (4, [1, 3], 64, 64)
    assert (second.heads, second.kept_heads, second.kept_ffn) == (4, [], 0)
    then, now = report.attention["before"]["encoder"], report.attention["after"]["encoder"]
    assert [value is not None for value in now[0]] == [False, True, False, True] and now[1] == [None] * 4
    torch.testing.assert_close(torch.tensor([now[0][1], now[0][3]]), torch.tensor([then[0][1], then[0][3]]))
    assert not torch.allclose(torch.tensor(then[0][1]), torch.tensor(then[0][3]), atol=1e-3)


def test_groups_of_query_heads(tokenizer):
    before = model_of("llama", layers=2, hidden=32, heads=2)
    after = select(copy.deepcopy(before), Kept(None, {"decoder": [KeptLayer(0, attention=[1]), KeptLayer(1)]}))
    report = report_pruning(before, after, tokenizer, TEXTS)
    assert report.stacks["decoder"][0].kept_heads == [2, 3] and report.stacks["decoder"][1].kept_heads == [0, 1, 2, 3]
    then, now = report.attention["before"]["decoder"][0], report.attention["after"]["decoder"][0]
    assert now[:2] == [None, None]
    torch.testing.assert_close(torch.tensor(now[2:]), torch.tensor(then[2:]))


def test_a_run_from_end_to_end(tmp_path, tokenizer):
    before = model_of("bert", layers=2, hidden=32, heads=4)
    trainer = trainer_of(tmp_path, model=copy.deepcopy(before), steps=60, logging_steps=5)
    trainer.train()
    report = report_pruning(before, trainer.model, tokenizer, TEXTS, trainer.state.log_history)
    assert report.sparsity == pytest.approx(0.5, abs=0.006)
    assert [entry["step"] for entry in report.curves] == list(range(5, 65, 5))
    assert {"vib_sparsity", "vib_target", "loss", "loss_task"} <= set(report.curves[0])
    # The weights of the values are fine-tuned but hardly moved: a kept head is the one that its number says.
    for index, (layer, now) in enumerate(
        zip(report.stacks["encoder"], describe(trainer.model).stacks["encoder"].layers)
    ):
        assert len(layer.kept_heads) == (now.attention.num_heads if now.attention else 0)
        if not now.attention or report.hidden["kept"] != report.hidden["of"]:
            continue
        dense = describe(before).stacks["encoder"].layers[index].attention.v.module.weight.unflatten(0, (4, 8))
        for place, head in enumerate(layer.kept_heads):
            value = now.attention.v.module.weight.unflatten(0, (-1, 8))[place]
            assert (dense - value).flatten(1).norm(dim=1).argmin() == head
    trainer.save_model(str(tmp_path / "out"))
    loaded = type(before).from_pretrained(tmp_path / "out")
    assert report_pruning(before, loaded).stacks == report.stacks
    report.save(tmp_path / "out")
    assert PruningReport.load(tmp_path / "out") == report


def test_what_cannot_be_probed(tokenizer):
    with pytest.raises(FlexCompressError, match="ViTForImageClassification reads no text"):
        probe_attention(model_of("vit"), tokenizer, TEXTS)
    bert = model_of("bert")
    with pytest.raises(FlexCompressError, match="Give a list of texts"):
        probe_attention(bert, tokenizer, "a text")
    with pytest.raises(FlexCompressError, match="There is no text to probe attention on: give at least one"):
        probe_attention(bert, tokenizer, [])
    with pytest.raises(FlexCompressError, match="has a decoder: give batches with decoder_input_ids"):
        probe_attention(model_of("t5"), tokenizer, [{"input_ids": torch.tensor([[1, 5, 2]])}])
    other = model_of("bert", layers=2, hidden=32, heads=4)
    select(other, Kept(None, {"encoder": [KeptLayer(0, attention=[1]), KeptLayer(1)]}))
    with pytest.raises(FlexCompressError, match="It is not known which heads of the model before are left"):
        report_pruning(model_of("gpt2"), other)
    with pytest.raises(FlexCompressError, match="It is not known which heads of the model before are left"):
        report_pruning(model_of("bert", layers=2, hidden=16, heads=2), other)
