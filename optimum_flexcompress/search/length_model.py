"""The model whose lengths are searched."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..architectures import StackView, describe
from ..config_sizes import LENGTHS_KEY
from ..configuration import FlexCompressConfig
from ..errors import FlexCompressError
from ..evaluation.artifact import find_backend, model_artifact
from ..evaluation.cost import count_macs
from ..evaluation.inputs import example_batch
from ..evaluation.workloads import forward_inputs
from ..hub import fetch_model, is_hub_id
from ..length_config import LengthAdaptiveConfig
from ..model_card import write_model_card
from ..output import atomic_folder
from ..tasks import CLASS_ENDINGS, get_task, infer_task
from ..tasks.base import Task, effective_length
from ..token_dropping import LengthConfig, dropping_stack, set_lengths, using_lengths
from .length_macs import LengthMacs


@dataclass
class SearchedModel:
    """A model with an encoder that can drop tokens.

    Attributes:
        model: The model.
        task: What it is for.
        name: What to call it.
        processor: Its tokenizer or image processor.
        training: How it was trained to drop tokens; the defaults where that is not known.
        trained: Whether it was trained for it at all.
        folder: Where it is, if not in memory; for an id on the Hub, in the cache.
        source: The folder or the id, as it was given.
    """

    model: PreTrainedModel
    task: Task
    name: str
    processor: Any
    training: LengthAdaptiveConfig
    trained: bool
    folder: Path | None = None
    source: str | os.PathLike | None = None

    @property
    def _stack(self) -> StackView:
        return dropping_stack(describe(self.model))

    @property
    def able(self) -> list[bool]:
        """For each layer of the encoder whether it can drop tokens."""
        return [layer.attention is not None for layer in self._stack.layers]

    def longest_input(self, asked: int | None) -> int:
        """The longest input in tokens: what was asked, else that of training, else the task's usual one."""
        length = asked if asked is not None else self.training.max_length or self.task.default_max_length
        # Images have one size, and their processors no limit.
        return length if self.task.name == "image-classification" else effective_length(length, self.processor)

    @contextlib.contextmanager
    def at_full_lengths(self) -> Iterator[None]:
        """The model in evaluation mode, keeping all tokens, while the block lasts."""
        training = self.model.training
        self.model.eval()
        try:
            with using_lengths(self.model, None):
                yield
        finally:
            self.model.train(training)

    def macs(self, max_length: int, new_tokens: int) -> LengthMacs:
        """What lengths cost, for an input of `max_length` tokens, or for an image."""
        model = self.model
        batch = example_batch(model.config, self.task, 1, max_length)
        batch = forward_inputs(model_artifact(model, self.task), batch, new_tokens)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        lengths = []

        def look(module: Any, args: tuple, kwargs: dict) -> None:
            lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

        # An image has as many tokens as the encoder says.
        handle = self._stack.layers[0].module.register_forward_pre_hook(look, with_kwargs=True)
        try:
            full = count_macs(model, batch)
        finally:
            handle.remove()
        return LengthMacs(describe(model), lengths[0], full)

    def save(self, lengths: LengthConfig, folder: str | os.PathLike, metrics: Mapping[str, float]) -> None:
        """Writes the model with lengths set, ready to load.

        Args:
            lengths: The lengths.
            folder: A new folder.
            metrics: What they scored on the held-out examples, for the card.
        """
        model = set_lengths(twin_of(self.model), lengths)
        with atomic_folder(folder) as target:
            model.save_pretrained(target)
            self.processor.save_pretrained(target)
            config = None if self.folder is None else self.folder / FlexCompressConfig.CONFIG_NAME
            if config is not None and config.is_file():
                shutil.copy(config, target)
            write_model_card(
                target,
                model,
                methods=[LengthAdaptiveConfig.method_type],
                base_model=self.source,
                name=Path(folder).name,
                metrics={f"{name}, on the examples of the search": value for name, value in metrics.items()},
            )


def open_model(model: PreTrainedModel | str | os.PathLike, task: str | Task | None, processor: Any) -> SearchedModel:
    """Opens a model.

    Args:
        model: In memory, or its folder or Hub id.
        task: What it is for; by default what its class says.
        processor: Its tokenizer or image processor; by default the one in its folder.

    Raises:
        FlexCompressError: There is none, its kind is not known, or it cannot drop tokens.
    """
    if isinstance(model, PreTrainedModel):
        found = _in_memory(model, task, processor)
    else:
        found = _in_folder(model, task, processor)
    dropping_stack(describe(found.model))
    return found


def _in_memory(model: PreTrainedModel, task: str | Task | None, processor: Any) -> SearchedModel:
    name = type(model).__name__
    if task is None:
        task = next((value for ending, value in CLASS_ENDINGS.items() if name.endswith(ending)), None)
    for argument, value in (("task", task), ("processor", processor)):
        if value is None:
            raise FlexCompressError(f"A search on a {name} in memory needs {argument}=....")
    trained = hasattr(model.config, LENGTHS_KEY)
    return SearchedModel(model, get_task(task), name, processor, LengthAdaptiveConfig(), trained)


def _in_folder(source: str | os.PathLike, task: str | Task | None, processor: Any) -> SearchedModel:
    folder = fetch_model(source)
    if folder.is_dir() and find_backend(folder) != "pytorch":
        raise FlexCompressError(f"{folder} is an ONNX model, whose lengths are fixed: search on the PyTorch model.")
    task = get_task(task if task is not None else infer_task(folder))
    model = set_lengths(task.load_model(folder), None)
    training = None
    if (folder / FlexCompressConfig.CONFIG_NAME).is_file():
        methods = FlexCompressConfig.from_pretrained(folder).methods
        training = next((method for method in methods if isinstance(method, LengthAdaptiveConfig)), None)
    return SearchedModel(
        model,
        task,
        str(source) if is_hub_id(source) else folder.name,
        processor if processor is not None else task.load_processor(folder),
        training or LengthAdaptiveConfig(),
        # One fixed configuration (PoWER-BERT) says nothing about others.
        training is not None and training.lengths is None,
        folder if folder.is_dir() else None,
        source,
    )


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
