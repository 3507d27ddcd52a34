"""In which order methods stack, and which combinations are refused before anything runs.

A recipe may stack depth (`modular` and `assemble`, or `distill` into fewer layers, MiniLM among its losses), width
(`prune`), tokens (`length-adaptive`) and bits (`quantize`), best in this order:

| | comes | because |
|---|---|---|
| depth | first | modules and kept layers need layers of one size, and everything after it trains a model that costs half |
| width | after depth | heads and FFN dims are chosen for the layers that stay |
| tokens | after width | lengths are searched for the model that serves; another training afterwards would undo it |
| bits | last | int8 weights are not trained |

What is refused, and why:

| combination | why |
|---|---|
| a training of a length-adaptive model without `length_adaptive` among its methods | it would forget how to do with fewer tokens |
| `modular` after `prune`, unless it prunes with `uniform: true` | a module stands for layers of one size |
| MiniLM after `prune` | it compares queries, keys and values of the last layer, of which pruning may leave any number |
| any training after `export` or `quantize` | there is no PyTorch model left to train |
| MiniLM, or matching of hidden states, in one training with a fixed length configuration | they compare token by token |
| modular and another method than distillation of logits in one training | each step runs other layers |

The first four are looked at by stage, here and in the stages; the others by the methods themselves, also in a script.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import FlexCompressError
from .stages import FineTune, LengthAdaptive, Modular, Prune, StageSpec
from .stages.lengths import METHOD as LENGTH_ADAPTIVE
from .stages.training import TrainingStage


MINILM = "minilm"


def ancestors(spec: StageSpec, stages: Mapping[str, StageSpec]) -> list[StageSpec]:
    """The stages that the model of a stage has gone through, the nearest first."""
    found = []
    name = spec.stage.source()
    while name in stages:
        found.append(stages[name])
        name = stages[name].stage.source()
    return found


def check_stacking(spec: StageSpec, stages: Mapping[str, StageSpec]) -> None:
    """Looks whether a stage may come after those that its model has gone through.

    Args:
        spec: The stage.
        stages: All stages of the recipe, by name.

    Raises:
        FlexCompressError: It is one of the combinations above.
    """
    if not isinstance(spec.stage, TrainingStage) or (
        isinstance(spec.stage, FineTune) and spec.stage.settings.skip_if_trained
    ):
        return
    methods = getattr(spec.stage.settings, "methods", {})
    for before in ancestors(spec, stages):
        if isinstance(before.stage, LengthAdaptive) and LENGTH_ADAPTIVE not in methods:
            raise FlexCompressError(
                f"stages.{spec.name} trains what {before.name} has trained to drop tokens, and would undo that: put "
                f"{spec.name} before {before.name}"
                + (f", or add {LENGTH_ADAPTIVE} to its methods." if hasattr(spec.stage.settings, "methods") else ".")
            )
        if not isinstance(before.stage, Prune):
            continue
        if isinstance(spec.stage, Modular) and not before.stage.settings.uniform:
            raise FlexCompressError(
                f"stages.{spec.name} trains modules that stand for layers of one size, and {before.name} leaves layers "
                f"of any size: put {spec.name} before {before.name}, or set uniform: true in {before.name}."
            )
        if MINILM in methods:
            raise FlexCompressError(
                f"stages.{spec.name} compares queries, keys and values by {MINILM}, of which {before.name} may leave "
                f"any number in the last layer: put {spec.name} before {before.name}, or distil logits."
            )
