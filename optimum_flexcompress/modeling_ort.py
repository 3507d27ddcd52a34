"""ONNX Runtime models whose cache may have another shape in every layer.

Optimum's classes start generating with an empty cache of `num_attention_heads` heads, each `hidden_size //
num_attention_heads` wide, in every layer. Compressed decoders have other sizes, and say so in the inputs of their ONNX
files, which the classes here read. They run stock exports just the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM
from optimum.onnxruntime.modeling_seq2seq import ORTDecoderForSeq2Seq

from .errors import damage_explained


class _CacheShapesFromGraph:
    """Mixed into a session holder of Optimum: gives cache tensors the heads and head size that the graph names."""

    def _layer_shape(self, name: str) -> tuple[int, int] | None:
        """`(heads, head_size)` of a cache input or output, or None where the graph leaves them open."""
        shape = self.input_shapes.get(name) or self.output_shapes.get(name)
        if shape is None or len(shape) != 4 or not all(isinstance(shape[axis], int) for axis in (1, 3)):
            return None
        return shape[1], shape[3]

    def _with_true_cache(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        """Replaces the empty cache of a first step, whose shape Optimum computed from the configuration."""
        fixed = dict(model_inputs)
        for name in self.key_value_input_names:
            tensor, shape = model_inputs.get(name), self._layer_shape(name)
            if tensor is None or shape is None or tensor.shape[2] or (tensor.shape[1], tensor.shape[3]) == shape:
                continue
            heads, size = shape
            fixed[name] = torch.zeros((tensor.shape[0], heads, 0, size), dtype=tensor.dtype, device=tensor.device)
        return fixed

    def _prepare_onnx_inputs(self, use_torch: bool, model_inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_onnx_inputs(use_torch, self._with_true_cache(model_inputs))

    def _prepare_io_binding(
        self,
        model_inputs: dict[str, torch.Tensor],
        outputs_to_not_bind: set[str] | None = None,
        known_output_buffers: dict[str, str] | None = None,
        known_output_shapes: dict[str, tuple[int]] | None = None,
    ) -> tuple[dict[str, tuple[int]], dict[str, torch.Tensor]]:
        shapes = dict(known_output_shapes or {})
        for name in self.key_value_output_names:
            if name in shapes:
                layer = self._layer_shape(name.replace("present", "past_key_values")) or self._layer_shape(name)
                if layer is not None:
                    batch, _, length, _ = shapes[name]
                    shapes[name] = (batch, layer[0], length, layer[1])
        return super()._prepare_io_binding(
            self._with_true_cache(model_inputs), outputs_to_not_bind, known_output_buffers, shapes
        )


_STOP_SPINNING = "session.force_spinning_stop"


def resting_between_runs(options: SessionOptions | None) -> SessionOptions:
    """Session options whose threads sleep between two runs, unless they say otherwise.

    By default they spin, and hold back the threads of PyTorch, which does the rest of `generate`: a small decoder took
    three times as long with four beams.
    """
    options = SessionOptions() if options is None else options
    try:
        options.get_session_config_entry(_STOP_SPINNING)
    except RuntimeError:  # nothing is said
        options.add_session_config_entry(_STOP_SPINNING, "1")
    return options


class FlexORTModelForCausalLM(_CacheShapesFromGraph, ORTModelForCausalLM):
    """A decoder in ONNX Runtime, compressed or stock; see [`~optimum.onnxruntime.ORTModelForCausalLM`].

    Its threads sleep between two runs, which leaves the processor to the rest of `generate`; `session_options` with
    `session.force_spinning_stop` as `"0"` turn that off.

    Example:
    ```python
    >>> from optimum_flexcompress import FlexORTModelForCausalLM
    >>> model = FlexORTModelForCausalLM.from_pretrained("exported")
    >>> model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=20)
    ```
    """

    @classmethod
    def from_pretrained(cls, model_id: str | os.PathLike, *args: Any, **kwargs: Any) -> FlexORTModelForCausalLM:
        """See [`~optimum.onnxruntime.ORTModelForCausalLM`].

        Raises:
            FlexCompressError: A file is damaged.
        """
        kwargs["session_options"] = resting_between_runs(kwargs.get("session_options"))
        with damage_explained(model_id):
            return super().from_pretrained(model_id, *args, **kwargs)


class FlexORTDecoderForSeq2Seq(_CacheShapesFromGraph, ORTDecoderForSeq2Seq):
    """The decoder half of [`FlexORTModelForSeq2SeqLM`]."""


class FlexORTModelForSeq2SeqLM(ORTModelForSeq2SeqLM):
    """An encoder-decoder in ONNX Runtime, compressed or stock; see [`~optimum.onnxruntime.ORTModelForSeq2SeqLM`].

    Its threads sleep between two runs, as those of [`FlexORTModelForCausalLM`].

    Loads a merged decoder where the folder has one, else the pair of a decoder without and one with a cache.
    """

    _ort_decoder_class = FlexORTDecoderForSeq2Seq

    @classmethod
    def from_pretrained(cls, model_id: str | os.PathLike, *args: Any, **kwargs: Any) -> FlexORTModelForSeq2SeqLM:
        """See [`~optimum.onnxruntime.ORTModelForSeq2SeqLM`].

        Raises:
            FlexCompressError: A file is damaged.
        """
        folder = Path(model_id)
        if folder.is_dir() and not any(folder.glob("**/*merged*.onnx")):
            # Optimum would look for a merged decoder and warn that there is none.
            kwargs.setdefault("use_merged", False)
        kwargs["session_options"] = resting_between_runs(kwargs.get("session_options"))
        with damage_explained(model_id):
            return super().from_pretrained(model_id, *args, **kwargs)
