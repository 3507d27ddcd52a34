"""Writes a model, compressed or stock, as ONNX files in the layout that Optimum's `ORTModel` classes load."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.onnx.base import OnnxConfig
from optimum.exporters.onnx.convert import export_models, validate_models_outputs
from optimum.exporters.tasks import TasksManager
from optimum.onnx import merge_decoders
from optimum.utils.save_utils import maybe_load_preprocessors
from transformers import PreTrainedModel

from ..errors import FlexCompressError
from ..output import atomic_folder, check_output_folder
from ..tasks import CLASS_ENDINGS, SYNONYMS, get_task, infer_task
from ..token_dropping import LengthConfig, lengths_of, using_lengths
from ..token_dropping.model import write_lengths
from .configs import PlainTextOnnxConfig, export_configs, read_sizes
from .dropping import dropping_length


logger = logging.getLogger(__name__)

WITH_PAST = "-with-past"
GENERATION_TASKS = ("text-generation", "text2text-generation")
DECODER, DECODER_WITH_PAST, DECODER_MERGED = (
    "decoder_model.onnx",
    "decoder_with_past_model.onnx",
    "decoder_model_merged.onnx",
)
# Heads that Optimum's table lacks for some families, and that read token ids and a mask like any encoder.
PLAIN_TASKS = ("text-classification", "token-classification", "question-answering", "feature-extraction")
# Lengths the traced graph is checked at; the tracing itself uses Optimum's 16.
CHECK_SHAPES = {"batch_size": 3, "sequence_length": 11}
ATOL = 1e-4


def export_onnx(
    model: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    task: str | None = None,
    *,
    opset: int | None = None,
    use_cache: bool = True,
    merge: bool = True,
    fuse: bool = False,
    processor: Any = None,
    length_config: Any = None,
    atol: float = ATOL,
    validate: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Exports a model to ONNX with dynamic batch and sequence lengths.

    Encoders and classifiers become `model.onnx`, decoders one `model.onnx` whose past may be empty, encoder-decoders
    `encoder_model.onnx`, `decoder_model.onnx`, `decoder_with_past_model.onnx` and `decoder_model_merged.onnx`. The
    files load in Optimum's `ORTModelFor*` classes; compressed decoders and encoder-decoders, whose layers may cache
    different numbers of heads, in [`FlexORTModelForCausalLM`] and [`FlexORTModelForSeq2SeqLM`].

    Args:
        model: The model, or the folder (or Hub id) of one.
        output: The folder to write; the configuration and the tokenizer or image processor are saved into it too.
        task: An Optimum task such as `text-classification`; inferred from the model's class when not given.
        opset: The ONNX operator set; Optimum's choice for the family when not given.
        use_cache: Whether decoders take and return their cache.
        merge: Whether the two decoders of an encoder-decoder are also merged into one file.
        fuse: Whether attention is fused for ONNX Runtime's CPU kernels, see [`fuse_graph`]. The result then runs in
            ONNX Runtime only.
        processor: The tokenizer or image processor to save; looked for where the model came from when not given.
        length_config: How many tokens each layer of the encoder keeps: a [`~token_dropping.LengthConfig`], a list of
            counts or of fractions, or `"full"` for all tokens; by default, what the model carries. The files drop
            tokens at any batch size and length; a count that is not below the length of the input drops none.
        atol: Largest difference to PyTorch's outputs that is accepted; where the largest of them is above 1, as a share
            of that one.
        validate: Whether the files are run and compared with PyTorch, at other lengths than the traced ones.
        overwrite: Whether `output` may be replaced.

    Returns:
        The ONNX files.

    Raises:
        FlexCompressError: The task is unknown or not exportable, a decoder layer lacks an attention that ONNX decoders
            need, the lengths do not suit the model, the outputs differ from PyTorch's, or `output` cannot be written.
        UnsupportedArchitectureError: The family has no architecture table.
    """
    output = check_output_folder(output, overwrite=overwrite, source=model)
    if not isinstance(model, PreTrainedModel):
        source = os.fspath(model)
        task = task or infer_task(source)
        if processor is None and os.path.isdir(source):
            processor = maybe_load_preprocessors(source)
        model = get_task(task.removesuffix(WITH_PAST)).load_model(source, dtype=torch.float32)
    task = _export_task(model, task, use_cache)
    sizes = read_sizes(model)
    processors = processor if isinstance(processor, list) else [processor] if processor is not None else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_it_was(model))
        if length_config is not None:
            stack.enter_context(using_lengths(model, length_config))
            write_lengths(model, LengthConfig.parse(length_config))
        folder = stack.enter_context(atomic_folder(output, overwrite=overwrite))
        model = _single_precision(model)
        if _supported(model, task):
            configs = export_configs(model, task, sizes, processors)
            with _quiet():
                onnx_export_from_model(
                    model,
                    folder,
                    opset=opset,
                    task=task,
                    monolith=task == "feature-extraction",
                    custom_onnx_configs=configs,
                    no_post_process=True,
                    do_validation=False,
                    preprocessors=processors,
                )
        else:
            configs = {"model": PlainTextOnnxConfig(model.config, task=task)}
            model.config.save_pretrained(folder)
            with _quiet():
                export_models({"model": (model, configs["model"])}, folder, opset=opset, output_names=["model.onnx"])
        for item in processors:
            item.save_pretrained(folder)
        if validate:
            _compare_with_pytorch(model, folder, configs, task, atol)
        if merge and (folder / DECODER_WITH_PAST).is_file():
            with _quiet():
                merge_decoders(
                    folder / DECODER, folder / DECODER_WITH_PAST, save_path=folder / DECODER_MERGED, strict=False
                )
        if fuse:
            from .fusion import fuse_folder

            fuse_folder(folder)
        names = sorted(file.name for file in folder.glob("*.onnx"))
    return [output / name for name in names]


