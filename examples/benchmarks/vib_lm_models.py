"""The language models of `vib_lm.py`, their text, and magnitude pruning."""

from __future__ import annotations

import copy
import json
import lzma
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from optimum_flexcompress import ModelStructure
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.kept import Kept, KeptLayer
from optimum_flexcompress.structure import count_parameters
from optimum_flexcompress.surgery import resize, select


VOCABULARY = 8192
BLOCK = 128
STORY_LENGTH = 256


# -- GPT-2 on WikiText-2 ------------------------------------------------------------------------------------------


def gpt2_tokenizer(folder: Path) -> Tokenizer:
    """GPT-2's byte-pair tokenizer with its first merges only: ids and merges are in the order of frequency."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    kept = {token: index for token, index in vocabulary.items() if index < VOCABULARY}
    pairs = [tuple(line.split(" ")) for line in merges if line]
    pairs = [pair for pair in pairs if "".join(pair) in kept]
    tokenizer = Tokenizer(models.BPE(vocab=kept, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def wikitext(folder: Path, tokenizer: Tokenizer, split: str, limit: int | None) -> torch.Tensor:
    """The tokens of a split."""
    with lzma.open(folder / f"{split}.txt.xz", "rt", encoding="utf-8") as file:
        lines = file.readlines()[:limit]
    return torch.tensor([index for line in tokenizer.encode_batch(lines) for index in line.ids])


def small_gpt2() -> GPT2LMHeadModel:
    """Six layers, 256 wide, random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=BLOCK,
            n_embd=256,
            n_layer=6,
            n_head=8,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


# -- LLaMA in the format of llama2.c ------------------------------------------------------------------------------


def load_llama2c(path: Path) -> LlamaForCausalLM:
    """Reads a checkpoint in the first format of llama2.c: seven integers, then float32 weights, tensor by tensor."""
    raw = path.read_bytes()
    width, inner, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", raw[:28])
    values = np.frombuffer(raw, dtype="<f4", offset=28)
    head, kv_width, at = width // heads, width // heads * kv_heads, 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = math.prod(shape)
        at += size
        return torch.from_numpy(values[at - size : at].reshape(shape).copy())

    def halves_apart(weight: torch.Tensor, count: int) -> torch.Tensor:
        # It rotates neighbouring features, Transformers those that are half a head apart.
        return weight.view(layers, count, head // 2, 2, width).transpose(2, 3).reshape(weight.shape)

    shared = vocabulary > 0
    embedding = take(abs(vocabulary), width)
    parts = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": halves_apart(take(layers, width, width), heads),
        "self_attn.k_proj": halves_apart(take(layers, kv_width, width), kv_heads),
        "self_attn.v_proj": take(layers, kv_width, width),
        "self_attn.o_proj": take(layers, width, width),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, inner, width),
        "mlp.down_proj": take(layers, width, inner),
        "mlp.up_proj": take(layers, inner, width),
    }
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(width)}
    take(2, length, head // 2)  # a table of rotations, which follow from the sizes
    state["lm_head.weight"] = embedding if shared else take(abs(vocabulary), width)
    for name, stacked in parts.items():
        state |= {f"model.layers.{index}.{name}.weight": stacked[index] for index in range(layers)}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=abs(vocabulary),
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=shared,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.load_state_dict(state)
    return model.eval()


def read_pieces(path: Path) -> list[str]:
    """The tokens of a llama2.c tokenizer, as text."""
    raw, at, pieces = path.read_bytes(), 4, []
    while at < len(raw):
        size = struct.unpack("<i", raw[at + 4 : at + 8])[0]
        pieces.append(raw[at + 8 : at + 8 + size].decode("utf-8", "replace"))
        at += 8 + size
    return pieces


@torch.inference_mode()
def stories(model: LlamaForCausalLM, count: int, seed: int, batch: int = 256) -> torch.Tensor:
    """Text that the model makes up, sampled at temperature 1, `[count * STORY_LENGTH]`."""
    torch.manual_seed(seed)
    # It goes on after the end of a story, as in training.
    model.generation_config.eos_token_id = None
    found = []
    for start in range(0, count, batch):
        prompt = torch.full((min(batch, count - start), 1), model.config.bos_token_id)
        found.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                max_new_tokens=STORY_LENGTH - 1,
                pad_token_id=0,
            ).flatten()
        )
    return torch.cat(found)


