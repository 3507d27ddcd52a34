"""Int8 models for Intel Extension for PyTorch (IPEX): TorchScript that its fusions run on Xeon processors."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from optimum.quantization_base import OptimumQuantizer
from optimum.utils.save_utils import maybe_load_preprocessors
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..architectures import describe
from ..errors import FlexCompressError
from ..evaluation.formatting import counted
from ..evaluation.inputs import example_batch
from ..export.dropping import dropping_length
from ..output import atomic_folder, check_output_folder
from ..tasks import get_task, infer_task
from ..token_dropping import LengthConfig, lengths_of, set_lengths
from ..token_dropping.significance import ATTENTION_MAPS
from .examples import example_row
from .int8_trace import Int8, Observer
from .ipex_config import IPEXQuantizationConfig
from .ipex_lane import PACKAGE, load_ipex
from .ipex_models import check_attentions, check_family, single_precision_copy, task_of
from .saved import installed_versions, write_saved


BACKEND = "ipex"
MODEL_NAME = "model.pt"
# What the head returns, by task; all other tasks return logits.
OUTPUTS = {"feature-extraction": ("last_hidden_state",), "question-answering": ("start_logits", "end_logits")}
TASKS = (
    "feature-extraction",
    "fill-mask",
    "image-classification",
    "question-answering",
    "text-classification",
    "token-classification",
)
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
# Batch and length at which the recorded graph is compared with the model, if it does not drop tokens.
CHECK_SHAPE = (3, 11)


@dataclass
class IPEXFolder:
    """What [`IPEXQuantizer.quantize`] wrote.

    Attributes:
        path: The folder.
        config: The settings, with the target that was chosen.
        products: Int8 products.
        tables: Int8 embedding tables.
        dropping_layers: Layers that drop tokens.
        bytes_before: The parameters in single precision.
        bytes_after: The saved file.
    """

    path: Path
    config: IPEXQuantizationConfig
    products: int
    tables: int
    dropping_layers: int
    bytes_before: int
    bytes_after: int

    def summary(self) -> str:
        """A few lines for people."""
        parts = [
            f"{MODEL_NAME}: {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB",
            f"{counted(self.products, 'int8 product')} ({self.config.mode})",
        ]
        if self.tables:
            parts.append(counted(self.tables, "int8 embedding table"))
        if self.dropping_layers:
            parts.append(counted(self.dropping_layers, "layer drops tokens", "layers drop tokens"))
        expectation = self.config.expectation()
        return ", ".join(parts) + (f"\n{expectation}" if expectation else "")


class IPEXQuantizer(OptimumQuantizer):
    """Makes encoders int8 for IPEX: BERT, RoBERTa, DistilBERT and ViT, stock, pruned or length-adaptive.

    IPEX 2.8 was the last one and needs torch 2.8, in an environment of its own. What it saves is a TorchScript archive,
    which is code: see [`~optimum_flexcompress.modeling_ipex.IPEXQuantizedModel`] before opening one from elsewhere.

    Example:
    ```python
    >>> from optimum_flexcompress import IPEXQuantizer, IPEXQuantizationConfig
    >>> quantizer = IPEXQuantizer.from_pretrained("fine-tuned")
    >>> quantizer.quantize("int8", IPEXQuantizationConfig(mode="static"), calibration_dataset=rows)
    >>> model = IPEXQuantizedModelForSequenceClassification.from_pretrained("int8")
    ```

    Args:
        model: The model, in single precision; it becomes the quantizer's own.
        task: What it is for.
        processors: Tokenizer or image processor, to be saved beside.
    """

    def __init__(self, model: PreTrainedModel, task: str, processors: Iterable[Any] = ()):
        load_ipex()
        self.model, self.task, self.processors = model.eval(), task, list(processors)
        self.report: IPEXFolder | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | os.PathLike,
        file_name: str | None = None,
        task: str | None = None,
        processor: Any = None,
        length_config: Any = None,
    ) -> IPEXQuantizer:
        """Opens what is to be quantized.

        Args:
            model_or_path: A folder (or Hub id) with a PyTorch model, or a model, which stays as it is.
            file_name: Without effect: PyTorch models are whole folders.
            task: What the model is for, where its class does not tell it.
            processor: Of a model in memory: its tokenizer or image processor, to be saved beside.
            length_config: How many tokens each layer keeps: a [`~token_dropping.LengthConfig`], a list of counts or of
                fractions, or `"full"`; by default, what the model carries.

        Raises:
            FlexCompressError: IPEX cannot be used here, there is no model, IPEX cannot do its family or task, or the
                lengths do not suit it.
        """
        load_ipex()
        processors = [processor] if processor is not None else []
        if isinstance(model_or_path, PreTrainedModel):
            task = get_task(task or task_of(model_or_path)).name
            model = model_or_path
        else:
            source = Path(model_or_path).expanduser()
            if source.is_dir() and any(source.glob("*.onnx")):
                raise FlexCompressError(
                    f"{source} is an ONNX model: give IPEX the PyTorch model that it was made from."
                )
            task = get_task(task or infer_task(source)).name
            if task in TASKS:
                model = get_task(task).load_model(model_or_path, dtype=torch.float32)
            if not processors and source.is_dir():
                processors = maybe_load_preprocessors(source)
        if task not in TASKS:
            raise FlexCompressError(f"IPEX runs no {task} models: it takes {', '.join(TASKS)}; use --backend ort.")
        check_family(model)
        if model is model_or_path:
            model = single_precision_copy(model)
        if length_config is not None:
            set_lengths(model, length_config)
        return cls(model, task, processors)

    def quantize(
        self,
        save_dir: str | os.PathLike,
        quantization_config: IPEXQuantizationConfig | None = None,
        file_prefix: str | None = None,
        *,
        calibration_dataset: Iterable[Mapping[str, Any]] | None = None,
        num_calibration_samples: int = 200,
        overwrite: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> Path:
        """Writes the int8 model.

        Args:
            save_dir: The folder to write, with `model.pt`, the configuration, the tokenizer or image processor, and the
                record that finds damage.
            quantization_config: How.
            file_prefix: Without effect: the class that opens the folder finds its files by their names.
            calibration_dataset: For static mode: examples, one mapping for each, such as the rows of a tokenised
                `datasets.Dataset`; unpadded. Columns that the model does not take are ignored.
            num_calibration_samples: How many examples are used at most.
            overwrite: Whether `save_dir` may be replaced.
            progress: Whether progress is shown.
            **options: Instead of `quantization_config`: the arguments of [`IPEXQuantizationConfig`].

        Returns:
            `save_dir`.

        Raises:
            FlexCompressError: Static mode without examples, a setting is unknown, or `save_dir` cannot be written.
        """
        if quantization_config is not None and options:
            raise FlexCompressError(
                f"quantize() got a configuration and also {', '.join(options)}: put them into the configuration."
            )
        config = quantization_config or IPEXQuantizationConfig(**options)
        save_dir = check_output_folder(save_dir, overwrite=overwrite)
        ranges = self._calibrate(config, calibration_dataset, num_calibration_samples, progress)
        lengths = lengths_of(self.model)
        answers = Int8(self.model, config, ranges, shared_maps=lengths is not None)
        graph = self._record(answers, lengths)
        with atomic_folder(save_dir, overwrite=overwrite) as folder:
            torch.jit.save(graph, str(folder / MODEL_NAME))
            self.model.config.save_pretrained(folder)
            config.save_pretrained(folder)
            for processor in self.processors:
                processor.save_pretrained(folder)
            stack = next(iter(describe(self.model).stacks.values()))
            write_saved(
                folder,
                BACKEND,
                BACKEND,
                installed_versions("torch", PACKAGE, "transformers", "optimum", "optimum-flexcompress"),
                [MODEL_NAME],
                task=self.task,
                inputs=list(self._inputs()),
                outputs=list(OUTPUTS.get(self.task, ("logits",))),
                mode=config.mode,
                # How many attention maps of one row there are at a time, if they are to be seen at all.
                map_heads=max((part.attention.num_heads for part in stack.layers if part.attention), default=0)
                if lengths is not None
                else 0,
            )
            size = (folder / MODEL_NAME).stat().st_size
        before = sum(parameter.numel() * 4 for parameter in self.model.parameters())
        dropping = 0 if lengths is None else _dropping_layers(lengths)
        self.report = IPEXFolder(save_dir, config, len(answers.products), len(answers.tables), dropping, before, size)
        return save_dir

    def _inputs(self) -> dict[str, torch.Tensor]:
        """A batch to record with: two rows, the second with padding."""
        lengths, config = lengths_of(self.model), self.model.config
        length = CHECK_SHAPE[1] if lengths is None else dropping_length(config, lengths)
        return self._batch(2, length)

    def _batch(self, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
        batch = example_batch(self.model.config, get_task(self.task), rows, length, seed)
        if "attention_mask" in batch:
            batch["attention_mask"][-1, -(length // 4 or 1) :] = 0
        return {name: batch[name] for name in INPUTS if name in batch}

    def _calibrate(
        self,
        config: IPEXQuantizationConfig,
        examples: Iterable[Mapping[str, Any]] | None,
        limit: int,
        progress: bool,
    ) -> dict[str, tuple[float, float]] | None:
        if not config.is_static:
            return None
        if examples is None:
            raise FlexCompressError(
                "Static quantization needs calibration examples (calibration_dataset, --dataset): give some, or choose "
                "dynamic."
            )
        rows = [self._row(example) for example in islice(iter(examples), limit)]
        if not rows:
            raise FlexCompressError("There are no calibration examples: give a data set with at least one row.")
        observer = Observer(self.model, config)
        passes = (False,) if config.calibration_method == "minmax" else (False, True)
        bar = tqdm(total=len(passes) * len(rows), desc="Calibrating", disable=not progress, leave=False)
        with bar, torch.no_grad():
            for observer.counting in passes:
                for row in rows:
                    with observer:
                        self.model(**row)
                    bar.update()
        return observer.ranges()

    def _row(self, example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        row = {name: torch.from_numpy(values) for name, values in example_row(example).items() if name in INPUTS}
        main = self.model.main_input_name
        if main not in row:
            raise FlexCompressError(
                f"The calibration examples have no column {main}, which the model reads; they have "
                f"{', '.join(sorted(example))}. Prepare them as for evaluating the model."
            )
        return {name: value.float() if name == "pixel_values" else value.long() for name, value in row.items()}

    def _record(self, answers: Int8, lengths: LengthConfig | None) -> torch.jit.ScriptModule:
        """The model as TorchScript, compared with what it does when Python runs it.

        Raises:
            FlexCompressError: They differ.
        """
        inputs = self._inputs()
        module = _Recorded(self.model, OUTPUTS.get(self.task, ("logits",)), tuple(inputs)).eval()
        with torch.no_grad(), _quietly():
            with answers:
                module(*inputs.values())
            check_attentions(self.model, answers.attentions)
            module.packed = answers.packed
            with answers:
                graph = torch.jit.trace(module, tuple(inputs.values()), strict=False, check_trace=False)
            graph = torch.jit.freeze(graph)
            # Of two tokens that are almost equally significant, either may go: that happens, not time after time.
            for seed in range(1, 4):
                length = inputs.get("input_ids", torch.zeros(1, 1)).shape[1]
                batch = self._batch(3, CHECK_SHAPE[1] if lengths is None else max(length - 1, 2), seed)
                with answers:
                    expected = module(*batch.values())
                found = graph(*batch.values())
                ATTENTION_MAPS.set(None)
                if all(_alike(a, b) for a, b in zip(found, expected, strict=True)):
                    return graph
        raise FlexCompressError(
            "The recorded graph does not compute what the model computes: report this with the model's config.json."
        )


class _Recorded(nn.Module):
    """A model with tensors for inputs and a tuple of tensors for output."""

    def __init__(self, model: PreTrainedModel, outputs: tuple[str, ...], inputs: tuple[str, ...]):
        super().__init__()
        self.model, self.outputs, self.inputs = model, outputs, inputs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(**dict(zip(self.inputs, inputs, strict=True)), return_dict=True)
        return tuple(output[name] for name in self.outputs)


def quantize_ipex(
    model: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    mode: str = "dynamic",
    target: str = "auto",
    *,
    calibration_dataset: Iterable[Mapping[str, Any]] | None = None,
    num_calibration_samples: int = 200,
    task: str | None = None,
    length_config: Any = None,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> IPEXFolder:
    """From a model to an int8 folder for IPEX in one call.

    Args:
        model: A PyTorch model, compressed or stock, or its folder.
        output: The folder to write; the classes `IPEXQuantizedModelFor...` open it.
        mode: `dynamic` or `static`.
        target: The processor: `avx2`, `avx512`, `avx512_vnni`, or `auto` for this machine's.
        calibration_dataset: For static mode: see [`IPEXQuantizer.quantize`].
        num_calibration_samples: How many of them are used at most.
        task: Where the model's class does not tell it.
        length_config: How many tokens each layer keeps; by default, what the model carries.
        overwrite: Whether `output` may be replaced.
        progress: Whether progress is shown.
        **options: Further arguments of [`IPEXQuantizationConfig`].

    Returns:
        What was written.

    Raises:
        FlexCompressError: See [`IPEXQuantizer.from_pretrained`] and [`IPEXQuantizer.quantize`].
    """
    load_ipex()
    if not options.pop("fuse", True):
        raise FlexCompressError("IPEX fuses operators when it runs the model: leave --no-fuse out.")
    check_output_folder(output, overwrite=overwrite, source=model)
    config = IPEXQuantizationConfig(mode=mode, target=target, **options)
    quantizer = IPEXQuantizer.from_pretrained(model, task=task, length_config=length_config)
    quantizer.quantize(
        output,
        config,
        calibration_dataset=calibration_dataset,
        num_calibration_samples=num_calibration_samples,
        overwrite=overwrite,
        progress=progress,
    )
    return quantizer.report


def _dropping_layers(lengths: LengthConfig) -> int:
    first = None if lengths.unit == "counts" else 1.0
    return sum(value != before for before, value in zip((first, *lengths.values), lengths.values, strict=False))


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether most of the vectors are near: what is almost halfway may be rounded, or dropped, the other way."""
    if found.shape != expected.shape:
        return False
    # Start and end logits are numbers of tokens, not vectors.
    found, expected = (tensor.unsqueeze(-1) if tensor.dim() == 2 else tensor for tensor in (found, expected))
    errors = (found - expected).norm(dim=-1)
    return bool(errors.median() <= 0.1 * expected.norm(dim=-1).median() + 1e-4)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Tracer warnings name lines inside Transformers; what they warn of is checked by running the result."""
    with warnings.catch_warnings():
        for category in (torch.jit.TracerWarning, UserWarning, DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        yield