def _export_task(model: PreTrainedModel, task: str | None, use_cache: bool) -> str:
    """Optimum's name of the task, with `-with-past` where the model generates with a cache."""
    if task is None:
        name = type(model).__name__
        task = next((value for ending, value in CLASS_ENDINGS.items() if name.endswith(ending)), None)
    if task is None:
        try:
            task = TasksManager._infer_task_from_model_or_model_class(model=model)
        except ValueError:
            raise FlexCompressError(
                f"The class {type(model).__name__} does not tell the task: give one, such as text-classification."
            ) from None
    plain = task.removesuffix(WITH_PAST)
    plain = TasksManager.map_from_synonym(SYNONYMS.get(plain, plain))
    if plain not in TasksManager.get_all_tasks():
        get_task(plain)  # raises, naming the nearest known task
    with_past = use_cache and plain in GENERATION_TASKS
    return plain + WITH_PAST if with_past else plain


def _supported(model: PreTrainedModel, task: str) -> bool:
    """Whether Optimum's own table exports this task for this family.

    Raises:
        FlexCompressError: Neither that table nor ours does.
    """
    known = TasksManager.get_supported_tasks_for_model_type(
        model.config.model_type, "onnx", library_name="transformers"
    )
    if task in known and (task.endswith(WITH_PAST) or _takes_the_inputs(model, task)):
        return True
    if task in PLAIN_TASKS:
        return False
    raise FlexCompressError(
        f"A {model.config.model_type} model cannot be exported for {task}: choose one of {', '.join(sorted(known))}."
    )


def _stock_config(model: PreTrainedModel, task: str, processors: list[Any] | None = None) -> OnnxConfig:
    constructor = TasksManager.get_exporter_config_constructor(
        model=model, exporter="onnx", task=task, library_name="transformers"
    )
    return constructor(model.config, preprocessors=processors)


def _takes_the_inputs(model: PreTrainedModel, task: str) -> bool:
    """False for the likes of `T5EncoderModel`: its family's inputs are those of an encoder-decoder, its own are not."""
    return _stock_config(model, task).inputs.keys() <= inspect.signature(model.forward).parameters.keys()


def _single_precision(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy where it is not in single precision on the CPU, which is what gets exported."""
    tensors = {(tensor.dtype, tensor.device.type) for tensor in model.parameters()}
    if tensors <= {(torch.float32, "cpu")}:
        return model
    logger.info("Exporting a copy of the model in single precision on the CPU.")
    return copy.deepcopy(model).cpu().float()


def _compare_with_pytorch(
    model: PreTrainedModel, folder: Path, configs: dict[str, OnnxConfig], task: str, atol: float
) -> None:
    names = sorted(file.stem for file in folder.glob("*.onnx"))
    if not configs:
        configs = {"model": _stock_config(model, task)}
    pairs = {name: (model.get_encoder() if name == "encoder_model" else model, configs[name]) for name in names}
    lengths, shapes, attempts = lengths_of(model), CHECK_SHAPES, 1
    if lengths is not None:
        # Of two tokens that are almost equally significant, either may go: that happens, but not time after time.
        shapes, attempts = {**CHECK_SHAPES, "sequence_length": dropping_length(model.config, lengths)}, 3
    for name, (part, config) in pairs.items():
        for seed in range(attempts):
            try:
                with _quiet(), _drawn_from(seed):
                    largest = _largest_output(part, config, shapes)
                with _quiet(), _drawn_from(seed):
                    validate_models_outputs(
                        {name: (part, config)},
                        [list(config.outputs)],
                        folder,
                        atol=atol * max(1.0, largest),
                        input_shapes=shapes,
                        use_subprocess=False,
                    )
                break
            except ValueError as error:
                failure = error
        else:
            raise FlexCompressError(
                f"The exported model does not compute what the PyTorch model computes ({' '.join(str(failure).split())}): "
                f"report this with the model's config.json, or, if that is near enough, accept more than atol={atol:g} "
                "(--atol of `quantize`)."
            ) from failure


def _largest_output(model: PreTrainedModel, config: OnnxConfig, shapes: dict[str, int]) -> float:
    """The largest number that the PyTorch model computes from the inputs that it is going to be compared on."""
    inputs = config.rename_ambiguous_inputs(config.generate_dummy_inputs(framework="pt", **shapes))
    with config.patch_model_for_export(model, model_kwargs={}), torch.inference_mode():
        outputs = model(**inputs)
    return max((float(tensor.abs().max()) for tensor in _tensors(outputs.values())), default=0.0)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors of floating-point numbers in outputs, of which caches are tuples of tuples."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            # An infinite output must not make room for any other.
            yield value.nan_to_num(posinf=0.0, neginf=0.0)


@contextlib.contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """What Optimum draws in the block depends on the seed alone, and moves no generator of the caller."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Undoes what the exporter does to a model: evaluation mode, and entries of its configurations."""
    training = [module.training for module in model.modules()]
    # Some stacks (T5) have a copy of the configuration, which the exporter changes too.
    names = ("config", "generation_config")
    configs = {id(getattr(m, name)): getattr(m, name) for m in model.modules() for name in names if hasattr(m, name)}
    before = [(config, copy.deepcopy(config.__dict__)) for config in configs.values() if config is not None]
    try:
        yield
    finally:
        for module, mode in zip(model.modules(), training):
            module.training = mode
        for config, values in before:
            config.__dict__.clear()
            config.__dict__.update(values)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracer warnings name lines inside Transformers; what they warn of is checked by running the result."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
