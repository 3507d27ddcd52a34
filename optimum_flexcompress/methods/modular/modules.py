"""The modules: copies of layers, and where they stand."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ...architectures import AttentionTable, ModelView, StackView, describe
from ...errors import FlexCompressError
from ...modular_config import ModularConfig
from ...token_dropping import lengths_of
from .assembly import Piece


def describe_whole(model: PreTrainedModel) -> ModelView:
    """Looks at a model that modules are to be trained for.

    Raises:
        FlexCompressError: Something in it depends on the number of a layer, or on its depth.
    """
    view = describe(model)
    objection = view.architecture.objection(model.config)
    if objection is not None:
        raise FlexCompressError(f"Modules cannot stand for layers of this model: {objection}.")
    if "structure" in (getattr(model.config, "quantization_config", None) or {}):
        raise FlexCompressError(
            "The layers of this model differ in size, so no module can stand for several of them: train modules "
            "first, assemble, and prune the result."
        )
    if lengths_of(model) is not None:
        raise FlexCompressError(
            "This model drops tokens, at lengths for each of its layers: train modules at full lengths "
            "(set_lengths(model, None)), and set lengths for the assembled model."
        )
    return view


def generates_with_deeper_decoder(view: ModelView) -> bool:
    """Whether Transformers could generate with a decoder that is deeper than the encoder.

    It sizes the cache of a T5 decoder by the number of encoder layers.
    """
    if not view.model.can_generate() or len(view.stacks) < 2:
        return True
    config = copy.deepcopy(view.model.config)
    for name, count in (("encoder", 1), ("decoder", 2)):
        for key in view.stacks[name].table.config.layers:
            setattr(config, key, count)
    return config.get_text_config(decoder=True).num_hidden_layers >= 2


def usable_granularities(view: ModelView, config: ModularConfig) -> dict[str, list[int]]:
    """The granularities of the modules in each stack that has modules.

    Raises:
        FlexCompressError: A stack whose depth no granularity divides, or that the model does not have.
    """
    names = list(view.stacks) if config.stacks is None else config.stacks
    usable = {}
    for name in names:
        if name not in view.stacks:
            raise FlexCompressError(
                f'modular.stacks names the stack "{name}", which {type(view.model).__name__} does not have: it has '
                f"{' and '.join(view.stacks)}."
            )
        depth = len(view.stacks[name].layers)
        usable[name] = [granularity for granularity in config.granularities if depth % granularity == 0]
        if not usable[name]:
            given = ", ".join(map(str, config.granularities))
            working = [granularity for granularity in range(2, depth + 1) if depth % granularity == 0]
            others = [
                other
                for other, stack in view.stacks.items()
                if other != name
                and config.stacks is None
                and any(len(stack.layers) % granularity == 0 for granularity in config.granularities)
            ]
            advice = f"give granularities that do ({', '.join(map(str, working))})" if working else ""
            if name == "decoder" and not generates_with_deeper_decoder(view):
                # The finest modules of the encoder alone would leave the decoder the deeper one.
                others = [o for o in others if len(view.stacks[o].layers) // usable[o][0] >= depth]
            if others:
                advice += (", or " if advice else "") + f'leave the stack out with stacks=["{others[0]}"]'
            raise FlexCompressError(
                f"The {name} has {depth} layer{'s' * (depth != 1)}, which no granularity of {given} divides (depths "
                f"that work are multiples of {' or '.join(map(str, config.granularities))}): "
                f"{advice or 'take a deeper model'}."
            )
    return usable


def module_name(stack: str, piece: Piece) -> str:
    """The name of a module, as in the keys of the file of modules: `encoder_2_0`."""
    return f"{stack}_{piece.granularity}_{piece.block}"


def pieces_of(depth: int, granularities: Sequence[int]) -> list[Piece]:
    """All modules of a stack."""
    return [Piece(granularity, block) for granularity in granularities for block in range(depth // granularity)]


def make_modules(view: ModelView, config: ModularConfig) -> nn.ModuleDict:
    """New modules for a model, trainable, each started from its block.

    They share the configuration objects of the model. The relative position bias of a stack (T5) is shared too: a
    module at the bottom of a stack uses the one of the original, without owning it.
    """
    configs = {
        id(module.config): module.config for module in view.model.modules() if isinstance(module, PreTrainedModel)
    }
    modules = nn.ModuleDict()
    for name, granularities in usable_granularities(view, config).items():
        stack = view.stacks[name]
        for piece in pieces_of(len(stack.layers), granularities):
            module = copy.deepcopy(stack.layers[template_of(piece, config)].module, dict(configs))
            _settle_position_bias(stack, piece, module)
            if config.initialization == "mean":
                _average(module, [layer.module for layer in stack.layers[piece.start : piece.stop]])
            modules[module_name(name, piece)] = module.requires_grad_(True)
    return modules


def template_of(piece: Piece, config: ModularConfig) -> int:
    """The layer that a module is a copy of at first."""
    offset = {"middle": (piece.granularity - 1) // 2, "last": piece.granularity - 1}.get(config.initialization, 0)
    return piece.start + offset


def _settle_position_bias(stack: StackView, piece: Piece, module: nn.Module) -> None:
    table: AttentionTable = stack.table.attention
    if table.position_bias is None:
        return
    attention = module.get_submodule(table.module)
    attention.has_relative_attention_bias = piece.start == 0
    if hasattr(attention, table.position_bias):
        delattr(attention, table.position_bias)
    if piece.start == 0:
        # Past `nn.Module`, which would register it: the bias stays a parameter of the original alone.
        vars(attention)[table.position_bias] = getattr(stack.layers[0].attention.module, table.position_bias)


@torch.no_grad()
def _average(module: nn.Module, layers: Sequence[nn.Module]) -> None:
    weights = [dict(layer.named_parameters()) for layer in layers]
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.stack([values[name] for values in weights]).mean(0))


def follow(module: nn.Module, original: nn.Module) -> None:
    """Makes a module checkpoint its activations as an original layer does.

    The trainer says so to the model, which the module is no part of.
    """
    for mine, theirs in zip(module.modules(), original.modules()):
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if hasattr(theirs, name):
                setattr(mine, name, getattr(theirs, name))
