"""The sizes of a model, layer by layer: what a compressed checkpoint stores beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from .architectures import AttentionView, LayerView, ModelView, StackView, describe, find_architecture
from .errors import FlexCompressError


FORMAT_VERSION = 1


@dataclass(frozen=True)
class AttentionSize:
    """Sizes of an attention sub-layer.

    Attributes:
        heads: Query heads, at least 1.
        kv_heads: Key and value heads; divides `heads`.
        head_size: Dims of a head.
        head_ids: Where the stack hands a bias per head from layer to layer (T5), the columns of that bias which the
            heads of this layer use, ascending; `None` elsewhere.
    """

    heads: int
    kv_heads: int
    head_size: int
    head_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LayerStructure:
    """Sizes of a layer; `None` for a sub-layer that is not there.

    Attributes:
        attention: The self-attention.
        cross_attention: The attention over the encoder's output.
        ffn: Inner dims of the feed-forward network.
        source: Which layer of the model that was compressed this one comes from; for the record, not compared.
    """

    attention: AttentionSize | None
    cross_attention: AttentionSize | None
    ffn: int | None
    source: int = field(default=0, compare=False)


@dataclass(frozen=True)
class StackStructure:
    """Sizes of a stack.

    Attributes:
        layers: The layers in their order.
        position_heads: Heads of the relative position bias that the layers share (T5), or `None`.
    """

    layers: tuple[LayerStructure, ...]
    position_heads: int | None = None


@dataclass(frozen=True)
class ModelStructure:
    """Sizes of a model.

    Attributes:
        family: The family of the architecture table, such as `bert`.
        hidden_size: Width of the residual stream, and of the embeddings.
        stacks: `encoder` and/or `decoder`.
    """

    family: str
    hidden_size: int
    stacks: dict[str, StackStructure]

    @classmethod
    def of(cls, model: PreTrainedModel | ModelView) -> ModelStructure:
        """Reads the sizes off the weights of a model.

        Args:
            model: A model of a supported family, compressed or not, on any device (also meta), or its view.

        Raises:
            UnsupportedArchitectureError: The family has no table.
        """
        view = model if isinstance(model, ModelView) else describe(model)
        return cls(
            view.family, view.hidden_size, {name: _stack_structure(stack) for name, stack in view.stacks.items()}
        )

    def to_dict(self) -> dict[str, Any]:
        """The structure as plain JSON types; the inverse of [`from_dict`]."""
        return {
            "format_version": FORMAT_VERSION,
            "family": self.family,
            "hidden_size": self.hidden_size,
            "stacks": {
                name: {
                    "position_heads": stack.position_heads,
                    "layers": [
                        {
                            "source": layer.source,
                            "attention": _attention_dict(layer.attention),
                            "cross_attention": _attention_dict(layer.cross_attention),
                            "ffn": layer.ffn,
                        }
                        for layer in stack.layers
                    ],
                }
                for name, stack in self.stacks.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelStructure:
        """Reads a structure that [`to_dict`] made, or that a user wrote.

        Raises:
            FlexCompressError: It is no structure, or holds sizes that cannot be.
        """
        if not isinstance(data, Mapping):
            raise FlexCompressError(
                f"A structure is a mapping, not {type(data).__name__}: see docs of ModelStructure."
            )
        version = data.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise FlexCompressError(
                f"The structure has format version {version!r}, this release reads {FORMAT_VERSION}: upgrade "
                "optimum-flexcompress."
            )
        try:
            structure = cls(
                str(data["family"]),
                _size(data["hidden_size"], "hidden_size"),
                {
                    str(name): StackStructure(
                        tuple(_read_layer(layer, index) for index, layer in enumerate(stack["layers"])),
                        None if stack.get("position_heads") is None else _size(stack["position_heads"], "heads"),
                    )
                    for name, stack in data["stacks"].items()
                },
            )
        except KeyError as error:
            raise FlexCompressError(f"The structure has no {error}: write it with ModelStructure.to_dict().") from None
        except (AttributeError, TypeError) as error:
            raise FlexCompressError(f"The structure is malformed ({error}): write it with to_dict().") from None
        structure.check()
        return structure

    @classmethod
    def from_json_file(cls, path) -> ModelStructure:
        """Reads a structure from a JSON file.

        Raises:
            FlexCompressError: The file cannot be read or holds no structure.
        """
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_dict(json.load(file))
        except OSError as error:
            raise FlexCompressError(f"Cannot read the structure file {path}: {error.strerror}.") from None
        except json.JSONDecodeError as error:
            raise FlexCompressError(f"{path} is not JSON ({error}): write it with ModelStructure.to_dict().") from None

    def check(self) -> None:
        """Checks that a model with these sizes can exist.

        Raises:
            FlexCompressError: It cannot; the message says which size is wrong.
        """
        architecture = find_architecture(self.family)
        for name, stack in self.stacks.items():
            if name not in architecture.stacks:
                known = " and ".join(architecture.stacks)
                raise FlexCompressError(f'A {self.family} model has no stack "{name}": it has {known}.')
            table = architecture.stacks[name]
            if not stack.layers:
                raise FlexCompressError(f"The {name} has no layer left: keep at least one.")
            if table.causal and all(layer.attention is None for layer in stack.layers):
                raise FlexCompressError(
                    f"The {name} has no self-attention left, so it could not count the tokens it has generated: keep "
                    "one self-attention head in one layer."
                )
            for index, layer in enumerate(stack.layers):
                if layer.cross_attention is not None and table.cross_attention is None:
                    raise FlexCompressError(f"Layer {index} of the {name} has no cross-attention: leave it null.")
                for size in (layer.attention, layer.cross_attention):
                    if size is not None and size.heads % size.kv_heads:
                        raise FlexCompressError(
                            f"Layer {index} of the {name} has {size.heads} heads over {size.kv_heads} key-value "
                            "heads: the first must be a multiple of the second."
                        )
            self._check_position_heads(name, stack, table.attention.position_bias is not None)

    @staticmethod
    def _check_position_heads(name: str, stack: StackStructure, has_bias: bool) -> None:
        sizes = [layer.attention for layer in stack.layers if layer.attention is not None]
        if not has_bias or not sizes:
            return
        used = {head for size in sizes for head in size.head_ids or ()}
        for size in sizes:
            ids = size.head_ids
            if ids is None or len(ids) != size.heads or list(ids) != sorted(set(ids)):
                raise FlexCompressError(
                    f"Every self-attention of the {name} needs head_ids, ascending and one for each head."
                )
        if used != set(range(stack.position_heads or 0)):
            raise FlexCompressError(
                f"position_heads of the {name} must be the number of different head_ids, numbered from 0."
            )

    def check_fits(self, original: ModelStructure) -> None:
        """Checks that a model of structure `original` can be shrunk to this one.

        Raises:
            FlexCompressError: Another family, another head size, or something here is bigger than there.
        """
        if self.family != original.family:
            raise FlexCompressError(
                f"The structure is that of a {self.family} model, the model is {original.family}: they must agree."
            )
        if set(self.stacks) != set(original.stacks):
            raise FlexCompressError(
                f"The structure has {' and '.join(self.stacks)}, the model {' and '.join(original.stacks)}: they "
                "must agree."
            )
        _check_not_bigger("hidden size", self.hidden_size, original.hidden_size)
        for name, stack in self.stacks.items():
            there = original.stacks[name].layers
            _check_not_bigger(f"number of {name} layers", len(stack.layers), len(there))
            for index, (layer, old) in enumerate(zip(stack.layers, there)):
                where = f"layer {index} of the {name}"
                _check_not_bigger(f"FFN size in {where}", layer.ffn or 0, old.ffn or 0)
                for kind in ("attention", "cross_attention"):
                    _check_attention_fits(getattr(layer, kind), getattr(old, kind), where)

    @property
    def is_uniform(self) -> bool:
        """Whether every layer of a stack has the same sizes, with nothing removed inside."""
        for stack in self.stacks.values():
            first = stack.layers[0]
            if first.attention is None or first.ffn is None or any(layer != first for layer in stack.layers):
                return False
        return True

    def summary(self) -> str:
        """A table for people: one line for each layer."""
        lines = [f"{self.family}, hidden size {self.hidden_size}"]
        for name, stack in self.stacks.items():
            lines.append(f"{name}: {len(stack.layers)} layers")
            for index, layer in enumerate(stack.layers):
                parts = [f"  {index:>3}", f"heads {_heads_text(layer.attention):>7}"]
                if any(other.cross_attention for other in stack.layers):
                    parts.append(f"cross heads {_heads_text(layer.cross_attention):>7}")
                parts.append(f"FFN {layer.ffn if layer.ffn is not None else 'removed'}")
                lines.append("  ".join(parts))
        return "\n".join(lines)


def _size(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FlexCompressError(f"{name} is {value!r} in the structure: sizes are whole numbers from 1 up.")
    return value


def _read_layer(data: Mapping[str, Any], index: int) -> LayerStructure:
    def attention(value: Mapping[str, Any] | None) -> AttentionSize | None:
        if value is None:
            return None
        ids = value.get("head_ids")
        if ids is not None and not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise FlexCompressError(f"head_ids of layer {index} are {ids!r}: they are whole numbers from 0 up.")
        return AttentionSize(
            _size(value["heads"], "heads"),
            _size(value.get("kv_heads", value["heads"]), "kv_heads"),
            _size(value["head_size"], "head_size"),
            None if ids is None else tuple(ids),
        )

    ffn = data["ffn"]
    return LayerStructure(
        attention(data["attention"]),
        attention(data.get("cross_attention")),
        None if ffn is None else _size(ffn, "ffn"),
        int(data.get("source", index)),
    )


def _attention_dict(size: AttentionSize | None) -> dict[str, Any] | None:
    if size is None:
        return None
    data = {"heads": size.heads, "kv_heads": size.kv_heads, "head_size": size.head_size}
    return data if size.head_ids is None else {**data, "head_ids": list(size.head_ids)}


def _heads_text(size: AttentionSize | None) -> str:
    if size is None:
        return "removed"
    return str(size.heads) if size.heads == size.kv_heads else f"{size.heads}/{size.kv_heads}"


def _check_not_bigger(what: str, here: int, there: int) -> None:
    if here > there:
        raise FlexCompressError(
            f"The structure asks for a {what} of {here}, the model has {there}: a structure can only shrink a model."
        )


def _check_attention_fits(here: AttentionSize | None, there: AttentionSize | None, where: str) -> None:
    if here is None:
        return
    if there is None:
        raise FlexCompressError(f"The structure has an attention in {where} that the model lacks: leave it null.")
    _check_not_bigger(f"number of heads in {where}", here.heads, there.heads)
    if here.head_size != there.head_size or here.heads * there.kv_heads != here.kv_heads * there.heads:
        raise FlexCompressError(
            f"The structure changes the head size or the heads per key-value head in {where}: only whole heads, or "
            "whole groups of heads that share a key, can go."
        )
    if here.head_ids is not None and there.head_ids is not None and here.head_ids[-1] >= there.heads:
        raise FlexCompressError(
            f"head_ids in {where} go up to {here.head_ids[-1]}: the model has {there.heads} heads."
        )


def _attention_size(attention: AttentionView | None, position_heads: int | None) -> AttentionSize | None:
    if attention is None:
        return None
    ids = None
    if position_heads is not None:
        ids = tuple(sorted(set(range(position_heads)) - set(attention.module.pruned_heads)))
    return AttentionSize(attention.num_heads, attention.num_kv_heads, attention.head_size, ids)


def _stack_structure(stack: StackView) -> StackStructure:
    position_heads = None
    bias_name = stack.table.attention.position_bias
    if bias_name is not None:
        for layer in stack.layers:
            bias = getattr(layer.attention.module, bias_name, None) if layer.attention else None
            if bias is not None:
                position_heads = bias.weight.shape[1]
                break
    return StackStructure(
        tuple(_layer_structure(layer, position_heads) for layer in stack.layers), position_heads=position_heads
    )


def _layer_structure(layer: LayerView, position_heads: int | None) -> LayerStructure:
    return LayerStructure(
        _attention_size(layer.attention, position_heads),
        _attention_size(layer.cross_attention, None),
        layer.ffn.size if layer.ffn is not None else None,
        getattr(layer.module, "flexcompress_source", layer.index),
    )


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Counts the parameters of a model, tied ones once.

    Returns:
        `total`; `embeddings` (word, position, patch and type embeddings); `prunable`, those of the layers, which is
        what sparsity is measured on; and `other`, which are heads, poolers and final norms.
    """
    view = describe(model)
    counted: dict[int, str] = {}
    for stack in view.stacks.values():
        for parameter in stack.module_list.parameters():
            counted[id(parameter)] = "prunable"
    for _, item in view.matching(view.architecture.embeddings):
        for parameter in [item] if not hasattr(item, "parameters") else item.parameters():
            counted[id(parameter)] = "embeddings"
    counts = {"total": 0, "embeddings": 0, "prunable": 0, "other": 0}
    for parameter in model.parameters():
        counts["total"] += parameter.numel()
        counts[counted.get(id(parameter), "other")] += parameter.numel()
    return counts
