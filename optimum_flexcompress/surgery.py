"""Makes a model physically smaller: selects heads, FFN dims, dims of the residual stream, sub-layers and layers.

[`select`] keeps what a [`Kept`] names and moves the weights; [`resize`] shrinks a model to the sizes of a
[`ModelStructure`] without caring which weights stay, which is what the loader does before it fills in the weights.
Both run the same code, so that what can be made can also be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import AttentionTable, AttentionView, FeedForwardView, LayerView, ModelView, StackView, describe
from .architectures.removed import RemovedAttention, RemovedNorm, RemovedProjection
from .config_sizes import without_loader_entry, write_sizes
from .errors import FlexCompressError, UnsupportedArchitectureError
from .kept import Kept, KeptLayer, check_kept
from .origin import ORIGIN_KEY, Origin, note_origin, write_origin
from .structure import ModelStructure
from .token_dropping import dropping_stack, lengths_of, set_lengths


def keep_layers(model: PreTrainedModel, layers: Mapping[str, Sequence[int]] | Sequence[int]) -> PreTrainedModel:
    """Keeps whole layers. The result needs no plugin to load where the model did not need it before.

    Args:
        model: The model; changed in place.
        layers: For each stack the indices of the layers that stay, in their new order; a plain list for models with
            one stack. A stack that is not named stays whole.

    Returns:
        The same model.

    Raises:
        FlexCompressError: An index that does not exist, a layer named twice, or a stack left empty.
    """
    view = describe(model)
    if not isinstance(layers, Mapping):
        if len(view.stacks) != 1:
            raise FlexCompressError(
                f"{type(model).__name__} has {' and '.join(view.stacks)}: say which layers stay in each, as in "
                '{"encoder": [0, 2], "decoder": [0]}.'
            )
        layers = {next(iter(view.stacks)): layers}
    return select(model, Kept(stacks={name: [KeptLayer(int(i)) for i in kept] for name, kept in layers.items()}))


def resize(model: PreTrainedModel, structure: ModelStructure) -> PreTrainedModel:
    """Shrinks a model to given sizes; the leading heads and dims of the leading layers stay.

    Args:
        model: The model, possibly on the meta device; changed in place.
        structure: The sizes.

    Returns:
        The same model; `ModelStructure.of(model) == structure`.

    Raises:
        FlexCompressError: The structure is not smaller than the model, or of another family.
    """
    view = describe(model)
    structure.check()
    structure.check_fits(ModelStructure.of(view))
    # Which heads are left is not decided here, but noted by whoever saved the weights, if they were saved.
    origin = getattr(model.config, ORIGIN_KEY, None)
    write_origin(model.config, None)
    select(model, Kept.leading(structure))
    known = origin is not None and Origin.from_dict(origin).matches(describe(model))
    write_origin(model.config, origin if known else None)
    for name, stack in describe(model).stacks.items():
        for layer, wanted in zip(stack.layers, structure.stacks[name].layers):
            layer.module.flexcompress_source = wanted.source
    return model


def with_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model that can run, of the class and the sizes of one that may lie on the meta device.

    Args:
        model: A model, pruned or not.

    Returns:
        The same model where it has weights; else a new one with random ones.
    """
    if model.device.type != "meta":
        return model
    structure, made = ModelStructure.of(model), type(model)(without_loader_entry(model.config)).eval()
    return made if ModelStructure.of(made) == structure else resize(made, structure)


