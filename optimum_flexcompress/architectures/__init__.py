"""Where things live in each model family, as data tables; see `base.py` for what a table says."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedArchitectureError
from .bart import BART
from .base import Architecture, AttentionTable, ConfigKeys, FeedForwardTable, StackTable
from .bert import BERT
from .distilbert import DISTILBERT
from .gpt2 import GPT2
from .llama import LLAMA
from .roberta import ROBERTA
from .t5 import T5
from .view import AttentionView, FeedForwardView, LayerView, ModelView, Projection, StackView, build_view
from .vit import VIT


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Makes a table known for each of its model types."""
    for model_type in architecture.model_types:
        ARCHITECTURES[model_type] = architecture


for _architecture in (BERT, ROBERTA, DISTILBERT, GPT2, LLAMA, T5, BART, VIT):
    register_architecture(_architecture)


def find_architecture(model_type: str) -> Architecture:
    """The table for a `config.model_type`.

    Raises:
        UnsupportedArchitectureError: There is none; the message names the supported ones.
    """
    if model_type not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f'"{model_type}" models are not supported (supported: {", ".join(sorted(ARCHITECTURES))}): use one of '
            "these, or describe the family in a new file under optimum_flexcompress/architectures/ and register it."
        )
    return ARCHITECTURES[model_type]


def position_limit(config: PretrainedConfig) -> int | None:
    """How many tokens a model has positions for.

    Args:
        config: Its configuration; the family may be one without a table.

    Returns:
        The number, or `None` where nothing limits it.
    """
    limit = getattr(config, "max_position_embeddings", None)
    table = ARCHITECTURES.get(config.model_type)
    return limit if limit is None or table is None else limit - table.unused_positions(config)


def describe(model: PreTrainedModel) -> ModelView:
    """Looks at a model through the table of its family.

    Args:
        model: A Transformers model of a supported family with any head, pruned or not; it may be on the meta device.

    Returns:
        Its stacks and layers with their projections and sizes. The view holds references to the modules as they are
        now: make a new one after surgery.

    Raises:
        UnsupportedArchitectureError: The family has no table.
    """
    return build_view(model, find_architecture(model.config.model_type))


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "AttentionTable",
    "AttentionView",
    "ConfigKeys",
    "FeedForwardTable",
    "FeedForwardView",
    "LayerView",
    "ModelView",
    "Projection",
    "StackTable",
    "StackView",
    "describe",
    "find_architecture",
    "position_limit",
    "register_architecture",
]
