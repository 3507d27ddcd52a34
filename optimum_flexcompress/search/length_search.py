"""Searches for the length configurations of a model that are worth choosing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from ..errors import FlexCompressError
from ..evaluation.benchmark import using_threads
from ..length_config import LENGTH_UNITS
from ..tasks.base import Task
from .evolution import check_counts
from .front import Front
from .held_out import open_held_out
from .length_model import open_model
from .length_scoring import OBJECTIVES, RUNTIMES, LengthScorer, Timed, check_choice
from .length_space import LengthSpace
from .search_run import SearchRun


logger = logging.getLogger(__name__)


def search_lengths(
    model: PreTrainedModel | str | os.PathLike,
    data: Any,
    task: str | Task | None = None,
    output: str | os.PathLike | None = None,
    *,
    objective: str = "macs",
    runtime: str = "pytorch",
    max_drop: float | str | None = None,
    max_cost: float | str | None = None,
    max_latency: float | None = None,
    save_pick: str | os.PathLike | None = None,
    processor: Any = None,
    split: str | None = None,
    samples: int | None = 1000,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    unit: str | None = None,
    metric: str | None = None,
    population: int = 20,
    trials: int = 150,
    patience: int | None = None,
    storage: str | None = None,
    seed: int = 42,
    batch_size: int = 32,
    latency_batch_size: int = 32,
    new_tokens: int = 32,
    threads: int | None = None,
    bf16: bool = False,
    picture: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = logger.info,
) -> Front:
    """Searches for length configurations that lose little and cost little, and writes their front.

    Candidates are scored on examples held out from training, and evolve by NSGA-II. Scores are kept in a database, so
    that the same call goes on where an earlier one was interrupted, and several processes (also on several machines,
    for multiply-accumulates) share one search.

    Args:
        model: A model with an encoder, in memory or as a folder; best one trained with [`LengthAdaptiveConfig`].
        data: See [`optimum_flexcompress.data.load_data`].
        task: What the model is for; by default what its class says.
        output: Folder for `front.json`, the pictures and, unless `storage` names another one, the database. It may
            hold an earlier search.
        objective: What to trade the metric against: `"macs"`, multiply-accumulates of one input of `max_length`
            tokens, or `"latency"`, measured here in turn with the full model.
        runtime: What runs the candidates: `"pytorch"`, or their ONNX graphs in ONNX Runtime, `"ort"` in single
            precision, `"ort-int8"` in int8.
        max_drop: Pick the cheapest configuration that loses at most this share of the metric: `0.01` or `"1%"`.
        max_cost: Pick within this share of the full model's cost: `0.5` or `"50%"`. Without `max_drop`, the search
            looks most closely at what costs about as much.
        max_latency: Pick within so many milliseconds a batch, where latency is searched.
        save_pick: Folder for the model with the picked lengths set.
        processor: Tokenizer or image processor of a model in memory.
        split: Split to score on; by default `validation`, else a part of `train`, see
            [`optimum_flexcompress.search.hold_out`].
        samples: How many examples to score on; all when `None`.
        columns: See [`Task.find_columns`].
        max_length: Length of the inputs, which counts refer to; by default that of training, else the task's.
        unit: `"counts"` or `"fractions"`; by default what the model was trained with.
        metric: A metric of the task, or `"loss"`; by default the task's main one.
        population: Configurations in a generation.
        trials: Configurations to score in all.
        patience: End when so many in a row have not moved the front; 0: never; by default twice the population.
        storage: Database URL, such as `sqlite:////tmp/search.db` or `postgresql://...`.
        seed: Of everything random.
        batch_size: Rows at a time while scoring.
        latency_batch_size: Rows of the batch that is timed.
        new_tokens: Tokens to generate at most while scoring, and while timing models that generate.
        threads: Threads of PyTorch and ONNX Runtime; PyTorch's present number when `None`.
        bf16: Score in bfloat16, faster on a processor that computes in it; PyTorch only. Times are measured in single
            precision all the same.
        picture: Whether to draw the front, which needs the extra `report`.
        progress: Whether to show progress bars.
        say: Receives lines for the user.

    Returns:
        The front; with a limit given, `front.picked` is the choice.

    Raises:
        FlexCompressError: The model cannot drop tokens, data or storage cannot be opened, an argument is wrong, or no
            configuration keeps the limits; in the last case the front has been written.
        MissingExtraError: Optuna, or matplotlib for the picture, is missing.
    """
    check_choice("objective", objective, OBJECTIVES)
    check_choice("runtime", runtime, RUNTIMES)
    if unit is not None:
        check_choice("unit", unit, LENGTH_UNITS)
    if metric == "loss" and runtime != "pytorch":
        raise FlexCompressError("The loss is computed in PyTorch only: choose another metric, or --runtime pytorch.")
    if bf16 and runtime != "pytorch":
        raise FlexCompressError(f"bf16 (--bf16) is for the runtime pytorch, not {runtime}: leave one of them out.")
    check_counts(batch_size=batch_size, latency_batch_size=latency_batch_size, new_tokens=new_tokens, trials=trials)
    run = SearchRun(
        output,
        storage,
        objective=objective,
        limits={"max_drop": max_drop, "max_cost": max_cost, "max_latency": max_latency},
        save_pick=save_pick,
        picture=picture,
    )
    searched = open_model(model, task, processor)
    if not searched.trained:
        logger.warning(
            "%s was not trained to drop tokens, so that configurations lose more than they need to: train it with "
            "LengthAdaptiveConfig first. The search goes on.",
            searched.name,
        )
    max_length = searched.longest_input(max_length)
    held_out = open_held_out(
        data,
        searched.task,
        searched.processor,
        searched.model.config,
        split=split,
        samples=samples,
        columns=columns,
        max_length=max_length,
        metric=metric,
        batch_size=batch_size,
        max_new_tokens=new_tokens,
        seed=seed,
        bf16=bf16,
    )
    with ExitStack() as context:
        threads = context.enter_context(using_threads(threads))
        context.enter_context(searched.at_full_lengths())
        timed = Timed(latency_batch_size, max_length, new_tokens, threads=threads)
        macs = searched.macs(max_length, new_tokens)
        unit = unit or searched.training.unit
        space = LengthSpace(searched.able, macs.max_length, unit, macs, searched.training.length_drop)
        settings = {
            "kind": space.kind,
            "task": searched.task.name,
            "objective": objective,
            "runtime": runtime,
            "unit": unit,
            "max_length": macs.max_length,
            "metric": held_out.metric,
            "examples": held_out.where,
            "batch_size": batch_size,
            "new_tokens": new_tokens,
            **({"timed": asdict(timed)} if objective == "latency" else {}),
            **({"bf16": True} if bf16 else {}),
        }
        scorer = LengthScorer(
            searched.model,
            space,
            held_out,
            macs,
            objective=objective,
            runtime=runtime,
            timed=timed,
            task=searched.task,
        )

        def save(front: Front, folder: str | os.PathLike) -> None:
            searched.save(front.picked.lengths, folder, {front.metric: front.picked.metric})

        with scorer:
            return run(
                space,
                scorer,
                held_out,
                settings=settings,
                options={"model": searched.name},
                weights=[searched.model],
                full_macs=macs.full,
                describe=lambda candidate: space.config(candidate).to_dict(),
                save=save,
                title=f"Searching lengths of {searched.name} on {held_out.where}: {held_out.metric} against {objective}, "
                f"{runtime}",
                plural="configurations",
                population=population,
                trials=trials,
                patience=patience,
                seed=seed,
                progress=progress,
                say=say,
            )
