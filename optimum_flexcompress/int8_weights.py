"""Int8 weights in PyTorch models, computed with by torchao.

torchao holds an int8 weight in a tensor class of its own, which safetensors cannot store. A checkpoint holds its parts
instead: `weight_int8`, `weight_scale`, and an empty `weight`, at which loading stops where this package is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .errors import FlexCompressError, MissingExtraError


VALUES, SCALE = "weight_int8", "weight_scale"
# From here on, half precision too holds every number of bfloat16's precision.
SMALLEST = 2.0**-17


def require_torchao() -> None:
    """Raises MissingExtraError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtraError("torchao", "torchao")


def round_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a weight to int8, with a scale for each output feature.

    Args:
        weight: `(out, in)`.

    Returns:
        `(out, in)`, int8 from -127 to 127; and `(out, 1)`, single precision, rounded up to the precision of bfloat16:
        loading a model in half precision casts all that is floating, and so costs the scales nothing.
    """
    weight = weight.detach().float()
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=SMALLEST)
    scale = ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return torch.clamp(torch.round(weight / scale), -127, 127).to(torch.int8), scale


def _as_torchao(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A weight whose products round their other factor to int8 too, row by row."""
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    scale = scale.float()
    weight = Int8Tensor(
        values,
        scale,
        [1, values.shape[1]],
        dtype,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()),
    )
    return nn.Parameter(weight, requires_grad=False)


def make_int8(model: nn.Module, names: Iterable[str]) -> None:
    """Gives modules int8 weights, in place."""
    require_torchao()
    for name in names:
        module = model.get_submodule(name)
        values, scale = round_weight(module.weight)
        module.weight = _as_torchao(values, scale, module.weight.dtype)


def make_room(model: nn.Module, names: Iterable[str]) -> None:
    """Prepares an empty model for the parts of int8 weights.

    Raises:
        FlexCompressError: The model has no such modules.
    """
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear):
            raise FlexCompressError(f"config.json names int8 weights in {name}, which this model does not have.")
        shape, place = module.weight.shape, {"device": module.weight.device}
        module.register_buffer(VALUES, torch.empty(shape, dtype=torch.int8, **place))
        module.register_buffer(SCALE, torch.empty((shape[0], 1), **place))
        module.weight = nn.Parameter(torch.empty(0, **place), requires_grad=False)


def insert_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Makes weights of the parts, once these are loaded."""
    for name in names:
        module = model.get_submodule(name)
        values, scale, dtype = getattr(module, VALUES), getattr(module, SCALE), module.weight.dtype
        delattr(module, VALUES)
        delattr(module, SCALE)
        module.weight = _as_torchao(values, scale, dtype)


def state_with_int8(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The state of a model with int8 weights, as a checkpoint stores it."""
    state = model.state_dict()
    for name in names:
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = torch.empty(0, dtype=weight.dtype)
        state[f"{name}.{VALUES}"], state[f"{name}.{SCALE}"] = weight.qdata, weight.scale
    return state
