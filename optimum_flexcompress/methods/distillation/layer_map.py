"""Which layers of the teacher a student's layers learn from."""

from __future__ import annotations

from ...configuration import LayerPairs
from ...errors import FlexCompressError


def uniform_pairs(student_layers: int, teacher_layers: int) -> LayerPairs:
    """The embeddings onto the embeddings, and student layer `i` of `m` onto teacher layer `i * n / m` of `n`."""
    return [[i, round(i * teacher_layers / student_layers)] for i in range(student_layers + 1)]


def layer_pairs(
    layer_map: str | list | dict, student_layers: dict[str, int], teacher_layers: dict[str, int]
) -> dict[str, LayerPairs]:
    """Resolves the `layer_map` of a [`DistillationConfig`].

    Args:
        layer_map: `"uniform"`, pairs, or pairs by stack.
        student_layers: Number of layers by stack.
        teacher_layers: The same of the teacher.

    Returns:
        Pairs of student and teacher layer by stack; 0 is the embedding output.

    Raises:
        FlexCompressError: The models have different stacks, or a layer does not exist.
    """
    if student_layers.keys() != teacher_layers.keys():
        raise FlexCompressError(
            f"The student has the stacks {', '.join(student_layers)}, the teacher {', '.join(teacher_layers)}: layers "
            "can only be mapped between models of the same kind."
        )
    if layer_map == "uniform":
        return {name: uniform_pairs(count, teacher_layers[name]) for name, count in student_layers.items()}
    if isinstance(layer_map, list):
        if len(student_layers) > 1:
            raise FlexCompressError(
                f"layer_map is one list, but the models have {' and '.join(student_layers)}: give pairs by stack, "
                'such as {"encoder": [[3, 6]], "decoder": [[3, 6]]}.'
            )
        layer_map = dict.fromkeys(student_layers, layer_map)
    for name, pairs in layer_map.items():
        if name not in student_layers:
            raise FlexCompressError(
                f'layer_map names the stack "{name}", which the models do not have: use {", ".join(student_layers)}.'
            )
        for pair in pairs:
            for who, index, count in zip(
                ("student", "teacher"), pair, (student_layers[name], teacher_layers[name]), strict=True
            ):
                if index > count:
                    raise FlexCompressError(
                        f"layer_map has {who} layer {index} of the {name}, which has {count} layers: give 0 (the "
                        f"embeddings) to {count}."
                    )
    return dict(layer_map)
