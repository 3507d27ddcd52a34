"""The vocabulary of the architecture tables: what a model family has, and where.

A table is plain data. It says which stacks of layers a family has, where the projections of a layer are, and which
other modules read from or write to the residual stream. Everything that removes, masks, captures or exports parts of
a model works from these tables, so a new family needs a table and no further code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PretrainedConfig


@dataclass(frozen=True)
class AttentionTable:
    """One attention sub-layer. Paths are relative to the layer.

    Attributes:
        module: The module that holds the head bookkeeping and computes the attention.
        query: The query projection, and so on for `key`, `value` and `output`. The first three are equal where one
            module computes all of them side by side (GPT-2).
        norm: The norm that belongs to the sub-layer.
        head_size: Attribute of `module` with the size of one head.
        head_counts: Attributes of `module` with the number of query heads.
        widths: Attributes of `module` with the number of query heads times the head size.
        position_bias: Name of an embedding inside `module` of the first layer that gives every head a bias per
            relative position, and which later layers are handed (T5).
        returns_position_bias: Whether the second output of `module` (and of the layer) is that bias, to be handed on.
        rebuild_position_bias: Computes the bias of tokens at given positions: a function of the module that owns the
            embedding and of positions `[batch, length]`, to `[batch, heads, length, length]`.
        scaled: Whether scores are divided by the square root of the head size.
        maps: Index of the attention maps in what `module` returns; the entry may be missing or `None`.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    norm: str
    head_size: str
    head_counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    position_bias: str | None = None
    returns_position_bias: bool = False
    rebuild_position_bias: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
    scaled: bool = True
    maps: int = 1

    @property
    def fused(self) -> bool:
        """Whether one module computes query, key and value side by side."""
        return self.query == self.key


@dataclass(frozen=True)
class FeedForwardTable:
    """One feed-forward sub-layer. Paths are relative to the layer.

    Attributes:
        up: The projections from the residual stream: one, or two where the feed-forward network is gated. The first
            alternative that exists counts, because T5 has both kinds.
        down: The projection back to the residual stream.
        norm: The norm that belongs to the sub-layer.
    """

    up: tuple[tuple[str, ...], ...]
    down: str
    norm: str


@dataclass(frozen=True)
class ConfigKeys:
    """The names under which `config.json` keeps the sizes of a stack; several names are kept equal."""

    layers: tuple[str, ...]
    heads: tuple[str, ...]
    ffn: tuple[str, ...]
    kv_heads: tuple[str, ...] = ()
    head_size: tuple[str, ...] = ()
    per_layer: tuple[str, ...] = ()


@dataclass(frozen=True)
class StackTable:
    """A stack of layers of one kind.

    Attributes:
        layers: Path of the `ModuleList` below the base model.
        attention: The self-attention of a layer.
        ffn: The feed-forward network of a layer.
        config: Where `config.json` keeps the sizes.
        cross_attention: The cross-attention of a layer, if it has one.
        norm_first: Whether norms are computed inside the residual branch. Where they are not (post-LN), a removed
            sub-layer keeps its norm.
        causal: Whether a token sees only those before it, with a cache of keys and values.
        final_norm: Path below the base model of the norm after the last layer.
        mask: Name of the argument of a layer that masks padding, if there is one: `[batch, length]` with 1 for
            tokens, or `[batch, 1, 1 or length, length]`, boolean or added to the scores.
        hidden_output: Index of the hidden states in what a layer returns, where that is a tuple.
        between: Where a layer takes up the residual stream between its self-attention and its feed-forward network:
            modules below the layer with the index of the argument. Empty where it is what the norm of the
            self-attention returns (post-LN).
        layer_drop: Attribute of the module that holds the layers with the probability of skipping one in training.
    """

    layers: str
    attention: AttentionTable
    ffn: FeedForwardTable
    config: ConfigKeys
    cross_attention: AttentionTable | None = None
    norm_first: bool = True
    causal: bool = False
    final_norm: str | None = None
    mask: str | None = "attention_mask"
    hidden_output: int = 0
    between: tuple[tuple[str, int], ...] = ()
    layer_drop: str | None = None


def _no_constants(config: PretrainedConfig) -> tuple:
    return ()


@dataclass(frozen=True)
class Architecture:
    """The table of a model family.

    Paths in `embeddings`, `reads`, `writes`, `both` and `fixed` are `fnmatch` patterns below the base model, or
    below the whole model for task heads. They name modules (or bare parameters) outside the layers.

    Attributes:
        family: The name of the family, also the name of the file.
        model_types: The values of `config.model_type` that the table serves.
        stacks: The stacks, named `encoder` or `decoder`.
        hidden_size: The keys in `config.json` with the width of the residual stream.
        embeddings: Modules or parameters that turn inputs into vectors of the residual stream.
        embedding_outputs: Modules whose output is the residual stream before the first layer, or a summand of it.
        embedding_norms: Norms, if any, through which the embeddings go before they are the residual stream.
        reads: Modules that read the residual stream and write something else.
        writes: Norms over the residual stream.
        both: Modules that read the residual stream and write vectors of the same dims, so that they shrink with it.
        fixed: Parameters that have no dimension in common with the residual stream.
        width_constants: What a stock model derives from its width besides the shapes. A width that changes one of
            these cannot be written into a stock `config.json`.
        objection: Says for a configuration why removal is not possible, or returns `None`.
        first_token: Endings of the class names whose head (or pooler) reads the first token, and whether it reads
            that one alone.
        dropping_objection: Says for a configuration why its layers cannot drop tokens, or returns `None`.
        export_objection: Says for a configuration why Optimum's exporter cannot take it, and what to do, or returns
            `None`.
        unused_positions: How many of the positions in `config.json` no token ever has.
    """

    family: str
    model_types: tuple[str, ...]
    stacks: dict[str, StackTable]
    hidden_size: tuple[str, ...]
    embeddings: tuple[str, ...]
    embedding_outputs: tuple[str, ...]
    embedding_norms: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    width_constants: Callable[[PretrainedConfig], tuple] = _no_constants
    objection: Callable[[PretrainedConfig], str | None] = lambda config: None
    first_token: Mapping[str, bool] = field(default_factory=dict)
    dropping_objection: Callable[[PretrainedConfig], str | None] = lambda config: None
    export_objection: Callable[[PretrainedConfig], str | None] = lambda config: None
    unused_positions: Callable[[PretrainedConfig], int] = lambda config: 0
