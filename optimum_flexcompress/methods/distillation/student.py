"""Students made from their teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from ...architectures import describe
from ...errors import FlexCompressError
from ...structure import ModelStructure
from ...surgery import keep_layers, resize


Layers = int | Sequence[int]


def evenly_spread(count: int, total: int) -> list[int]:
    """`count` of `total` layers, first and last included, as evenly as whole numbers allow; one layer is the first."""
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def make_student(
    teacher: PreTrainedModel,
    layers: Layers | Mapping[str, Layers] | None = None,
    structure: ModelStructure | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A smaller model with weights of the teacher, head included.

    Args:
        teacher: The teacher; it is not changed.
        layers: How many layers to keep, evenly spread, or the indices of those to keep. For an encoder-decoder model
            either of them by stack, as in `{"encoder": 6, "decoder": [0, 5]}`; a stack that is not named stays whole,
            and one number holds for both.
        structure: Sizes to shrink to; leading heads and dims of the kept layers stay. With `layers` too, it describes
            what becomes of the kept layers.

    Returns:
        A new model of the teacher's class, in its dtype and on its device. Layers alone give a model that needs no
        plugin to load.

    Raises:
        FlexCompressError: Neither argument is given, there are not that many layers, or the structure does not fit
            into the teacher.
    """
    if layers is None and structure is None:
        raise FlexCompressError("Say what the student keeps: layers=3, layers=[0, 2, 5], or structure=....")
    if structure is not None and not isinstance(structure, ModelStructure):
        structure = ModelStructure.from_dict(structure)
    chosen = _choose(teacher, layers) if layers is not None else None
    student = copy.deepcopy(teacher)
    if chosen is not None:
        keep_layers(student, chosen)
    if structure is not None:
        resize(student, structure)
    return student


def _choose(teacher: PreTrainedModel, layers: Layers | Mapping[str, Layers]) -> dict[str, list[int]]:
    counts = {name: len(stack.layers) for name, stack in describe(teacher).stacks.items()}
    if isinstance(layers, Mapping):
        for name in layers:
            if name not in counts:
                raise FlexCompressError(
                    f'layers names the stack "{name}", which {type(teacher).__name__} does not have: use '
                    f"{' and '.join(counts)}."
                )
    elif isinstance(layers, int) and not isinstance(layers, bool):
        layers = dict.fromkeys(counts, layers)
    elif len(counts) == 1:
        layers = dict.fromkeys(counts, layers)
    else:
        raise FlexCompressError(
            f"{type(teacher).__name__} has {' and '.join(counts)}: say which layers stay in each, as in "
            'layers={"encoder": [0, 2], "decoder": [0]}.'
        )
    chosen = {}
    for name, wanted in layers.items():
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            if not 1 <= wanted <= counts[name]:
                raise FlexCompressError(
                    f"The {name} of the teacher has {counts[name]} layers: keep between 1 and {counts[name]}, not "
                    f"{wanted}."
                )
            wanted = evenly_spread(wanted, counts[name])
        chosen[name] = list(wanted)
    return chosen
