"""What a model costs before anything is timed: parameters, multiply-accumulates, bytes on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import FlexCompressError
from ..quantization.saved import has_saved, peek_saved
from ..tasks.base import Task


PYTORCH_ENDINGS = (".safetensors", "pytorch_model.bin", ".bin.index.json", ".safetensors.index.json")
ONNX_ENDINGS = (".onnx", ".onnx_data", ".onnx.data")


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Counts the multiply-accumulates of the matrix products in one forward pass.

    This is torch's FLOP counter, halved, with the formula for the attention kernel on CPU that it lacks. Products in
    causal attention are counted in full, as the kernels compute them before masking or as if they did.

    Args:
        model: Any model; compressed ones are counted at their physical sizes.
        inputs: Tensors by name.

    Returns:
        Multiply-accumulates for the whole batch.
    """
    was_training = model.training
    model.eval()
    try:
        # Inference mode would hide composite operators from the counter, which knows only what they consist of.
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            model(**inputs)
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products for each query head: `(N_q, d) x (d, N_k)` and `(N_q, N_k) x (N_k, d_v)`.

    The counter passes shapes: query `(B, H, N_q, d)`, key `(B, H_kv, N_k, d)`, value `(B, H_kv, N_k, d_v)`.
    """
    batch, heads, length, size = query
    keys, value_size = key[-2], value[-1]
    return 2 * batch * heads * length * keys * (size + value_size)


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The files in a folder that hold weights, in the order of their names; not those of models in folders below."""
    endings = PYTORCH_ENDINGS + ONNX_ENDINGS
    folder = Path(folder)
    if has_saved(folder):
        return sorted(peek_saved(folder).files.values())
    others = {file.parent for file in folder.rglob("config.json")} - {folder}
    found = [file for file in folder.rglob("*") if file.is_file() and file.name.endswith(endings)]
    return sorted(file for file in found if others.isdisjoint(file.parents))


def file_size(path: str | os.PathLike) -> int:
    """The bytes of the weights of a model folder (or of one model file and its external data).

    Args:
        path: The folder or file.

    Returns:
        Bytes; tokenizer and configuration files do not count.
    """
    path = Path(path)
    if path.is_file():
        data = [path.with_name(path.name + ending) for ending in ("_data", ".data")]
        return path.stat().st_size + sum(file.stat().st_size for file in data if file.exists())
    return sum(file.stat().st_size for file in weight_files(path))


def skeleton(folder: str | os.PathLike, task: Task, device: str = "cpu") -> nn.Module:
    """A PyTorch model of the sizes and lengths that a folder describes, with random weights.

    An ONNX folder tells its sizes in `config.json`, as does a PyTorch one; the numbers of parameters and MACs of the
    architecture do not depend on what runs it.

    Args:
        folder: A folder with a `config.json`.
        task: What the model is for.
        device: Where to make it; on `meta` it takes no memory.

    Returns:
        The model, in evaluation mode.

    Raises:
        FlexCompressError: The configuration is damaged.
    """
    from transformers import AutoConfig

    from ..config_sizes import LENGTHS_KEY
    from ..structure import ModelStructure
    from ..surgery import resize
    from ..token_dropping import set_lengths

    config = AutoConfig.from_pretrained(str(folder))
    description = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    structure = (description.get("quantization_config") or {}).get("structure")
    try:
        # Surgery, below, counts with tensors of its own, which are no part of the model.
        with torch.device(device):
            model = task.auto_class.from_config(config).eval()
    except (TypeError, ValueError) as error:
        raise FlexCompressError(f"{folder}/config.json describes no {task.auto_class_name}: {error}") from error
    if structure:
        model = resize(model, ModelStructure.from_dict(structure))
    lengths = description.get(LENGTHS_KEY)
    return set_lengths(model, lengths) if lengths else model
