"""Runs a model so that its products are int8, and records that as TorchScript.

While a model runs, the calls that it makes to `linear`, `embedding` and `scaled_dot_product_attention` are answered
with the same in int8, written as the pairs of `quantize` and `dequantize` around each product that the fusions of IPEX
look for. The model keeps its code and its hooks, token dropping included, and every size stays dynamic.

IPEX's own `prepare` and `convert` do the same by replaying the sequence of operations that a first call made; they
leave `scaled_dot_product_attention` in single precision, and pass over the forward hooks of linear layers, so that
models which drop tokens would keep them all.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import FlexCompressError
from ..token_dropping.rows import additive_mask
from ..token_dropping.significance import ATTENTION_MAPS
from .calibration import BINS, Range, range_of
from .ipex_config import IPEXQuantizationConfig


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of `scaled_dot_product_attention`, `[batch, heads, length, size]` each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def divisor(self) -> float:
        return math.sqrt(self.query.shape[-1]) if self.scale is None else 1 / self.scale

    @property
    def row_mask(self) -> torch.Tensor | None:
        """What is added to the scores, `[batch, 1, 1, length]`: an encoder hides keys from all queries alike."""
        if self.attn_mask is None:
            return None
        row = self.attn_mask[:, :, :1]
        return additive_mask(row[:, 0, 0], self.query.dtype) if row.dtype is torch.bool else row


class Answering(TorchFunctionMode):
    """Answers some of the calls that a model makes.

    Args:
        model: The model.
        exclude: `fnmatch` patterns for the names of linear layers to leave alone.
    """

    def __init__(self, model: nn.Module, exclude: list[str]):
        super().__init__()
        self.names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
        self.exclude, self.attentions = exclude, 0
        self._answers: dict[Callable, Callable] = {
            F.linear: self._linear,
            F.scaled_dot_product_attention: self._attend,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self._answers.get(func, func)(*args, **(kwargs or {}))

    def __enter__(self):
        self.attentions = 0
        return super().__enter__()

    def _linear(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        name = self.names.get(id(weight))
        if name is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude):
            return F.linear(hidden, weight, bias)
        return self.linear(name, hidden, weight, bias)

    def _attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.attentions += 1
        return self.attend(f"attention {self.attentions}", AttentionCall(*args, **kwargs))

    def linear(self, name: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def attend(self, name: str, call: AttentionCall) -> torch.Tensor:
        raise NotImplementedError


def attention_maps(call: AttentionCall, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`softmax(query @ key / divisor + mask)`, in the form that the fusions know; `key` is `[..., size, length]`."""
    scores = torch.matmul(query, key) / call.divisor
    mask = call.row_mask
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)


def _add(left: Any, right: Any, **kwargs: Any) -> torch.Tensor:
    """`left + right`, without the scalar zero that stands for a removed sub-layer: fused norms take no scalars."""
    for part, other in ((left, right), (right, left)):
        if isinstance(part, torch.Tensor) and isinstance(other, torch.Tensor) and part.dim() == 0 < other.dim():
            if part.is_floating_point() and part.item() == 0:
                return other
    return torch.add(left, right, **kwargs)


class Observer(Answering):
    """Measures the ranges of everything that is going to be rounded, in two passes over the examples."""

    def __init__(self, model: nn.Module, config: IPEXQuantizationConfig):
        super().__init__(model, config.exclude)
        self.config = config
        self.extremes: dict[str, Range] = {}
        self.counts: dict[str, np.ndarray] = {}
        self.counting = False

    def see(self, name: str, tensor: torch.Tensor) -> None:
        low, high = self.extremes.get(name, (0.0, 0.0))
        if not self.counting:
            least, most = (float(value) for value in torch.aminmax(tensor.detach()))
            if not (math.isfinite(least) and math.isfinite(most)):
                raise FlexCompressError(
                    f"The calibration examples give {least}..{most} in {name}: the model overflows on them; check its "
                    "weights and the examples."
                )
            self.extremes[name] = min(low, least), max(high, most)
            return
        if low < high:  # else there is nothing but zeros
            found = torch.histc(tensor.detach(), BINS, low, high).long().numpy()
            self.counts[name] = self.counts.get(name, 0) + found

    def linear(self, name, hidden, weight, bias):
        self.see(name, hidden)
        return F.linear(hidden, weight, bias)

    def attend(self, name, call):
        if not self.config.attention:
            return F.scaled_dot_product_attention(**vars(call))
        maps = attention_maps(call, call.query, call.key.transpose(-1, -2))
        for part, tensor in (("query", call.query), ("key", call.key), ("maps", maps), ("value", call.value)):
            self.see(f"{name} {part}", tensor)
        return torch.matmul(maps, call.value)

    def ranges(self) -> dict[str, Range]:
        """The range of every tensor that was seen."""
        if not self.counts:
            return self.extremes
        method, percentile = self.config.calibration_method, self.config.percentile
        return {
            name: range_of(self.counts[name], ends, method, percentile) if name in self.counts else ends
            for name, ends in self.extremes.items()
        }


