"""What a compression run does: one dataclass per method, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimum.configuration_utils import BaseConfig

from .errors import FlexCompressError, nearest
from .length_config import LengthAdaptiveConfig
from .method_config import METHOD_CONFIGS, MethodConfig, check_number
from .modular_config import ModularConfig
from .output import write_text_atomically
from .version import __version__
from .vib_config import VIBPruningConfig


FORMAT_VERSION = 1
"""Version of the layout of `flexcompress_config.json`; raised when an older reader would misread a newer file."""

LayerPairs = list[list[int]]
STACK_NAMES = ("encoder", "decoder")
LAYER_MAPS = ("uniform", "ordered")


def _read_pairs(value: Any, where: str) -> LayerPairs:
    message = f"{where} is {value!r}: give pairs [student layer, teacher layer] such as [[0, 0], [3, 6]]."
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise FlexCompressError(message)
    pairs = []
    for pair in value:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise FlexCompressError(message)
        if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in pair):
            raise FlexCompressError(f"{where} has the pair {pair!r}: layers are 0 (the embeddings), 1, 2, and so on.")
        pairs.append(list(pair))
    return pairs


@dataclass(kw_only=True)
class DistillationConfig(MethodConfig):
    """The student learns from the teacher's logits and, if asked, hidden states and attention maps.

    Attributes:
        logits_weight: Weight of the logits term. What the term is follows the head: `temperature^2 * KL` for single
            labels, tokens and language models, squared error for regression, cross-entropy with the teacher's
            probabilities for multi-label heads, the mean over start and end for question answering.
        temperature: Softens both distributions of the logits term (it has no part in regression and multi-label).
        hidden_states_weight: Weight of the mean squared error between hidden states of mapped layers, through a
            learned linear projection where teacher and student differ in width.
        attention_weight: Weight of the KL divergence between attention maps of mapped layers. Both models need equal
            head counts there, and compute attention eagerly in training steps.
        layer_map: `"uniform"`, `"ordered"`, pairs `[student layer, teacher layer]`, or pairs by stack
            (`{"encoder": ..., "decoder": ...}`). Layer 0 is the embedding output (it has no attention map), layer `i`
            the output of the i-th layer. Uniform maps the embeddings, and student layer `i` of `m` onto teacher layer
            `i * n / m` of `n`. Ordered is for hidden states while a model is pruned (CoFi, arXiv 2204.00408): in
            every step four evenly spaced teacher layers take the nearest student layers that still exist, in order,
            through one learned projection.
        task_loss_weight: Weight of the model's own loss on the labels.
        projection_learning_rate: Learning rate of the projections; the trainer's when `None`.
    """

    method_type: ClassVar[str] = "distillation"

    logits_weight: float = 1.0
    temperature: float = 2.0
    hidden_states_weight: float = 0.0
    attention_weight: float = 0.0
    layer_map: str | list | dict = "uniform"
    task_loss_weight: float = 1.0
    projection_learning_rate: float | None = None

    def __post_init__(self):
        self._check_weights("logits_weight", "hidden_states_weight", "attention_weight", "task_loss_weight")
        check_number("distillation.temperature", self.temperature, above=0.0)
        if self.projection_learning_rate is not None:
            check_number("distillation.projection_learning_rate", self.projection_learning_rate, above=0.0)
        if not (self.logits_weight or self.hidden_states_weight or self.attention_weight):
            raise FlexCompressError(
                "distillation has no term: set logits_weight, hidden_states_weight or attention_weight above 0."
            )
        if isinstance(self.layer_map, str):
            if self.layer_map not in LAYER_MAPS:
                raise FlexCompressError(
                    f'distillation.layer_map is "{self.layer_map}": give "uniform", "ordered", pairs [student layer, '
                    "teacher layer], or pairs by stack."
                )
            if self.layer_map == "ordered" and (self.attention_weight or not self.hidden_states_weight):
                raise FlexCompressError(
                    'distillation.layer_map="ordered" matches hidden states: set hidden_states_weight above 0, and '
                    "attention_weight=0."
                )
        elif isinstance(self.layer_map, Mapping):
            for name in self.layer_map:
                if name not in STACK_NAMES:
                    raise FlexCompressError(
                        f'distillation.layer_map names the stack "{name}".{nearest(str(name), STACK_NAMES)}'
                    )
            self.layer_map = {
                name: _read_pairs(pairs, f"distillation.layer_map.{name}") for name, pairs in self.layer_map.items()
            }
        else:
            self.layer_map = _read_pairs(self.layer_map, "distillation.layer_map")


RELATIONS = {1: ("attention", "value"), 2: ("query", "key", "value")}
"""The relations of each MiniLM version."""


@dataclass(kw_only=True)
class MiniLMConfig(MethodConfig):
    """MiniLM: the student's last layer mimics the self-attention relations of one teacher layer.

    Attributes:
        version: 1 matches attention maps and value relations per head (arXiv 2002.10957; equal head counts). 2 matches
            query, key and value relations over re-split relation heads (arXiv 2012.15828; any head counts).
        relation_heads: How many relation heads the concatenated heads are re-split into (version 2). `None` takes the
            largest of 64, 48, 32, 24, 16, 12, 8, 4 that divides the query and key widths of both models.
        teacher_layer: The teacher's layer, counted from 1; negative counts from the end. Large teachers do better
            with a layer a few below the last: 21 of BERT-large's 24, 19 of RoBERTa-large's 24.
        relation_weights: Weights by relation: `query`, `key`, `value` (version 2), `attention`, `value` (version 1);
            those left out weigh 1.
        task_loss_weight: Weight of the model's own loss on the labels; 0 for task-agnostic distillation, where the
            student may have no head at all.
    """

    method_type: ClassVar[str] = "minilm"

    version: int = 2
    relation_heads: int | None = None
    teacher_layer: int = -1
    relation_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    task_loss_weight: float = 1.0

    def __post_init__(self):
        self._check_weights("task_loss_weight")
        if self.version not in RELATIONS:
            raise FlexCompressError(f"minilm.version is {self.version!r}: give 1 or 2.")
        if self.relation_heads is not None:
            if self.version == 1:
                raise FlexCompressError(
                    "minilm.relation_heads belongs to version 2: leave it out, or set version=2 (version 1 uses the "
                    "models' own heads)."
                )
            check_number("minilm.relation_heads", self.relation_heads, minimum=1, integer=True)
        check_number("minilm.teacher_layer", self.teacher_layer, integer=True)
        if self.teacher_layer == 0:
            raise FlexCompressError("minilm.teacher_layer is 0: layers count from 1, or from -1 at the end.")
        if not isinstance(self.relation_weights, Mapping):
            raise FlexCompressError(
                f"minilm.relation_weights is {self.relation_weights!r}: give weights by name, such as "
                f'{{"{RELATIONS[self.version][0]}": 1.0}}.'
            )
        known = RELATIONS[self.version]
        for name, weight in self.relation_weights.items():
            if name not in known:
                raise FlexCompressError(
                    f'minilm.relation_weights has "{name}", not a relation of version {self.version}.'
                    f"{nearest(str(name), known)}"
                )
            check_number(f"minilm.relation_weights.{name}", weight, minimum=0.0)
        self.relation_weights = {name: float(self.relation_weights.get(name, 1.0)) for name in known}
        if not any(self.relation_weights.values()):
            raise FlexCompressError("minilm.relation_weights are all 0: give at least one relation a weight above 0.")


class FlexCompressConfig(BaseConfig):
    """The methods of a run, kept in `flexcompress_config.json`.

    Methods can be stacked: their terms are added to one loss, and what they remove is removed at the end. So one run
    distils, prunes, and makes the pruned model work with any number of tokens per layer:

    ```python
    FlexCompressConfig(methods=[VIBPruningConfig(target_sparsity=0.7), LengthAdaptiveConfig(), MiniLMConfig()])
    ```

    The full pass of such a step has the terms of all three; the passes of the shorter sub-models, which learn from the
    full one, run under the same masks. One method of a run at most makes several passes, and a fixed length
    configuration does not go with methods that compare layers token by token.

    Args:
        methods: Method configs, or dicts with a `method_type`; at most one of each type. They act in this order.

    Raises:
        FlexCompressError: A key, method or value is not acceptable.
    """

    CONFIG_NAME = "flexcompress_config.json"
    FULL_CONFIGURATION_FILE = "flexcompress_config.json"

    def __init__(self, methods: Sequence[MethodConfig | Mapping[str, Any]] | None = None, **kwargs):
        format_version = kwargs.pop("format_version", FORMAT_VERSION)
        # What `to_dict` and the hub machinery of the base class add to a file.
        for stamp in ("flexcompress_version", "optimum_version", "transformers_version", "_commit_hash"):
            kwargs.pop(stamp, None)
        for key in kwargs:
            raise FlexCompressError(f'Unknown key "{key}" in {self.CONFIG_NAME}.{nearest(key, ["methods"])}')
        check_number("format_version", format_version, minimum=1, integer=True)
        if format_version > FORMAT_VERSION:
            raise FlexCompressError(
                f"{self.CONFIG_NAME} has format {format_version}, newer than the {FORMAT_VERSION} of this "
                "installation: upgrade optimum-flexcompress."
            )
        # The base class would otherwise carry label maps, token ids and generation settings of a model.
        super().__init__()
        self.format_version = FORMAT_VERSION
        self.methods = self._read_methods(methods)

    @staticmethod
    def _read_methods(methods: Any) -> list[MethodConfig]:
        if methods is None:
            return []
        if isinstance(methods, (str, Mapping, MethodConfig)) or not isinstance(methods, Sequence):
            raise FlexCompressError(f"methods is {methods!r}: give a list of method configs.")
        configs: list[MethodConfig] = []
        for method in methods:
            if isinstance(method, Mapping):
                method = MethodConfig.from_dict(method)
            if not isinstance(method, MethodConfig):
                raise FlexCompressError(
                    f"methods holds {method!r}: give method configs such as DistillationConfig(...) or dicts with a "
                    '"method_type".'
                )
            if any(other.method_type == method.method_type for other in configs):
                raise FlexCompressError(f'methods has "{method.method_type}" twice: give each method once.')
            configs.append(method)
        return configs

    def to_dict(self) -> dict[str, Any]:
        """Everything that the file holds: the methods and the versions that wrote them."""
        stamps = super().to_dict()
        return {
            "format_version": self.format_version,
            "flexcompress_version": __version__,
            "optimum_version": stamps["optimum_version"],
            "transformers_version": stamps["transformers_version"],
            "methods": [method.to_dict() for method in self.methods],
        }

    def to_diff_dict(self) -> dict[str, Any]:
        # Defaults are written out, so that a file keeps its meaning when a default changes.
        return self.to_dict()

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        write_text_atomically(json_file_path, self.to_json_string(use_diff=use_diff))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        if Path(save_directory).is_file():
            raise FlexCompressError(f"{save_directory} is a file: give the name of a folder.")
        super().save_pretrained(str(save_directory), push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            raise FlexCompressError(
                f"{pretrained_model_name_or_path} holds no readable {cls.CONFIG_NAME}: give a folder that a "
                "FlexCompressTrainer saved."
            ) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlexCompressConfig) and self.methods == other.methods


__all__ = [
    "METHOD_CONFIGS",
    "DistillationConfig",
    "FlexCompressConfig",
    "LengthAdaptiveConfig",
    "MethodConfig",
    "MiniLMConfig",
    "ModularConfig",
    "VIBPruningConfig",
    "check_number",
]
