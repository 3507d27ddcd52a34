"""What was requested: a cost, and whether it can be had."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ...architectures import describe
from ...config_sizes import width_is_free
from ...errors import FlexCompressError
from ...vib_config import KINDS, VIBPruningConfig
from .cost import macs_cost, parameter_cost
from .latency import LatencyTable, load_or_measure
from .latency_cost import PER_MILLISECOND, LatencyCost
from .layout import MaskLayout
from .sizes import TOLERANCE, Scores, Selection, choose_sizes, threshold_sizes
from .timing import Workload, time_forward
from .uniform import UniformSizes


class Target:
    """The request of a config for a model.

    Attributes:
        layout: The masks.
        cost: What the request counts.
        sparsity: The share of it that has to go.
        levels: Where the run halts to write checkpoints, ascending, below `sparsity`.
        save_final: Whether the checkpoint at the target itself was asked for.
        with_embeddings: The parameters of layers and embeddings, for the second figure in the logs.

    Args:
        config: The config.
        model: The model, without masks.
        device: The device that trains.

    Raises:
        FlexCompressError: The request is not below the size of the model.
        UnsupportedArchitectureError: The family's table does not know all of the model.
    """

    def __init__(self, config: VIBPruningConfig, model: PreTrainedModel, device: torch.device | str = "cpu"):
        view = describe(model)
        self._config, self._model = config, model
        self.layout = MaskLayout.of(view, _kinds(config, model))
        self.with_embeddings = parameter_cost(view, self.layout, include_embeddings=True)
        if config.target_macs is not None:
            self.cost = macs_cost(view, self.layout, config.sequence_length)
            self.sparsity = self._sparsity_of_macs(config.target_macs)
        elif config.target_latency is not None:
            device = _latency_device(config.latency_device, device)
            self.workload = Workload.of(view, config.latency_batch_size, config.sequence_length, device)
            table = load_or_measure(model, self.workload, config.latency_table, "hidden" in self.layout.kinds)
            self._use_table(table)
        else:
            self.cost = parameter_cost(view, self.layout, config.include_embeddings)
            self.sparsity = float(config.target_sparsity)
        beyond = [level for level in config.save_at_sparsities if level > self.sparsity + 1e-9]
        if beyond:
            raise FlexCompressError(
                f"save_at_sparsities has {beyond[0]:g}, beyond the target, which is a sparsity of {self.sparsity:.4g}: "
                "make the largest of them the target."
            )
        self.levels = [level for level in config.save_at_sparsities if level < self.sparsity - 1e-9]
        self.save_final = len(self.levels) < len(config.save_at_sparsities)
        self._uniform = UniformSizes(model, self.cost, config.align) if config.uniform else None

    def _sparsity_of_macs(self, wanted: float) -> float:
        share = wanted if wanted < 1 else wanted / self.cost.dense
        if share >= 1:
            raise FlexCompressError(
                f"target_macs is {wanted:,.0f}, the model takes {self.cost.dense:,} multiply-accumulates per sample: "
                "give a smaller number, or a share below 1."
            )
        return 1.0 - share

    def _use_table(self, table: LatencyTable) -> None:
        self.cost = LatencyCost(self.layout, table)
        self.sparsity = self._sparsity_of_latency(self._config.target_latency)

    def _sparsity_of_latency(self, wanted: float) -> float:
        dense = self.cost.dense / PER_MILLISECOND
        if wanted >= dense:
            raise FlexCompressError(
                f"target_latency is {wanted:g} ms, the whole model takes {dense:.4g} ms by the table (PyTorch, "
                f"{self.workload}): give a smaller one."
            )
        return 1.0 - wanted / dense

    @property
    def table(self) -> LatencyTable | None:
        """The latencies, where the request is about time."""
        return self.cost.table if isinstance(self.cost, LatencyCost) else None

    @table.setter
    def table(self, table: LatencyTable) -> None:
        self._use_table(table)
        if self._uniform is not None:
            self._uniform.cost = self.cost

    def milliseconds(self, values: torch.Tensor, model: PreTrainedModel) -> dict[str, float]:
        """What the table says that a model takes, and what it was measured to take.

        Args:
            values: Zeros and ones: what of the masks is left, `[size]`.
            model: The model, without the rest.
        """
        kept = (values != 0).cpu()
        units = [kept[part.start : part.stop].nonzero() if kept[part.gate] else [] for part in self.layout.sublayers]
        cost = self.cost.exact(int(kept[: self.layout.hidden].sum()), units)
        return {
            "latency_dense_ms": self.cost.dense / PER_MILLISECOND,
            "latency_table_ms": cost / PER_MILLISECOND,
            "latency_measured_ms": time_forward(model, self.workload),
        }

    def wanted(self, sparsity: float) -> int:
        """The cost that a sparsity leaves."""
        return round((1.0 - sparsity) * self.cost.dense)

    def reached(self, selection: Selection) -> float:
        """The sparsity of a selection."""
        return 1.0 - selection.cost / self.cost.dense

    def meets(self, selection: Selection, sparsity: float) -> bool:
        """Whether a selection leaves what was wanted, within the tolerance."""
        wanted = self.wanted(sparsity)
        return abs(selection.cost - wanted) <= TOLERANCE * wanted

    def select(self, scores: torch.Tensor, sparsity: float | None) -> Selection:
        """The best selection for a sparsity.

        Args:
            scores: `[size]`, as from [`VIBMasks.scores`].
            sparsity: The sparsity; what the masks have reached by themselves when `None`.
        """
        split = Scores.of(self.layout, scores)
        if self._uniform is not None:
            wanted = threshold_sizes(self.cost, split, 1).cost if sparsity is None else self.wanted(sparsity)
            return self._uniform.choose(split, wanted)
        if sparsity is None:
            return threshold_sizes(self.cost, split, self._config.align)
        return choose_sizes(self.cost, split, self.wanted(sparsity), self._config.align)

    def check_reachable(self) -> None:
        """Tries the target and the levels on masks that have no preference.

        Raises:
            FlexCompressError: No aligned sizes come near one of them; the message names the nearest that do.
        """
        scores = torch.where(self.layout.active(), 1.0, torch.inf)
        for level in [*self.levels, self.sparsity]:
            nearest = self.select(scores, level)
            if self.meets(nearest, level):
                continue
            raise FlexCompressError(self.cannot_be_reached(level, nearest))

    def cannot_be_reached(self, sparsity: float, nearest: Selection) -> str:
        """A sentence on a sparsity that no aligned sizes come near.

        Args:
            sparsity: What was asked for.
            nearest: What comes nearest.
        """
        config, cost = self._config, nearest.cost
        if isinstance(self.cost, LatencyCost):
            wanted, found = (f"{number / PER_MILLISECOND:.4g} ms" for number in (self.wanted(sparsity), cost))
            found += f" by the table of latencies (PyTorch, {self.workload})"
        elif config.target_macs is not None and sparsity == self.sparsity:
            wanted, found = (
                f"{count:,} multiply-accumulates ({count / self.cost.dense:.4f} of all)"
                for count in (self.wanted(sparsity), cost)
            )
        else:
            wanted, found = f"A sparsity of {sparsity:.4g}", f"{self.reached(nearest):.4f}"
        more = [kind for kind in _possible(config, self._model) if kind not in self.layout.kinds]
        advice = ["ask for that"] if cost < self.cost.dense else []
        advice += ["use a smaller align"] if config.align > 1 else []
        advice += [f"add {' or '.join(more)} to prune"] if more else []
        advice += ["leave out uniform=True"] if config.uniform else []
        *first, last = advice or ["ask for less to be left"]
        return (
            f"{wanted} cannot be reached with align={config.align}{', uniform=True' if config.uniform else ''} and "
            f"prune={config.prune}: the nearest is {found}; {', '.join(first)}{', or ' if first else ''}{last}."
        )


def _possible(config: VIBPruningConfig, model: PreTrainedModel) -> list[str]:
    """The kinds of structure that can be pruned: uniform sizes keep all sub-layers, and stock ones often the width."""
    barred = set() if not config.uniform else {"sublayers"} if width_is_free(model) else {"sublayers", "hidden"}
    return [kind for kind in KINDS if kind not in barred]


def _kinds(config: VIBPruningConfig, model: PreTrainedModel) -> set[str]:
    possible = _possible(config, model)
    kinds = set(config.prune) & set(possible)
    if not kinds:
        raise FlexCompressError(
            f"uniform=True leaves nothing of prune={config.prune} to prune in this model: add "
            f"{' or '.join(possible)}, or leave uniform=True out."
        )
    return kinds


def _latency_device(name: str | None, default: torch.device | str) -> torch.device:
    """Where latencies are measured."""
    try:
        device = torch.device(name or default)
    except (RuntimeError, TypeError):
        device = None
    if device is None or (device.type == "cuda" and not torch.cuda.is_available()):
        raise FlexCompressError(
            f"latency_device is {name!r}, which this machine does not have: give cpu, or cuda where there is a GPU, or "
            "leave it out."
        )
    return device