# -- Text and perplexity ------------------------------------------------------------------------------------------


def blocks(tokens: torch.Tensor, length: int, limit: int | None = None) -> Dataset:
    """Rows of equal length."""
    rows = tokens[: len(tokens) // length * length].view(-1, length)[:limit]
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: Dataset, batch: int = 32) -> float:
    """`exp` of the mean loss per token, in single precision."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows[:]["input_ids"].split(batch)]
    return math.exp(sum(losses) / len(rows))


# -- Magnitude pruning --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    heads: list[torch.Tensor]
    ffn: list[torch.Tensor]


def _group_norms(weights: list[tuple[torch.Tensor, int]], groups: int) -> torch.Tensor:
    """Root of the mean square of what belongs to each of `groups`, over several weights along given dims."""
    total, count = 0.0, 0
    for weight, dim in weights:
        rows = weight.detach().movedim(dim, 0).reshape(groups, -1)
        total, count = total + rows.square().sum(1), count + rows.shape[1]
    return (total / count).sqrt()


def _scores(model: PreTrainedModel) -> _Scores:
    view = describe(model)
    (stack,) = view.stacks.values()
    heads, ffn = [], []
    for layer in stack.layers:
        attention, transposed = layer.attention, layer.attention.table.fused
        out, into = (1, 0) if transposed else (0, 1)
        parts = []
        for part in (attention.q, attention.k, attention.v):
            parts.append((part.module.weight.narrow(out, part.start, part.size), out))
        heads.append(_group_norms([*parts, (attention.o.weight, into)], attention.num_kv_heads))
        ffn.append(
            _group_norms([*((up.weight, out) for up in layer.ffn.up), (layer.ffn.down.weight, into)], layer.ffn.size)
        )
    return _Scores(heads, ffn)


def magnitude_prune(model: PreTrainedModel, sparsity: float, align: int) -> PreTrainedModel:
    """Removes the heads and FFN dims with the smallest weights: of every layer the same number.

    Args:
        model: Pruned in place.
        sparsity: Share of the parameters of the layers that goes.
        align: Sizes are multiples of this.
    """
    dense = ModelStructure.of(model)
    ((name, stack),) = dense.stacks.items()
    wanted = (1 - sparsity) * count_parameters(model)["prunable"]
    first = stack.layers[0]
    groups = max(round((1 - sparsity) * first.attention.kv_heads), 1)
    shared = first.attention.heads // first.attention.kv_heads

    def structure(ffn: int) -> ModelStructure:
        attention = replace(first.attention, heads=groups * shared, kv_heads=groups)
        layers = tuple(replace(layer, attention=attention, ffn=ffn) for layer in stack.layers)
        return replace(dense, stacks={name: replace(stack, layers=layers)})

    def error(ffn: int) -> float:
        with torch.device("meta"):
            empty = type(model)(copy.deepcopy(model.config))
        return abs(count_parameters(resize(empty, structure(ffn)))["prunable"] - wanted)

    low, high = 1, first.ffn // align + 1
    ffn = min((count * align for count in range(low, high)), key=error)
    scores = _scores(model)

    def largest(values: torch.Tensor, count: int) -> torch.Tensor:
        return values.topk(count).indices

    layers = [
        KeptLayer(index, attention=largest(heads, groups), ffn=largest(dims, ffn))
        for index, (heads, dims) in enumerate(zip(scores.heads, scores.ffn, strict=True))
    ]
    return select(model, Kept(None, {name: layers}))
