"""A model together with its modules: what modular training makes, and what assembled models are made from."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum.utils.save_utils import maybe_save_preprocessors
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ...configuration import FlexCompressConfig
from ...errors import FlexCompressError
from ...hub import fetch_model, is_hub_id
from ...model_card import write_model_card
from ...modular_config import ModularConfig
from ...output import atomic_folder, check_output_folder
from ...surgery import adopt_layers
from ...tasks.base import load_pretrained
from ..runner import STATE_NAME, read_state
from .assembly import Assembly
from .modules import (
    describe_whole,
    generates_with_deeper_decoder,
    make_modules,
    module_name,
    template_of,
    usable_granularities,
)
from .routing import Router, put_layers
from .strategies import choose, smallest


logger = logging.getLogger(__name__)

MODULES_NAME = "modules.safetensors"
"""File with the modules in the folder of a modular checkpoint. A parameter is named `<stack>_<granularity>_<block>.`
and then as in a layer of the model; blocks count from 0."""

PLAN_NAME = "assembly.json"
"""File with the plan in the folder of an assembled model."""


class ModularModel:
    """A model and the modules that can stand for its layers.

    A modular checkpoint is the ordinary Transformers folder of the full model, which loads as such, with the modules
    in `modules.safetensors` and the [`ModularConfig`] in `flexcompress_config.json`.

    Args:
        model: The full model.
        config: The config.

    Attributes:
        model: The full model.
        config: The config.
        depths: Layers of each stack.
        granularities: Granularities of the modules in each stack.
        modules: The modules, named by [`module_name`].

    Raises:
        FlexCompressError: Modules cannot stand for layers of this model; see [`describe_whole`] and
            [`usable_granularities`].
    """

    def __init__(self, model: PreTrainedModel, config: ModularConfig):
        self.model = model
        self.config = config
        self.view = describe_whole(model)
        self.depths = {name: len(stack.layers) for name, stack in self.view.stacks.items()}
        self.granularities = usable_granularities(self.view, config)
        self.modules = make_modules(self.view, config)

    # Assemblies

    def choose(self, strategy: str, ratio: float) -> Assembly:
        """An assembly by rule.

        Args:
            strategy: `size-first` or `speed-first`; see [`choose`].
            ratio: Layers of the full model over those of the assembly, all stacks together.

        Raises:
            FlexCompressError: The ratio is out of reach, or the strategy does not suit the model.
        """
        return choose(
            strategy,
            ratio,
            self.depths,
            self.granularities,
            deeper_decoder=self.generates_with_deeper_decoder,
        )

    def smallest(self) -> Assembly:
        """The assembly of the fewest layers."""
        return smallest(self.depths, self.granularities, deeper_decoder=self.generates_with_deeper_decoder)

    def wanted(self) -> list[Assembly]:
        """The assemblies of [`ModularConfig`]'s `ratios`, which the last steps of the training ran alone.

        Raises:
            FlexCompressError: A ratio is out of reach, or its strategy does not suit the model.
        """
        found = [self.choose(self.config.ratios_strategy, ratio) for ratio in self.config.ratios or ()]
        # Two ratios may be nearest to the same numbers of layers.
        return list({tuple(assembly.stacks.items()): assembly for assembly in found}.values())

    @property
    def trained_for(self) -> str | None:
        """What [`ModularConfig`]'s `ratios` made of the modules, in words; `None` where any assembly was trained alike."""
        if not self.config.ratios:
            return None
        ratios = ", ".join(f"{ratio:g}" for ratio in self.config.ratios)
        return f"trained above all for {self.config.ratios_strategy} assemblies of the ratios {ratios}"

    @property
    def generates_with_deeper_decoder(self) -> bool:
        """Whether Transformers could generate with a decoder that is deeper than the encoder."""
        return generates_with_deeper_decoder(self.view)

    def checked(self, assembly: Assembly) -> Assembly:
        """The assembly with every stack of the model in it, once it is known to give a model that works.

        Raises:
            FlexCompressError: It does not fit (a gap, an overlap, a module that was not trained), or Transformers
                could not generate with it.
        """
        assembly = assembly.checked(self.depths, self.granularities)
        counts = {name: len(pieces) for name, pieces in assembly.stacks.items()}
        deeper = len(counts) > 1 and counts["decoder"] > counts["encoder"]
        if deeper and not self.generates_with_deeper_decoder:
            raise FlexCompressError(
                f"The assembly has {counts['decoder']} decoder layers over {counts['encoder']} encoder layers: "
                f"Transformers cannot generate with a {self.view.family} model whose decoder is the deeper one; take "
                "more from the decoder than from the encoder."
            )
        return assembly

    def layers(self, assembly: Assembly) -> dict[str, list[nn.Module]]:
        """The layers and modules of an assembly, by stack.

        Raises:
            FlexCompressError: The assembly does not fit.
        """
        assembly = assembly.checked(self.depths, self.granularities)
        return {
            name: [
                self.modules[module_name(name, piece)]
                if piece.is_module
                else self.view.stacks[name].layers[piece.block].module
                for piece in pieces
            ]
            for name, pieces in assembly.stacks.items()
        }

    @contextlib.contextmanager
    def routed(self, assembly: Assembly) -> Iterator[PreTrainedModel]:
        """The full model runs as an assembly while the block lasts: what a search needs to score many of them.

        Args:
            assembly: What to run.

        Yields:
            The full model.

        Raises:
            FlexCompressError: The assembly does not fit.
        """
        router = Router(self.view)
        router.route = self.layers(assembly)
        router.attach()
        try:
            yield self.model
        finally:
            router.detach()

    def assemble(self, assembly: Assembly) -> PreTrainedModel:
        """A model of its own, of fewer layers, that needs neither this package nor the full model.

        Args:
            assembly: What to make it from.

        Returns:
            A stock model of the class of the full one, with weights of its own.

        Raises:
            FlexCompressError: The assembly does not fit.
        """
        assembly = self.checked(assembly)
        layers = self.layers(assembly)
        try:
            for name, stack in self.view.stacks.items():
                put_layers(stack, layers[name])
            # Copies only what the assembly is made of.
            small = copy.deepcopy(self.model)
        finally:
            for stack in self.view.stacks.values():
                put_layers(stack, [layer.module for layer in stack.layers])
        sources = {
            name: [template_of(piece, self.config) for piece in pieces] for name, pieces in assembly.stacks.items()
        }
        return adopt_layers(small, sources).requires_grad_(True)

    def save_assembled(
        self,
        assembly: Assembly,
        folder: str | os.PathLike,
        *,
        source: str | os.PathLike | None = None,
        name: str | None = None,
        overwrite: bool = False,
    ) -> Assembly:
        """Writes an assembled model: a stock folder, a card that says what it was made from, and its plan.

        Args:
            assembly: What to make it from.
            folder: The folder to write, complete or not at all.
            source: The modular checkpoint, a folder or an id on the Hub, for its name, its card and its tokenizer or
                image processor.
            name: What the model is called; the name of the folder when `None`.
            overwrite: Whether the folder may be replaced.

        Returns:
            The assembly, with every stack in it; the folder holds it as `assembly.json`.

        Raises:
            FlexCompressError: The assembly does not fit, or the folder cannot be written.
        """
        check_output_folder(folder, overwrite=overwrite, source=source)
        assembly = self.checked(assembly)
        warning = self._other_ratios(assembly)
        if warning:
            logger.warning(warning)
        small = self.assemble(assembly)
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            small.save_pretrained(temporary)
            assembly.to_json_file(temporary / PLAN_NAME)
            if source is not None:
                maybe_save_preprocessors(source, temporary)
            write_model_card(
                temporary,
                small,
                methods=[self.config.method_type],
                base_model=source if source is not None else self.model.config._name_or_path,
                lines=_card_lines(assembly, _name_of(source), warning),
                name=name or Path(folder).name,
            )
        return assembly

    def _other_ratios(self, assembly: Assembly) -> str | None:
        """What to say of an assembly that the last steps of the training left out."""
        if not self.trained_for or assembly.ratio == 1 or assembly in self.wanted():
            return None
        return (
            f"These modules were {self.trained_for}; this one, of the ratio {assembly.ratio:.3g}, is another and may be "
            "much worse: measure it, or train modules with its ratio in modular.ratios."
        )

    # Files

    def save_modules(self, folder: str | os.PathLike) -> None:
        """Writes the modules into a folder, beside the model."""
        state = {name: value.contiguous() for name, value in self.modules.state_dict().items()}
        # By way of a temporary sibling: a file cut short would take the place of a good one.
        temporary = Path(folder) / f".{MODULES_NAME}.tmp"
        save_file(state, temporary, metadata={"format": "pt"})
        os.replace(temporary, Path(folder) / MODULES_NAME)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes a modular checkpoint."""
        self.model.save_pretrained(folder)
        self.save_modules(folder)
        FlexCompressConfig(methods=[self.config]).save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, model_class: type[PreTrainedModel] | None = None, **kwargs: Any
    ) -> ModularModel:
        """Loads a modular checkpoint: what [`FlexCompressTrainer.save_model`] wrote, or a checkpoint of the trainer.

        Args:
            folder: The folder, or an id on the Hub.
            model_class: The class of the model; read from its `config.json` when `None`.
            **kwargs: For its `from_pretrained`, such as `dtype`.

        Raises:
            FlexCompressError: It is no modular checkpoint, or its modules do not fit its model.
        """
        folder = fetch_model(folder)
        if not folder.is_dir():
            raise FlexCompressError(f"There is no folder {folder}: check the path of the modular checkpoint.")
        if not any((folder / name).is_file() for name in (MODULES_NAME, STATE_NAME)):
            raise FlexCompressError(
                f"{folder} is no modular checkpoint: train one with ModularConfig, or with compress --recipe modular."
            )
        config = _config_of(folder)
        state = _read_modules(folder)
        model = load_pretrained(model_class or _class_of(folder), folder, **kwargs)
        modular = cls(model, config)
        modular._load_modules(state, folder)
        modular.model.eval()
        modular.modules.eval()
        return modular

    def _load_modules(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        own = self.modules.state_dict()
        names = {name.partition(".")[0] for name in own}
        found = {name.partition(".")[0] for name in state}
        if names != found:
            difference = ", ".join(sorted(names - found)) or "none"
            raise FlexCompressError(
                f"The modules in {folder} are not those of its {FlexCompressConfig.CONFIG_NAME} (missing: "
                f"{difference}; beyond it: {', '.join(sorted(found - names)) or 'none'}): copy the folder again."
            )
        if any(state.keys() != own.keys() or state[name].shape != value.shape for name, value in own.items()):
            raise FlexCompressError(
                f"The modules in {folder} have other sizes than the layers of the model beside them: copy the folder "
                "again."
            )
        self.modules.load_state_dict(state)


def is_modular(folder: str | os.PathLike) -> bool:
    """Whether a folder, or what an id on the Hub names, is a modular checkpoint."""
    folder = fetch_model(folder)
    if (folder / MODULES_NAME).is_file():
        return True
    # A checkpoint of the trainer, of this method or another.
    state, config = folder / STATE_NAME, folder / FlexCompressConfig.CONFIG_NAME
    if not state.is_file() or not config.is_file():
        return False
    return any(isinstance(method, ModularConfig) for method in FlexCompressConfig.from_pretrained(folder).methods)


def _name_of(source: str | os.PathLike | None) -> str | None:
    if source is None:
        return None
    return str(source) if is_hub_id(source) else Path(source).name


def _card_lines(assembly: Assembly, source: str | None, warning: str | None) -> list[str]:
    full = sum(piece.granularity for pieces in assembly.stacks.values() for piece in pieces)
    return [
        "## Made from",
        "",
        f"Assembled from the modular checkpoint{f' `{source}`' if source else ''}: {assembly.layers} layers in the place "
        f"of {full}, a ratio of {assembly.ratio:.3g}. Numbers are original layers; brackets hold those that one trained "
        f"module stands for. `{PLAN_NAME}` is the same for machines.",
        "",
        "```",
        *assembly.summary().splitlines(),
        "```",
        *(["", warning] if warning else []),
    ]


def _config_of(folder: Path) -> ModularConfig:
    config = next(
        (m for m in FlexCompressConfig.from_pretrained(folder).methods if isinstance(m, ModularConfig)), None
    )
    if config is None:
        raise FlexCompressError(
            f"{folder} was not trained with ModularConfig, so there are no modules to assemble: train it with "
            "FlexCompressTrainer and FlexCompressConfig(methods=[ModularConfig()])."
        )
    return config


def _class_of(folder: Path) -> type[PreTrainedModel]:
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise FlexCompressError(f"{folder} is no model folder: its config.json cannot be read ({error}).") from None
    found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if found is None:
        raise FlexCompressError(
            f"config.json in {folder} names no model class of Transformers (architectures: {names}): write one "
            "there, or pass model_class in Python."
        )
    return found


def _read_modules(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / MODULES_NAME
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise FlexCompressError(f"{path} is damaged ({error}): copy the folder again.") from error
    state = read_state(folder / STATE_NAME)
    return dict(state[ModularConfig.method_type]["modules"])
