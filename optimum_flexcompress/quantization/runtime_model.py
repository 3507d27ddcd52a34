"""Saved int8 models behind the interface of Transformers models, whichever runtime runs them.

A runtime adds one class, which opens the saved files and maps a batch to outputs, and one line for each head: see
[`RuntimeModel`].
"""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from optimum.modeling_base import OptimizedModel
from optimum.utils.save_utils import maybe_save_preprocessors
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutput,
    ImageClassifierOutput,
    MaskedLMOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from ..architectures import position_limit
from ..errors import FlexCompressError, first_line, nearest
from ..hub import fetch_model, is_hub_id
from .saved import RECORD_NAME, Saved, read_saved


class RuntimeModel(OptimizedModel):
    """An int8 model in a runtime of its own, for inference; works in a Transformers `pipeline`.

    A runtime's base class sets `backend` (and `same_versions`) and implements `_open` and `_run`; its classes for single
    heads add one of the heads below:

    ```python
    class OVQuantizedModelForQuestionAnswering(ForQuestionAnswering, OVQuantizedModel): ...
    ```

    The record of such a model (see [`write_saved`]) has the facts `task`, `inputs` and `outputs`: a name of
    [`TASKS`](optimum_flexcompress.tasks), and the names of tensors in the order in which the runtime takes and gives
    them.

    Args:
        saved: The checked files.
        config: The configuration.
        model: What `_open` returned.
    """

    backend: ClassVar[str]
    # Packages whose major and minor version must be those that made the model.
    same_versions: ClassVar[tuple[str, ...]] = ()
    task: ClassVar[str]
    output_class: ClassVar[type[ModelOutput]]
    auto_model_class: ClassVar[type]
    # By backend and task.
    _classes: ClassVar[dict[tuple[str, str], type[RuntimeModel]]] = {}

    dtype = torch.float32

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "backend") and hasattr(cls, "task"):
            cls._classes[cls.backend, cls.task] = cls
            # Pipelines look their models up among those that are registered, under a configuration class of their own.
            cls.config_class = type(f"{cls.__name__}Config", (PretrainedConfig,), {"model_type": cls.__name__})
            cls.auto_model_class.register(cls.config_class, cls)

    def __init__(self, saved: Saved, config: PretrainedConfig, model: Any):
        super().__init__(model, config)
        self.saved = saved
        self.input_names, self.output_names = (_names(saved, fact) for fact in ("inputs", "outputs"))
        self.main_input_name = self.input_names[0]

    @classmethod
    def class_for(cls, task: str) -> type[RuntimeModel]:
        """The class of this runtime for a task.

        Raises:
            FlexCompressError: It has none.
        """
        known = {name: found for (backend, name), found in cls._classes.items() if backend == cls.backend}
        if task not in known:
            raise FlexCompressError(f"The backend {cls.backend} runs no {task} models.{nearest(task, known)}")
        return known[task]

    @classmethod
    @abstractmethod
    def _open(cls, saved: Saved, config: PretrainedConfig, **options: Any) -> Any:
        """Opens the files; what it returns becomes `self.model`.

        Args:
            saved: The checked files.
            config: The configuration.
            **options: What the user gave to `from_pretrained` beside the arguments that all runtimes share.
        """

    @abstractmethod
    def _run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Runs the model.

        Args:
            inputs: The tensors of `self.input_names`, in that order, contiguous.

        Returns:
            The tensors of `self.output_names`.
        """

    @classmethod
    def from_pretrained(
        cls, model_id: str | os.PathLike, config: PretrainedConfig | str | os.PathLike | None = None, **kwargs: Any
    ) -> RuntimeModel:
        """Opens a folder, or a model on the Hub, that `quantize` wrote; see [`OptimizedModel.from_pretrained`].

        Args:
            model_id: The folder or the id.
            config: The configuration; that of the folder when `None`.
            **kwargs: See `_from_pretrained`.

        Raises:
            FlexCompressError: There is no such model, or it cannot be opened; see `_from_pretrained`.
        """
        special = ("cache_dir", "force_download", "local_files_only", "subfolder")
        if not is_hub_id(model_id) or not any(kwargs.get(name) for name in special):
            model_id = fetch_model(model_id, kwargs.get("revision"), kwargs.get("token"))
            if not model_id.is_dir():
                raise FlexCompressError(f"There is no folder {model_id}: check the path of the model.")
            if config is None:
                config = _read_config(model_id / kwargs.get("subfolder", ""))
        return super().from_pretrained(model_id, config=config, **kwargs)

    @classmethod
    def _from_pretrained(
        cls,
        model_id: str | os.PathLike,
        config: PretrainedConfig,
        subfolder: str = "",
        revision: str = "main",
        force_download: bool = False,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        token: bool | str | None = None,
        expected_sha256: str | None = None,
        **options: Any,
    ) -> RuntimeModel:
        """Opens a folder, or a model on the Hub, that `quantize` wrote; see [`OptimizedModel.from_pretrained`].

        Args:
            model_id: The folder or the id.
            config: The configuration.
            subfolder: A folder below.
            revision: A branch, tag or commit on the Hub.
            force_download: Whether to fetch files again.
            local_files_only: Whether to stay away from the network.
            trust_remote_code: Without effect: there is none.
            cache_dir: Where downloads are kept.
            token: For the Hub.
            expected_sha256: Pins the model: see [`read_saved`].
            **options: For the runtime, such as `threads`.

        Raises:
            FlexCompressError: The folder was not written by `quantize` for this runtime and task, is damaged or not the
                one that is expected, or was made by other versions.
        """
        folder = Path(model_id)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(
                snapshot_download(
                    str(model_id),
                    revision=revision,
                    allow_patterns=[f"{subfolder}/*"] if subfolder else None,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        saved = read_saved(folder / subfolder, cls.backend, expected_sha256, cls.same_versions)
        target = cls.class_for(saved.facts.get("task", "unknown")) if not hasattr(cls, "task") else cls
        if target.task != saved.facts.get("task"):
            fitting = cls.class_for(saved.facts.get("task", "unknown"))
            raise FlexCompressError(
                f"{saved.folder} is a model for {fitting.task}, not for {cls.task}: open it with {fitting.__name__}."
            )
        return target(saved, config, target._open(saved, config, **options))

    @classmethod
    def _export(cls, model_id: str | os.PathLike, config: PretrainedConfig, **kwargs: Any) -> RuntimeModel:
        raise FlexCompressError(
            f"{cls.__name__} opens int8 models that exist: make one with `optimum-cli flexcompress quantize -m {model_id} "
            f"--backend {cls.backend}` and open that, without export=True."
        )

    def _save_pretrained(self, save_directory: str | os.PathLike) -> None:
        target = Path(save_directory)
        if target.resolve() == self.saved.folder.resolve():
            return
        for name in (*self.saved.files, RECORD_NAME):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.saved.folder / name, target / name)
        maybe_save_preprocessors(self.saved.folder, target)

    @property
    def device(self) -> torch.device:
        """Where tensors are taken from and given: the CPU."""
        return torch.device("cpu")

    def to(self, device: torch.device | str | int | None = None, *args: Any, **kwargs: Any) -> RuntimeModel:
        """Does nothing, for the CPU.

        Raises:
            FlexCompressError: Another device is asked for.
        """
        if device is not None and not isinstance(device, torch.dtype) and torch.device(device).type != "cpu":
            raise FlexCompressError(f"{type(self).__name__} runs on the CPU: it cannot be moved to {device}.")
        return self

    def eval(self) -> RuntimeModel:
        """Does nothing: there is no other mode."""
        return self

    def can_generate(self) -> bool:
        """No."""
        return False

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[torch.Tensor, ...]:
        """Runs the model; it takes what it was exported with, and ignores the rest.

        Args:
            input_ids: `[batch, length]`.
            attention_mask: `[batch, length]`; by default, all ones.
            token_type_ids: `[batch, length]`; by default, all zeros.
            position_ids: `[batch, length]`.
            pixel_values: `[batch, channels, height, width]`.
            return_dict: Whether to return an output class of Transformers (the default) and not a tuple.

        Raises:
            FlexCompressError: What the model reads is missing, too long, or not in its vocabulary.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "pixel_values": pixel_values,
        }
        inputs = {}
        for name in self.input_names:
            tensor = given.get(name)
            if tensor is None:
                tensor = _default_input(name, input_ids)
            inputs[name] = torch.as_tensor(tensor).contiguous()
        if "input_ids" in inputs:
            self._check_ids(inputs["input_ids"])
        outputs = dict(zip(self.output_names, self._run(inputs), strict=True))
        return tuple(outputs.values()) if return_dict is False else self.output_class(**outputs)

    def _check_ids(self, ids: torch.Tensor) -> None:
        """Runtimes look up what their tables do not hold without a word, or answer with nothing."""
        limit, size = position_limit(self.config), getattr(self.config, "vocab_size", None)
        if limit is not None and ids.shape[-1] > limit:
            raise FlexCompressError(
                f"The model takes at most {limit} tokens, not {ids.shape[-1]}: truncate the input (truncation=True, "
                f"max_length={limit})."
            )
        if size is not None and ids.numel():
            lowest, highest = (int(value) for value in ids.aminmax())
            if lowest < 0 or highest >= size:
                raise FlexCompressError(
                    f"The input has the token id {highest if highest >= size else lowest}, and the vocabulary of the "
                    f"model goes from 0 to {size - 1}: use the tokenizer that was saved with the model."
                )


