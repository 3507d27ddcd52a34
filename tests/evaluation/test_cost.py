"""MACs against the closed form, sizes, parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from optimum_flexcompress import ModelStructure, resize
from optimum_flexcompress.evaluation import count_macs, count_parameters, file_size
from optimum_flexcompress.evaluation.cost import skeleton
from optimum_flexcompress.structure import AttentionSize
from optimum_flexcompress.tasks import get_task
from tests.tiny import VOCABULARY, build


B, N, M = 2, 11, 5
H, F, LAYERS, HEAD = 32, 40, 3, 8


def ids(length: int, padded: bool = False) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (B, length), generator=torch.Generator().manual_seed(0))


def self_attention(length: int, width: int) -> int:
    """q, k, v, o, and the two products of attention; `width` is heads x head size."""
    return length * 4 * H * width + 2 * length**2 * width


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_bert(attention, padded):
    model = build("bert", "BertForSequenceClassification", attn_implementation=attention)
    mask = torch.ones(B, N, dtype=torch.long)
    mask[0, 6:] = 0 if padded else 1
    expected = LAYERS * (self_attention(N, H) + N * 2 * H * F) + H * H + H * 3
    assert count_macs(model, {"input_ids": ids(N), "attention_mask": mask}) == B * expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt2(attention):
    model = build("gpt2", "GPT2LMHeadModel", attn_implementation=attention)
    expected = LAYERS * (self_attention(N, H) + N * 2 * H * F) + N * H * VOCABULARY
    assert count_macs(model, {"input_ids": ids(N)}) == B * expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_with_shared_key_value_heads(attention):
    model = build("llama", "LlamaForCausalLM", attn_implementation=attention)
    # Keys and values have half as many heads; the products of attention have all of them.
    attend = N * (2 * H * H + 2 * H * H // 2) + 2 * N**2 * H
    expected = LAYERS * (attend + N * 3 * H * F) + N * H * VOCABULARY
    # The angles of the rotary embedding are a product too, once for the whole batch.
    assert count_macs(model, {"input_ids": ids(N)}) == B * expected + N * HEAD // 2


def test_t5():
    model = build("t5", "T5ForConditionalGeneration")
    encoder = self_attention(N, H) + N * 2 * H * F
    cross = M * 2 * H * H + N * 2 * H * H + 2 * M * N * H
    decoder = self_attention(M, H) + cross + M * 2 * H * F
    expected = LAYERS * (encoder + decoder) + M * H * VOCABULARY
    assert count_macs(model, {"input_ids": ids(N), "decoder_input_ids": ids(M)}) == B * expected


def test_a_compressed_model_is_counted_at_its_own_sizes(tmp_path):
    model = build("bert", "BertForSequenceClassification")
    whole = ModelStructure.of(model)
    first, second, third = whole.stacks["encoder"].layers
    layers = (
        replace(first, attention=AttentionSize(1, 1, HEAD)),
        replace(second, ffn=7),
        replace(third, attention=None),
    )
    structure = replace(whole, stacks={"encoder": replace(whole.stacks["encoder"], layers=layers)})
    resize(model, structure)
    expected = self_attention(N, HEAD) + self_attention(N, H) + N * 2 * H * (F + 7 + F) + H * H + H * 3
    inputs = {"input_ids": ids(N)}
    assert count_macs(model, inputs) == B * expected
    # And so is one that only the folder's configuration describes, as beside ONNX files.
    model.save_pretrained(tmp_path)
    again = skeleton(tmp_path, get_task("text-classification"))
    assert count_macs(again, inputs) == B * expected
    assert count_parameters(again) == count_parameters(model)


def test_counting_keeps_the_mode_and_ties_count_once():
    model = build("gpt2", "GPT2LMHeadModel").train()
    count_macs(model, {"input_ids": ids(N)})
    assert model.training
    tied = nn.Linear(4, 4, bias=False)
    assert count_parameters(nn.ModuleList([tied, tied])) == 16


def test_only_weights_count_as_size(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 1000)
    assert file_size(tmp_path) == 100
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"x" * 10)
    (tmp_path / "onnx" / "model.onnx_data").write_bytes(b"x" * 30)
    assert file_size(tmp_path / "onnx") == file_size(tmp_path / "onnx" / "model.onnx") == 40
