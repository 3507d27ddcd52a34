"""A live model seen through the table of its family."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedArchitectureError
from .base import Architecture, AttentionTable, FeedForwardTable, StackTable
from .removed import RemovedModule


@dataclass(frozen=True)
class Projection:
    """The part `[start:stop]` of the output features of `module`; the whole of them unless the module is fused."""

    module: nn.Module
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many output features it has."""
        return self.stop - self.start


def _weight_size(module: nn.Module, side: str) -> int:
    """Features that a linear layer reads (`in`) or writes (`out`), from its weight, which never lies."""
    transposed = isinstance(module, Conv1D)
    return module.weight.shape[1 if (side == "in") != transposed else 0]


@dataclass(frozen=True)
class AttentionView:
    """A self- or cross-attention sub-layer.

    Attributes:
        module: The module that computes it.
        q: The query projection, with `num_heads * head_size` features, and `k` and `v`, with
            `num_kv_heads * head_size`.
        o: The output projection.
        norm: The norm of the sub-layer.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves `num_heads / num_kv_heads` query heads.
        head_size: Dims of a head.
    """

    table: AttentionTable
    module: nn.Module
    q: Projection
    k: Projection
    v: Projection
    o: nn.Module
    norm: nn.Module
    num_heads: int
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True)
class FeedForwardView:
    """A feed-forward sub-layer: `up` holds one module, or gate and up where it is gated; `size` its inner dims."""

    table: FeedForwardTable
    up: list[nn.Module]
    down: nn.Module
    norm: nn.Module

    @property
    def size(self) -> int:
        """Inner dims."""
        return _weight_size(self.down, "in")


@dataclass(frozen=True)
class LayerView:
    """A layer; a sub-layer that was removed, or that the family does not have, is `None`."""

    index: int
    module: nn.Module
    attention: AttentionView | None
    cross_attention: AttentionView | None
    ffn: FeedForwardView | None


@dataclass(frozen=True)
class StackView:
    """An encoder or decoder stack."""

    name: str
    table: StackTable
    module_list: nn.ModuleList
    layers: list[LayerView]

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only those before it."""
        return self.table.causal


@dataclass(frozen=True)
class ModelView:
    """What [`describe`] returns: the stacks of a model, its embeddings and its heads."""

    model: PreTrainedModel
    architecture: Architecture
    stacks: dict[str, StackView]
    base: nn.Module
    hidden_size: int

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.architecture.family

    def name_below_base(self, name: str) -> str:
        """Strips the prefix of the base model from a module's or parameter's name."""
        prefix = self.model.base_model_prefix + "."
        return name.removeprefix(prefix) if self.base is not self.model else name

    def matching(self, patterns: tuple[str, ...]) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Modules with parameters of their own, and bare parameters, whose names match one of the patterns."""
        for name, item in self.owners():
            if any(fnmatch.fnmatchcase(self.name_below_base(name), pattern) for pattern in patterns):
                yield name, item

    def owners(self) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Every leaf module that has parameters, and every parameter that sits on a module with children."""
        for name, module in self.model.named_modules():
            if next(module.parameters(recurse=False), None) is None:
                continue
            if next(module.children(), None) is None:
                yield name, module
            else:
                for parameter_name, parameter in module.named_parameters(recurse=False):
                    yield f"{name}.{parameter_name}" if name else parameter_name, parameter

    def embedding_outputs(self) -> list[nn.Module]:
        """The modules whose output is, or is added to, the residual stream before the first layer."""
        found = {}
        for path in self.architecture.embedding_outputs:
            module = _get(self.base, path)
            if module is not None:
                found[id(module)] = module
        return list(found.values())


def _get(root: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        root = getattr(root, part, None)
        if root is None:
            return None
    return root


def _attention_view(layer: nn.Module, table: AttentionTable | None) -> AttentionView | None:
    if table is None or isinstance(_get(layer, table.module), RemovedModule):
        return None
    module, output, norm = (_get(layer, path) for path in (table.module, table.output, table.norm))
    head_size = getattr(module, table.head_size)
    query, key, value = (_get(layer, path) for path in (table.query, table.key, table.value))
    if table.fused:
        # All three are equally wide here: no supported family fuses grouped queries.
        width = _weight_size(query, "out") // 3
        projections = [Projection(query, i * width, (i + 1) * width) for i in range(3)]
    else:
        projections = [Projection(part, 0, _weight_size(part, "out")) for part in (query, key, value)]
    q, k, v = projections
    return AttentionView(
        table, module, q, k, v, output, norm, q.size // head_size, k.size // head_size, head_size=head_size
    )


def _ffn_view(layer: nn.Module, table: FeedForwardTable) -> FeedForwardView | None:
    down = _get(layer, table.down)
    if isinstance(down, RemovedModule):
        return None
    paths = next(paths for paths in table.up if _get(layer, paths[0]) is not None)
    return FeedForwardView(table, [_get(layer, path) for path in paths], down, _get(layer, table.norm))


def build_view(model: PreTrainedModel, architecture: Architecture) -> ModelView:
    """Binds a table to a model.

    Raises:
        UnsupportedArchitectureError: The model has none of the stacks that its family's table names.
    """
    base = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    stacks = {}
    for name, table in architecture.stacks.items():
        module_list = _get(base, table.layers)
        if module_list is None:
            continue
        layers = [
            LayerView(
                index,
                layer,
                _attention_view(layer, table.attention),
                _attention_view(layer, table.cross_attention),
                _ffn_view(layer, table.ffn),
            )
            for index, layer in enumerate(module_list)
        ]
        stacks[name] = StackView(name, table, module_list, layers)
    if not stacks:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no stack where architectures/{architecture.family}.py expects one: use a "
            "class of the Auto classes of that family."
        )
    view = ModelView(model, architecture, stacks, base, hidden_size=0)
    _, embedding = next(view.matching(architecture.embeddings))
    weight = getattr(embedding, "weight", embedding)
    hidden_size = weight.shape[0] if weight.dim() == 4 else weight.shape[-1]
    return ModelView(model, architecture, stacks, base, hidden_size)