@torch.no_grad()
def select(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """Keeps the named parts of a model and removes the rest, with exactly the weights that stay.

    A removed sub-layer adds nothing to the residual stream, also not its output bias. Norms run over the kept dims
    only. Tied weights stay tied. The model's configuration is updated: to a stock one where a stock configuration can
    express the new sizes, else with the structure under `quantization_config`, from which
    `from_pretrained` restores it once `optimum_flexcompress` is imported.

    Args:
        model: The model; changed in place. Optimizers made before hold the old parameters.
        kept: What stays.

    Returns:
        The same model.

    Raises:
        FlexCompressError: Indices that do not exist or are named twice, an empty stack, or a decoder without any
            self-attention. The model is unchanged then.
        UnsupportedArchitectureError: A task head that the family's table does not know, where `kept.hidden` is given.
    """
    view = describe(model)
    plan = check_kept(view, kept)
    sides = hidden_sides(view) if plan.hidden is not None else None
    origin = note_origin(view, plan)
    lengths = lengths_of(model)
    if lengths is not None:
        set_lengths(model, None)
    for name, layers in plan.stacks.items():
        stack = view.stacks[name]
        for layer in layers:
            _shrink_layer(stack, stack.layers[layer.source], layer)
        sources = [layer.source for layer in layers]
        _set_stack_layers(stack, [stack.layers[source].module for source in sources], sources)
    if sides is not None:
        _shrink_hidden(view, sides, plan.hidden)
    structure = ModelStructure.of(model)
    sources = {name: [layer.source for layer in layers] for name, layers in plan.stacks.items()}
    write_sizes(model, structure, sources)
    write_origin(model.config, origin)
    if lengths is not None:
        name = dropping_stack(describe(model)).name
        set_lengths(model, lengths.layers(sources[name]) if name in sources else lengths)
    return model


def adopt_layers(model: PreTrainedModel, sources: Mapping[str, Sequence[int]]) -> PreTrainedModel:
    """Makes the rest of a model agree with layers that somebody else has put into its lists.

    Args:
        model: The model; changed in place. The lists may hold more or fewer layers than its configuration says, all
            of the kind they held before.
        sources: For each stack that has changed the layer, as the configuration counts them, that each one is like.

    Returns:
        The same model.
    """
    view = describe(model)
    for name, stack_sources in sources.items():
        stack = view.stacks[name]
        _set_stack_layers(stack, list(stack.module_list), stack_sources)
    write_sizes(model, ModelStructure.of(model), sources)
    return model


# -- Tensors ------------------------------------------------------------------------------------------------------


def _take(module: nn.Module, sides: Mapping[str, torch.Tensor]) -> None:
    """Keeps features of a linear layer, convolution, embedding or norm on its `in` and/or `out` side."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        for side, index in sides.items():
            dim = _dim(module, parameter, side)
            if dim is not None:
                parameter = _index(parameter, dim, index)
        setattr(module, name, parameter)
    _update_sizes(module)


def _dim(module: nn.Module, parameter: torch.Tensor, side: str) -> int | None:
    """Which dim of a parameter lies on a side of its module."""
    if parameter.dim() == 1:  # bias, or the scale of a norm
        return 0 if side == "out" else None
    if isinstance(module, nn.Embedding | Conv1D):
        return 1 if side == "out" else 0
    return 0 if side == "out" else 1


def _index(parameter: nn.Parameter, dim: int, index: torch.Tensor) -> nn.Parameter:
    taken = parameter.data.index_select(dim, index.to(parameter.device)).contiguous()
    return nn.Parameter(taken, requires_grad=parameter.requires_grad)


def _update_sizes(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]


def _expand(index: torch.Tensor, block: int) -> torch.Tensor:
    """Indices of the features of blocks (heads) that are `block` features wide."""
    return (index[:, None] * block + torch.arange(block)).flatten()


# -- Layers -------------------------------------------------------------------------------------------------------


def _set(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _shrink_layer(stack: StackView, layer: LayerView, kept: KeptLayer) -> None:
    if layer.attention is not None and kept.attention is not None:
        _shrink_attention(stack, layer, layer.attention, kept.attention)
    if layer.cross_attention is not None and kept.cross_attention is not None:
        _shrink_attention(stack, layer, layer.cross_attention, kept.cross_attention)
    if layer.ffn is not None and kept.ffn is not None:
        _shrink_ffn(stack, layer, layer.ffn, kept.ffn)


def _remove_norm(stack: StackView, layer: LayerView, path: str, norm: nn.Module) -> None:
    if stack.table.norm_first:
        _set(layer.module, path, RemovedNorm(norm))


def _shrink_attention(stack: StackView, layer: LayerView, attention: AttentionView, groups: torch.Tensor) -> None:
    table = attention.table
    if groups.numel() == 0:
        _set(layer.module, table.module, RemovedAttention(attention.module, table.returns_position_bias))
        if not table.output.startswith(table.module + "."):
            _set(layer.module, table.output, RemovedProjection(attention.o))
        _remove_norm(stack, layer, table.norm, attention.norm)
        return
    queries = _expand(_expand(groups, attention.num_heads // attention.num_kv_heads), attention.head_size)
    keys = _expand(groups, attention.head_size)
    if table.fused:
        _take(attention.q.module, {"out": torch.cat([queries + part.start for part in _parts(attention)])})
    else:
        for part, index in zip(_parts(attention), (queries, keys, keys)):
            _take(part.module, {"out": index})
    _take(attention.o, {"in": queries})
    heads = queries.numel() // attention.head_size
    for name in table.head_counts:
        setattr(attention.module, name, heads)
    for name in table.widths:
        setattr(attention.module, name, queries.numel())
    if stack.table.attention is table and table.position_bias is not None:
        columns = range(_position_bias(stack).weight.shape[1])
        used = [column for column in columns if column not in attention.module.pruned_heads]
        attention.module.pruned_heads = set(columns) - {used[i] for i in groups.tolist()}


def _parts(attention: AttentionView):
    return attention.q, attention.k, attention.v


def _position_bias(stack: StackView) -> nn.Embedding:
    name = stack.table.attention.position_bias
    owners = [layer.attention.module for layer in stack.layers if layer.attention is not None]
    return next(getattr(owner, name) for owner in owners if hasattr(owner, name))


def _shrink_ffn(stack: StackView, layer: LayerView, ffn: FeedForwardView, index: torch.Tensor) -> None:
    if index.numel():
        for up in ffn.up:
            _take(up, {"out": index})
        _take(ffn.down, {"in": index})
        return
    paths = next(paths for paths in ffn.table.up if len(paths) == len(ffn.up))
    for path, up in zip(paths, ffn.up):
        _set(layer.module, path, RemovedProjection(up))
    _set(layer.module, ffn.table.down, RemovedProjection(ffn.down))
    _remove_norm(stack, layer, ffn.table.norm, ffn.norm)


# -- Stacks -------------------------------------------------------------------------------------------------------


def _set_stack_layers(stack: StackView, modules: list[nn.Module], sources: Sequence[int]) -> None:
    bias = None
    if stack.table.attention.position_bias is not None and any(layer.attention for layer in stack.layers):
        bias = _position_bias(stack)
    for source, module in zip(sources, modules):
        module.flexcompress_source = getattr(module, "flexcompress_source", source)
    del stack.module_list[:]
    stack.module_list.extend(modules)
    _finish_stack(stack, bias)


def _finish_stack(stack: StackView, bias: nn.Embedding | None) -> None:
    """Renumbers the caches of a stack and hands its position bias to the first self-attention that is left.

    Caches are indexed by self-attention, not by layer: entry 0 must exist, for its length is that of the cache.
    """
    table = stack.table
    for attention_table in (table.attention, table.cross_attention):
        if attention_table is None:
            continue
        modules = [layer.get_submodule(attention_table.module) for layer in stack.module_list]
        left = [module for module in modules if not isinstance(module, RemovedAttention)]
        for index, module in enumerate(left):
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        if attention_table.position_bias is not None and left and bias is not None:
            _move_position_bias(left, attention_table.position_bias, bias)
        elif attention_table.returns_position_bias and _head_counts_differ(attention_table, left):
            for module in left:
                _compute_own_position_bias(module)


def _head_counts_differ(table: AttentionTable, modules: list[nn.Module]) -> bool:
    return len({getattr(module, table.head_counts[0]) for module in modules}) > 1


def _move_position_bias(modules: list[nn.Module], name: str, bias: nn.Embedding) -> None:
    """Keeps the columns of the bias that some head still uses, and numbers them anew."""
    columns = range(bias.weight.shape[1])
    used = [column for column in columns if any(column not in module.pruned_heads for module in modules)]
    new_id = {column: index for index, column in enumerate(used)}
    for module in modules:
        module.pruned_heads = {new_id[column] for column in used if column in module.pruned_heads}
        module.has_relative_attention_bias = False
        if hasattr(module, name):
            delattr(module, name)
    if len(used) < len(columns):
        _take(bias, {"out": torch.tensor(used)})
    modules[0].has_relative_attention_bias = True
    setattr(modules[0], name, bias)


def _drop_position_bias(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "position_bias": None}


def _compute_own_position_bias(module: nn.Module) -> None:
    # A T5 cross-attention has no bias, but hands the mask on in the shape of one, with a row for each of its own
    # heads. Another layer with another number of heads has to build its own.
    if not getattr(module, "flexcompress_own_bias", False):
        module.flexcompress_own_bias = True
        module.register_forward_pre_hook(_drop_position_bias, with_kwargs=True)


# -- The residual stream ------------------------------------------------------------------------------------------


HiddenSides = dict[str, tuple[nn.Module | nn.Parameter, tuple[str, ...]]]


def hidden_sides(view: ModelView) -> HiddenSides:
    """For every module with parameters, by name, on which sides it touches the residual stream.

    Raises:
        UnsupportedArchitectureError: The table says nothing about one of them.
    """
    inside: dict[int, tuple[str, ...]] = {}
    for stack in view.stacks.values():
        for layer in stack.layers:
            for module, sides in _layer_sides(layer):
                inside[id(module)] = sides
        # Norms stay when their sub-layer goes (post-LN), so they are found by path.
        for module in stack.module_list:
            for table in (stack.table.attention, stack.table.cross_attention, stack.table.ffn):
                if table is not None:
                    inside[id(module.get_submodule(table.norm))] = ("out",)
    architecture = view.architecture
    outside = {}
    for patterns, sides in (
        (architecture.embeddings, ("out",)),
        (architecture.writes, ("out",)),
        (architecture.reads, ("in",)),
        (architecture.both, ("in", "out")),
        (architecture.fixed, ()),
    ):
        outside.update((name, sides) for name, _ in view.matching(patterns))
    result = {}
    for name, item in view.owners():
        sides = inside.get(id(item), outside.get(name))
        if sides is None:
            raise UnsupportedArchitectureError(
                f"The table of {view.family} says nothing about `{name}` of {type(view.model).__name__}: add it to "
                f"architectures/{view.family}.py, or keep all dims of the residual stream."
            )
        result[name] = (item, sides)
    return result


def _layer_sides(layer: LayerView):
    for attention in (layer.attention, layer.cross_attention):
        if attention is not None:
            for part in _parts(attention):
                yield part.module, ("in",)
            yield attention.o, ("out",)
    if layer.ffn is not None:
        for up in layer.ffn.up:
            yield up, ("in",)
        yield layer.ffn.down, ("out",)


def _shrink_hidden(view: ModelView, touched: HiddenSides, index: torch.Tensor) -> None:
    taken: dict[int, nn.Parameter] = {}
    keep_alive = []  # ids are only unique among living objects
    for name, (item, sides) in touched.items():
        if isinstance(item, nn.Parameter):
            owner, _, attribute = name.rpartition(".")
            if sides:
                setattr(view.model.get_submodule(owner), attribute, _index(item, item.dim() - 1, index))
            continue
        for parameter_name, parameter in list(item.named_parameters(recurse=False)):
            dims = [dim for side in sides if (dim := _dim(item, parameter, side)) is not None]
            if not dims:
                continue
            keep_alive.append(parameter)
            new = taken.get(id(parameter), parameter)
            if new is parameter:
                for dim in dims:
                    new = _index(new, dim, index)
                taken[id(parameter)] = new
            setattr(item, parameter_name, new)
        _update_sizes(item)