def only_file(saved: Saved, ending: str) -> Path:
    """The one file of a saved model whose name ends so.

    Raises:
        FlexCompressError: There is none, or there are several.
    """
    found = [path for name, path in saved.files.items() if name.endswith(ending)]
    if len(found) != 1:
        raise FlexCompressError(
            f"{saved.folder / RECORD_NAME} names {len(found) or 'no'} {ending} files where there must be one: quantize the "
            "original model again."
        )
    return found[0]


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    try:
        # Transformers does not say what is wrong with it.
        json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.from_pretrained(folder)
    except FileNotFoundError:
        raise FlexCompressError(f"{folder} has no config.json: copy the whole folder again.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlexCompressError(
            f"{path} cannot be read ({first_line(error).rstrip('.')}): copy the whole folder again, or quantize the original again."
        ) from error


def _default_input(name: str, ids: torch.Tensor | None) -> torch.Tensor:
    if ids is None or name not in ("attention_mask", "token_type_ids"):
        raise FlexCompressError(f"The model reads {name}, which is missing: pass it.")
    return torch.full(tuple(ids.shape), int(name == "attention_mask"))


def _names(saved: Saved, fact: str) -> tuple[str, ...]:
    names = saved.facts.get(fact)
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise FlexCompressError(
            f"{saved.folder / RECORD_NAME} does not name the {fact} of the model: quantize the original model again."
        )
    return tuple(names)


class ForFeatureExtraction:
    """Hidden states."""

    task = "feature-extraction"
    auto_model_class = transformers.AutoModel
    output_class = BaseModelOutput


class ForSequenceClassification:
    """Classes of sentences."""

    task = "text-classification"
    auto_model_class = transformers.AutoModelForSequenceClassification
    output_class = SequenceClassifierOutput


class ForTokenClassification:
    """Classes of tokens."""

    task = "token-classification"
    auto_model_class = transformers.AutoModelForTokenClassification
    output_class = TokenClassifierOutput


class ForQuestionAnswering:
    """Where the answer starts and ends."""

    task = "question-answering"
    auto_model_class = transformers.AutoModelForQuestionAnswering
    output_class = QuestionAnsweringModelOutput


class ForMaskedLM:
    """Words for masks."""

    task = "fill-mask"
    auto_model_class = transformers.AutoModelForMaskedLM
    output_class = MaskedLMOutput


class ForImageClassification:
    """Classes of images."""

    task = "image-classification"
    auto_model_class = transformers.AutoModelForImageClassification
    output_class = ImageClassifierOutput