class Int8(Answering):
    """Answers with int8 products.

    Args:
        model: The model; its parameters must stay where they are.
        config: How.
        ranges: Of static mode: what [`Observer.ranges`] returned.
        shared_maps: Whether attention maps are computed for all to see, because tokens are chosen by them.
    """

    def __init__(
        self,
        model: nn.Module,
        config: IPEXQuantizationConfig,
        ranges: Mapping[str, Range] | None,
        shared_maps: bool,
    ):
        super().__init__(model, config.exclude)
        self.config, self.ranges, self.shared_maps = config, ranges, shared_maps
        self.packed = nn.ModuleDict()
        self.products: set[str] = set()
        self.tables: set[str] = set()
        # A view of contiguous numbers, and not what `reshape` finds best, is what int8 attention is fused with.
        self._answers[torch.Tensor.reshape] = lambda tensor, *shape: tensor.contiguous().view(*shape)
        self._answers[torch.Tensor.add] = self._answers[torch.Tensor.__add__] = _add
        if config.embeddings:
            self._answers[F.embedding] = self._embed

    def pair(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as it is after rounding to 8 bits without sign."""
        low, high = self.ranges[name]
        steps = 127 if self.config.reduce_range else 255
        scale = max((high - low) / steps, 1e-9)
        return torch.quantize_per_tensor(tensor, scale, round(-low / scale), torch.quint8).dequantize()

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Int8 weights around zero."""
        weight = weight.detach()
        if not self.config.per_channel:
            return torch.quantize_per_tensor(weight, float(weight.abs().max().clamp_min(1e-9)) / 127, 0, torch.qint8)
        scales = weight.abs().amax(1).clamp_min(1e-9).double() / 127
        return torch.quantize_per_channel(weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8)

    def linear(self, name, hidden, weight, bias):
        self.products.add(name)
        if self.config.is_static:
            return F.linear(self.pair(name, hidden), self.weight(weight).dequantize(), bias)
        # Newer versions of torch than that of IPEX may have it elsewhere.
        from torch.ao.nn.quantized.modules.linear import LinearPackedParams

        key = name.replace(".", "_")
        if key not in self.packed:
            self.packed[key] = LinearPackedParams(torch.qint8)
            self.packed[key].set_weight_bias(self.weight(weight), bias)
        return torch.ops.quantized.linear_dynamic(hidden, self.packed[key]._packed_params, self.config.reduce_range)

    def attend(self, name, call):
        key = call.key.transpose(-1, -2)
        if self.config.is_static and self.config.attention:
            self.products.update((f"{name} scores", f"{name} context"))
            # The key is rounded as the product reads it: before it is turned, the fusion does not see the pair.
            maps = attention_maps(call, self.pair(f"{name} query", call.query), self.pair(f"{name} key", key))
            weights, value = self.pair(f"{name} maps", maps), self.pair(f"{name} value", call.value)
        elif self.shared_maps:
            weights = maps = attention_maps(call, call.query, key)
            value = call.value
        else:
            return F.scaled_dot_product_attention(**vars(call))
        ATTENTION_MAPS.set(maps if self.shared_maps else None)
        return torch.matmul(weights, value)

    def _embed(self, ids: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.tables.add(self.names.get(id(weight), str(id(weight))))
        scales = weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
        rows = (weight.detach() / scales).round().to(torch.int8)
        return F.embedding(ids, rows) * F.embedding(ids, scales)
