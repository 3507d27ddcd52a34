"""A table of how long the parts of a model take in PyTorch on one machine, at some of their sizes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from ...architectures import describe
from ...errors import FlexCompressError
from ...evaluation.environment import BUSY, busy_cores
from ...output import write_text_atomically
from ...structure import ModelStructure
from .timing import Times, Workload, grid, plan_copies, time_copy, typical


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""Those that are timed, as shares of the model's own."""


@dataclass
class LatencyTable:
    """Milliseconds by size.

    Attributes:
        workload: What was timed.
        machine: Processor and versions, for the record and for the name of the file.
        model: A fingerprint of the model's configuration and sizes.
        widths: Widths of the residual stream, ascending.
        rest: What a forward pass takes outside the sub-layers, at each width.
        sizes: For `<stack>.<kind>` the units of a sub-layer that were timed, ascending.
        times: For `<stack>.<kind>` what it takes, `[widths][sizes]`; longer with every size.
    """

    workload: Workload
    machine: dict[str, str]
    model: str
    widths: list[int]
    rest: list[float]
    sizes: dict[str, list[int]] = field(default_factory=dict)
    times: dict[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def measure(cls, model: PreTrainedModel, workload: Workload, vary_width: bool = True) -> LatencyTable:
        """Times a model.

        Args:
            model: The model; it is copied.
            workload: What is timed.
            vary_width: Whether widths below the model's own are timed too.
        """
        busy = busy_cores() if workload.device == "cpu" else None
        if busy is not None and busy > BUSY:
            logger.warning(
                f"Other processes keep {busy:.1f} cores busy, which the table of latencies will show: measure it anew "
                "on a quiet machine."
            )
        view = describe(model)
        widths = grid(view.hidden_size, WIDTHS) if vary_width else [view.hidden_size]
        found = [Times({}, []) for _ in widths]
        plans = plan_copies(view)
        jobs = [(width, times, plan) for width, times in zip(widths, found) for plan in plans]
        for width, times, plan in tqdm(jobs, desc="Timing layers", leave=False):
            time_copy(model, width, plan, workload, times)
        sizes: dict[str, list[int]] = {}
        for name, size in sorted(found[0].sublayers):
            sizes.setdefault(name, []).append(size)
        table = {
            name: _monotone([[typical(times.sublayers[name, size]) for size in known] for times in found])
            for name, known in sizes.items()
        }
        rest = []
        for row, times in enumerate(found):
            outside = [
                total - sum(float(np.interp(size, sizes[name], table[name][row])) for name, size in left)
                for total, left in times.others
            ]
            rest.append(max(typical(outside), 0.0))
        return cls(workload, _machine(workload), fingerprint(model), widths, _monotone([rest])[0], sizes, table)

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `asdict`."""
        data = {name: value for name, value in data.items() if name != "format_version"}
        return cls(**{**data, "workload": Workload(**data["workload"])})

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """Reads a table.

        Raises:
            FlexCompressError: The file holds none.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format_version"] != FORMAT_VERSION:
                raise KeyError("format_version")
            return cls.from_dict(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FlexCompressError(
                f"{path} holds no table of latencies that this release can read ({error}): remove it, and it is "
                "measured anew."
            ) from None

    def save(self, path: str | os.PathLike) -> None:
        """Writes the table, to be used here or for a run on another machine.

        Raises:
            FlexCompressError: It cannot be written there.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, self.to_json())
        except OSError as error:
            raise FlexCompressError(
                f"The table of latencies cannot be written to {path} ({error.strerror}): set latency_table to a file "
                "that can."
            ) from None


def load_or_measure(
    model: PreTrainedModel, workload: Workload, path: str | os.PathLike | None, vary_width: bool
) -> LatencyTable:
    """The table for a model: the one in a file, or a new one that is then kept there. One process measures for all.

    Args:
        model: The model.
        workload: What the table is for.
        path: The file; `None` for one in the cache whose name tells model, workload and machine. A file that is named
            may have been measured on another machine.
        vary_width: Whether widths below the model's own are needed.

    Raises:
        FlexCompressError: The file is for another model or workload.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    found: list[LatencyTable | FlexCompressError | None] = [None]
    if not distributed or torch.distributed.get_rank() == 0:
        file = Path(path).expanduser() if path is not None else _cache_file(model, workload, vary_width)
        try:
            found = [_load_or_measure(model, workload, file, vary_width)]
        except FlexCompressError as error:
            # The other processes wait for an answer.
            found = [error]
    if distributed:
        torch.distributed.broadcast_object_list(found)
    (table,) = found
    if isinstance(table, FlexCompressError):
        raise table
    return table


def _load_or_measure(model: PreTrainedModel, workload: Workload, file: Path, vary_width: bool) -> LatencyTable:
    if file.is_dir():
        raise FlexCompressError(
            f"latency_table is the folder {file}: give the path of a file, which is made if need be."
        )
    if file.exists():
        table = LatencyTable.load(file)
        _check(table, model, workload, file, vary_width)
        return table
    table = LatencyTable.measure(model, workload, vary_width)
    table.save(file)
    return table


def _check(table: LatencyTable, model: PreTrainedModel, workload: Workload, file: Path, vary_width: bool) -> None:
    if table.model != fingerprint(model) or (vary_width and len(table.widths) == 1):
        raise FlexCompressError(
            f"The latencies in {file} are those of another model, or of one width only: give another latency_table."
        )
    there = table.workload
    if (there.batch_size, there.sequence_length) != (workload.batch_size, workload.sequence_length):
        raise FlexCompressError(
            f"The latencies in {file} were measured for {there}, not {workload}: give another latency_table, or the "
            "same latency_batch_size and sequence_length."
        )


def fingerprint(model: PreTrainedModel) -> str:
    """Tells models of different speed apart: the class, the sizes, the configuration without names."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "id2label", "label2id", "dtype", "torch_dtype"):
        config.pop(name, None)
    parts = [
        type(model).__name__,
        str(model.dtype),
        ModelStructure.of(model).to_dict(),
        config,
        sum(parameter.numel() for parameter in model.parameters()),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _cache_file(model: PreTrainedModel, workload: Workload, vary_width: bool) -> Path:
    parts = [fingerprint(model), asdict(workload), _machine(workload), vary_width, FORMAT_VERSION]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return Path(HF_HOME) / "flexcompress" / "latency" / f"{name}.json"


def _machine(workload: Workload) -> dict[str, str]:
    if workload.device == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else "unknown processor"
    else:
        processor = torch.cuda.get_device_name(workload.device)
    return {"processor": processor, "torch": torch.__version__, "transformers": transformers_version}


def _monotone(times: list[list[float]]) -> list[list[float]]:
    """The mean of the two nearest tables that never fall, along either side: noise may say that less takes longer."""
    values = np.array(times)
    for axis in (1, 0):
        upper = np.maximum.accumulate(values, axis)
        lower = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
        values = (upper + lower) / 2
    return values.tolist()
