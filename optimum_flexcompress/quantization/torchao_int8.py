"""Int8 for PyTorch itself, through torchao: fast on CUDA GPUs once `torch.compile` has seen the model.

Weights are int8 with a scale for each output feature; activations are rounded at run time, with a scale for each token.
What is saved is an ordinary checkpoint that plain `from_pretrained` loads:

```python
import optimum_flexcompress
model = AutoModelForSequenceClassification.from_pretrained("int8", dtype=torch.bfloat16, device_map="cuda")
model = torch.compile(model, mode="max-autotune")
```

Without `torch.compile`, rounding activations costs more than int8 products save; and so it does on CPUs either way,
for which there are ONNX Runtime, OpenVINO and IPEX.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum.utils.save_utils import maybe_load_preprocessors
from torch import nn
from transformers import PreTrainedModel

from ..architectures import ARCHITECTURES, describe
from ..config_sizes import QUANT_METHOD
from ..errors import FlexCompressError, UnsupportedArchitectureError, nearest
from ..int8_weights import make_int8, require_torchao
from ..output import atomic_folder, check_output_folder
from ..tasks import get_task, infer_task
from ..token_dropping import set_lengths
from .saved import installed_versions, write_saved


BACKEND = "torchao"
# Int8 products on CUDA take sizes that are multiples of this; others would be computed on the CPU.
MULTIPLE = 8
_SETTINGS = ("per_channel", "embeddings", "fuse")


@dataclass(frozen=True)
class TorchAOTarget:
    """What the weights are for."""

    name: str


TARGETS = {"cuda": TorchAOTarget("cuda")}


def find_target(name: str, mode: str) -> TorchAOTarget:
    """The target of that name; `auto` is `cuda`.

    Raises:
        FlexCompressError: The name is not known, or the mode is not dynamic.
    """
    require_torchao()
    if name not in (*TARGETS, "auto"):
        raise FlexCompressError(f"{name!r} is no target of the backend torchao.{nearest(name, [*TARGETS, 'auto'])}")
    if mode != "dynamic":
        raise FlexCompressError(
            "The backend torchao takes the ranges of activations at run time: choose --mode dynamic, or --backend ort "
            "--target tensorrt for static int8 on GPUs."
        )
    return TARGETS["cuda"]


@dataclass
class TorchAOFolder:
    """What [`quantize_torchao`] wrote.

    Attributes:
        path: The folder.
        products: Linear layers with int8 weights.
        left: Linear layers of the stack that stay as they were, because of their sizes.
        bytes_before: The weights in the precision of the original.
        bytes_after: The weights file.
    """

    path: Path
    products: int
    left: int
    bytes_before: int
    bytes_after: int

    def summary(self) -> str:
        """A line for people."""
        line = f"model.safetensors: {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB, "
        line += f"{self.products} int8 products (dynamic)"
        if self.left:
            line += f", {self.left} not int8: their sizes are no multiples of {MULTIPLE} (prune with align={MULTIPLE})"
        return line


def quantize_torchao(
    model: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    mode: str = "dynamic",
    target: str = "auto",
    *,
    calibration_dataset: Any = None,
    num_calibration_samples: int = 200,
    task: str | None = None,
    length_config: Any = None,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> TorchAOFolder:
    """Gives the linear layers of an encoder int8 weights, and saves the model.

    Args:
        model: An encoder (BERT, RoBERTa, DistilBERT, ViT), compressed or stock, or its folder. A model is changed in
            place.
        output: The folder to write.
        mode: `dynamic`.
        target: `cuda`, or `auto` for the same.
        calibration_dataset: Without effect: dynamic int8 needs none.
        num_calibration_samples: Likewise.
        task: What the model is for; by default, what its `config.json` says.
        length_config: How many tokens each layer keeps, see [`optimum_flexcompress.set_lengths`]; by default, what the
            model carries.
        overwrite: Whether `output` may be replaced.
        progress: Without effect: it takes a moment.
        **options: The settings that all backends share; what torchao lacks is refused.

    Returns:
        What was written.

    Raises:
        FlexCompressError: A setting is not known, the model is no encoder or is int8 already, or `output` cannot be
            written.
        MissingExtraError: torchao is not installed.
    """
    find_target(target, mode)
    for name, value in options.items():
        if name not in _SETTINGS:
            raise FlexCompressError(f"The backend torchao has no setting {name!r}: leave it out.")
        if name == "per_channel" and not value:
            raise FlexCompressError("The backend torchao has a scale for each output feature: leave --per-tensor out.")
    check_output_folder(output, overwrite=overwrite, source=model)
    processors: list[Any] = []
    if not isinstance(model, PreTrainedModel):
        source = Path(model).expanduser()
        source = source if source.exists() else model
        if isinstance(source, Path):
            processors = maybe_load_preprocessors(source)
        model = get_task(task or infer_task(source)).load_model(source)
    if length_config is not None:
        set_lengths(model, length_config)
    names, left = _products_of(model)
    before = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    make_int8(model, names)
    _mark(model, names)
    with atomic_folder(output, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        for processor in processors:
            processor.save_pretrained(folder)
        files = sorted(file.name for file in folder.glob("*.safetensors"))
        write_saved(folder, BACKEND, "main", installed_versions("torch", "torchao", "transformers"), files)
        after = sum((folder / file).stat().st_size for file in files)
    return TorchAOFolder(Path(output), len(names), left, before, after)


def _products_of(model: PreTrainedModel) -> tuple[list[str], int]:
    """The names of the linear layers that become int8, and how many of the stack do not.

    The head is left alone: it reads one row for each sample, and int8 products need more than 16.
    """
    if getattr(model, "is_quantized", False):
        raise FlexCompressError("The model is int8 already: give it in floating point.")
    view = describe(model)
    if list(view.stacks) != ["encoder"] or view.stacks["encoder"].is_causal:
        encoders = sorted(
            kind
            for kind, table in ARCHITECTURES.items()
            if len(table.stacks) == 1 and not any(stack.causal for stack in table.stacks.values())
        )
        raise UnsupportedArchitectureError(
            f"The backend torchao makes encoders int8 ({', '.join(encoders)}), and a {view.family} model generates: its "
            "steps have too few rows for int8 products; choose --backend ort."
        )
    inner = {
        id(module)
        for layer in view.stacks["encoder"].layers
        for module in layer.module.modules()
        if isinstance(module, nn.Linear) and module.weight.numel()
    }
    linears = {name: module for name, module in model.named_modules() if id(module) in inner}
    names = [name for name, module in linears.items() if all(size % MULTIPLE == 0 for size in module.weight.shape)]
    if not names:
        raise FlexCompressError(
            f"The model has no linear layer whose sizes are multiples of {MULTIPLE}, which int8 products need: prune it "
            f"with align={MULTIPLE}, or choose --backend ort."
        )
    return names, len(linears) - len(names)


def _mark(model: PreTrainedModel, names: list[str]) -> None:
    """Makes the model one as it comes out of `from_pretrained`."""
    from ..loader import FlexCompressQuantizer, FlexCompressStructureConfig

    entry = {"quant_method": QUANT_METHOD, **(getattr(model.config, "quantization_config", None) or {}), "int8": names}
    model.config.quantization_config = entry
    model.hf_quantizer = FlexCompressQuantizer(FlexCompressStructureConfig(**entry), pre_quantized=True)
    model.quantization_method, model.is_quantized = QUANT_METHOD, True
