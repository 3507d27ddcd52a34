"""Graphs that drop tokens: at which lengths they do, and how ONNX Runtime's CPU kernels do it fastest."""

from __future__ import annotations

from onnx import ModelProto
from transformers import PretrainedConfig

from ..config_sizes import LENGTHS_KEY
from ..token_dropping import LengthConfig


# Positions that some families keep for themselves, as RoBERTa does.
RESERVED_POSITIONS = 2
SHORTEST = 11


def drops_tokens(model: ModelProto) -> bool:
    """Whether a graph chooses among tokens."""
    return any(node.op_type == "TopK" for node in model.graph.node)


def lengths_in(config: PretrainedConfig | None) -> LengthConfig | None:
    """The lengths that an exported model's configuration carries."""
    return LengthConfig.parse(getattr(config, LENGTHS_KEY, None))


def dropping_length(config: PretrainedConfig, lengths: LengthConfig) -> int:
    """An input length at which tokens are dropped, if the model takes inputs that long.

    Args:
        config: The model's configuration.
        lengths: What it drops.
    """
    length = max(lengths.dropping_length() + 2, SHORTEST)
    limit = getattr(config, "max_position_embeddings", None)
    return length if limit is None else min(length, limit - RESERVED_POSITIONS)
