"""Writes the sizes of a shrunk model into its configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import Architecture, describe, find_architecture
from .structure import ModelStructure


QUANT_METHOD = "flexcompress"

TAG = "optimum-flexcompress"
"""Marks compressed models on the Hub."""

LENGTHS_KEY = "length_config"
"""Entry of `config.json`, and keyword of `from_pretrained`, with how many tokens each layer keeps."""


def write_sizes(model: PreTrainedModel, structure: ModelStructure, sources: Mapping[str, Sequence[int]]) -> None:
    """Makes `model.config` describe the sizes of the model.

    A stock configuration is written where it gives exactly this structure. Else the configuration keeps the sizes it
    had, from which stock code derives constants such as head sizes and embedding scales, and the structure goes under
    `quantization_config`, the entry through which Transformers finds the loader of a checkpoint.

    Args:
        model: The shrunk model.
        structure: Its structure.
        sources: For each stack the indices, before the change, of its layers.
    """
    architecture = find_architecture(model.config.model_type)
    model.add_model_tags(TAG)
    old = model.config
    with_layers = _config_with_layers(architecture, old, structure, sources)
    new = _stock_config(architecture, model, with_layers, structure)
    if new is None:
        new = with_layers
        new.quantization_config = {"quant_method": QUANT_METHOD, "structure": structure.to_dict()}
    # Modules hold references to the configuration (some stacks to copies of their own): change it where it is.
    for config in _configs(model):
        for name, value in new.__dict__.items():
            if config is old or name in _size_keys(architecture):
                setattr(config, name, copy.deepcopy(value))
        if config is old and not hasattr(new, "quantization_config") and hasattr(config, "quantization_config"):
            del config.quantization_config
        if config is old and hasattr(config, LENGTHS_KEY) and not hasattr(config, "quantization_config"):
            # Sizes need no loader any more, lengths still do.
            config.quantization_config = {"quant_method": QUANT_METHOD}
    for name in architecture.stacks:
        _set_stack_layers(architecture, model, structure, name)


def is_stock(model: PreTrainedModel, structure: ModelStructure) -> bool:
    """Whether a stock configuration gives a model of this class the sizes of `structure`, layers kept in place."""
    architecture = find_architecture(model.config.model_type)
    return _stock_config(architecture, model, model.config, structure) is not None


def width_is_free(model: PreTrainedModel) -> bool:
    """Whether a stock configuration can express another width at all: in some models a constant depends on it."""
    architecture = find_architecture(model.config.model_type)
    narrow = copy.deepcopy(model.config)
    for key in architecture.hidden_size:
        setattr(narrow, key, getattr(narrow, key) // 2)
    return architecture.width_constants(narrow) == architecture.width_constants(model.config)


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    found[id(model.config)] = model.config
    return list(found.values())


def _size_keys(architecture: Architecture) -> set[str]:
    keys = set(architecture.hidden_size)
    for stack in architecture.stacks.values():
        names = stack.config
        keys.update(names.layers, names.heads, names.kv_heads, names.head_size, names.ffn, names.per_layer)
    return keys


def _set_stack_layers(
    architecture: Architecture, model: PreTrainedModel, structure: ModelStructure, name: str
) -> None:
    """Some stacks (T5) keep a copy of the configuration whose first layer key counts their own layers."""
    if name not in structure.stacks:
        return
    stack_module = describe(model).base
    path, _, _ = architecture.stacks[name].layers.rpartition(".")
    stack_module = stack_module.get_submodule(path)
    config = getattr(stack_module, "config", model.config)
    if config is not model.config and len(architecture.stacks) > 1:
        first = next(iter(architecture.stacks.values())).config.layers[0]
        setattr(config, first, len(structure.stacks[name].layers))


def _config_with_layers(
    architecture: Architecture,
    config: PretrainedConfig,
    structure: ModelStructure,
    sources: Mapping[str, Sequence[int]],
) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for name, stack in structure.stacks.items():
        keys = architecture.stacks[name].config
        for key in keys.layers:
            setattr(config, key, len(stack.layers))
        for key in keys.per_layer:
            values = getattr(config, key, None)
            if values is not None and name in sources:
                setattr(config, key, [values[source] for source in sources[name]])
    return config


def without_loader_entry(config: PretrainedConfig) -> PretrainedConfig:
    """A copy that does not say what is to be done to a model before its weights are loaded."""
    copied = copy.deepcopy(config)
    if hasattr(copied, "quantization_config"):
        del copied.quantization_config
    return copied


def _stock_config(
    architecture: Architecture, model: PreTrainedModel, config: PretrainedConfig, structure: ModelStructure
) -> PretrainedConfig | None:
    """The stock configuration that gives `structure`, or `None` if there is none."""
    if not structure.is_uniform:
        return None
    stock = without_loader_entry(config)
    for key in architecture.hidden_size:
        setattr(stock, key, structure.hidden_size)
    for name, stack in structure.stacks.items():
        keys, layer = architecture.stacks[name].config, stack.layers[0]
        sizes = [(keys.ffn, layer.ffn), (keys.heads, layer.attention.heads), (keys.kv_heads, layer.attention.kv_heads)]
        sizes.append((keys.head_size, layer.attention.head_size))
        for names, size in sizes:
            for key in names:
                setattr(stock, key, size)
    if architecture.width_constants(stock) != architecture.width_constants(config):
        return None
    try:
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(stock))
    except ValueError:
        # How stock constructors say that heads and width do not go together.
        return None
    return stock if ModelStructure.of(built) == structure else None
