"""Measures several models side by side on one data set."""

from __future__ import annotations

import datetime
import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm

from ..architectures import position_limit
from ..data import load_data, select_split, take
from ..errors import FlexCompressError, MissingExtraError
from ..output import atomic_folder, check_output_folder
from ..tasks import get_task, infer_task
from ..tasks.base import Prepared, Task
from ..tasks.labels import class_column, names_of_model, without_unlabelled
from .artifact import Artifact
from .compare import compare_predictions
from .cost import count_macs, count_parameters, file_size, skeleton
from .dropping import explain_words, kept_by_layer, lengths_in
from .environment import busy_cores, environment_info
from .evaluate import Evaluation, evaluate_artifact, stream_batches
from .inputs import example_batch
from .lanes import LaneArtifact, Lanes
from .limits import check_threads, check_timing
from .memory import measure_peak_memory
from .models import check_same_inputs, name_models
from .report import ModelResult, Report
from .workloads import BLOCKS, forward_inputs, generates, time_shape, time_stream, timed_shapes, timing_dict


# Under this name the rows are prepared, whatever their split is called: tasks may treat training rows differently.
EVALUATED = "test"
# Tokens of the inputs that are timed, where the models take as many.
TIMED_LENGTH = 128


def run_benchmark(
    folders: Mapping[str, str | os.PathLike] | Sequence[str | os.PathLike],
    baseline: str | os.PathLike | None = None,
    task: str | Task | None = None,
    data: str | os.PathLike | Dataset | DatasetDict | None = None,
    output: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    max_samples: int | None = None,
    sentence: str | Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    lengths: Sequence[int] | None = None,
    new_tokens: int = 32,
    stream_rows: int = 64,
    rounds: int = 15,
    max_seconds: float = 60.0,
    eval_batch_size: int = 32,
    threads: int | None = None,
    memory: bool = True,
    html: bool = True,
    overwrite: bool = False,
    dataset_name: str | None = None,
    progress: bool = True,
    interpreters: Mapping[str, str | os.PathLike] | None = None,
    before: Mapping[str, str] | None = None,
    originals: Mapping[str, str | os.PathLike] | None = None,
) -> Report:
    """Measures models: metric, agreement with the baseline, size, MACs, latency, throughput, memory.

    All models are open at once and timed in interleaved rounds, so that speed-ups are ratios of figures taken side by
    side. Memory is measured in a process of its own for each model. A model that needs another environment, its lane,
    is opened and timed by a worker process of that environment's interpreter, in the same rounds.

    Args:
        folders: The models: `{name: folder}`, or folders, which then name themselves. See [`open_artifact`].
        baseline: The model to compare with: a name of `folders`, or another folder; None: the first one.
        task: What the models are for; None reads it from the baseline's configuration.
        data: The data set, see [`optimum_flexcompress.data.load_data`].
        output: A folder for `report.json` and `report.html`; None writes nothing.
        split: The split to evaluate; None: test, else validation, else train.
        columns: See [`Task.find_columns`].
        max_length: Longest input in tokens; None: the task's default.
        max_samples: Evaluate on at most so many rows, drawn at random.
        sentence: A text (or a pair) for which the page shows the words that models with dropped tokens keep; None: one
            of the data set.
        batch_sizes: Batch sizes to time.
        lengths: Sequence lengths to time, each with every batch size; None: 128, or what the models take.
        new_tokens: For generating models: tokens to generate while timing, and the bound while evaluating.
        stream_rows: How many rows of the data set to time one by one at their real lengths; 0: none.
        rounds: Interleaved rounds of timing, at least 3.
        max_seconds: Rough bound for the timing of one shape; rounds are cut to keep it, but not below 3.
        eval_batch_size: Rows at a time while evaluating.
        threads: Threads for PyTorch and ONNX Runtime; None: PyTorch's present number.
        memory: Whether to measure peak memory.
        html: Whether to write the page.
        overwrite: Whether `output` may be replaced.
        dataset_name: Its name in the report; None: the name of the file or folder.
        progress: Whether to show progress bars.
        interpreters: Lane -> interpreter of its environment: `{"ipex": ".venv-ipex/bin/python"}`.
        before: Which model each was made from, by name, for a table of what every step gained and lost.
        originals: By name, the folder of the PyTorch model that a graph was made from. Where that is not measured
            itself, it tells which words the graph keeps.

    Returns:
        The report; `str(report)` is the table.

    Raises:
        FlexCompressError: A model or the data set cannot be opened, they do not fit together, or a model needs a lane
            that has no interpreter.
        MissingExtraError: The page was asked for, and matplotlib or Jinja2 is missing.
    """
    if data is None:
        raise FlexCompressError("A benchmark needs a data set: give data=, on the command line --dataset.")
    if output is not None:
        check_report_folder(output, html=html, overwrite=overwrite)
    check_timing(batch_sizes, lengths, rounds, stream_rows, max_seconds)
    if eval_batch_size < 1:
        raise FlexCompressError(f"eval_batch_size must be at least 1, not {eval_batch_size}.")
    if sentence is not None and not isinstance(sentence, str) and len(sentence) not in (1, 2):
        raise FlexCompressError(f"sentence is {len(sentence)} texts: give one, or two for a task that reads pairs.")
    paths, baseline = name_models(folders, baseline)
    task = get_task(task if task is not None else infer_task(paths[baseline]))
    with using_threads(threads) as threads, Lanes(interpreters, threads) as lanes:
        # Before anything is opened, which takes a while.
        pythons = {name: lanes.interpreter_for(path) for name, path in paths.items()}
        artifacts = {name: lanes.open(path, task) for name, path in paths.items()}
        loaded = load_data(data)
        split = _labelled_split(task, loaded, columns) if split is None else select_split(loaded, split)
        evaluated = take(loaded[split], max_samples)
        prepared = _prepare(artifacts[baseline], task, loaded, split, evaluated, columns, max_length)
        check_same_inputs(artifacts, baseline)
        lengths = _timed_lengths(artifacts, task, lengths, new_tokens)

        evaluations = _evaluate(artifacts, baseline, prepared, eval_batch_size, new_tokens, progress)
        results = {
            name: _describe(name, artifact, evaluations[name], lengths, new_tokens, prepared.dataset[EVALUATED])
            for name, artifact in artifacts.items()
        }
        words = explain_words(
            artifacts, evaluated, task.find_columns(loaded, columns), sentence, max_length, originals
        )
        for name, trace in words.items():
            results[name].words = trace
        for name, result in results.items():
            result.before = (before or {}).get(name)
            if name != baseline:
                result.comparison = compare_predictions(
                    task, prepared, EVALUATED, evaluations[baseline], evaluations[name]
                )
                if prepared.main_metric in result.metrics:
                    result.change = (
                        result.metrics[prepared.main_metric] - results[baseline].metrics[prepared.main_metric]
                    )

        busy = busy_cores()
        timing = {"rounds": rounds, "max_seconds": max_seconds, "threads": threads, "progress": progress}
        for shape, batch_size, length in timed_shapes(task, batch_sizes, lengths, new_tokens):
            timings = time_shape(artifacts, batch_size, length, new_tokens, shape, timing)
            produced = batch_size * (new_tokens if generates(task) else 1)
            for name, measured in timings.items():
                results[name].latency[shape] = timing_dict(measured, timings[baseline], produced)
        if stream_rows and "attention_mask" in prepared.dataset[EVALUATED].column_names and task.name not in BLOCKS:
            batches = stream_batches(prepared, EVALUATED, stream_rows)
            for name, measured in time_stream(artifacts, baseline, batches, new_tokens, timing).items():
                results[name].stream = measured
        if memory:
            for name, path in tqdm(paths.items(), desc="Memory", unit="model", leave=False, disable=not progress):
                results[name].memory = measure_peak_memory(
                    path,
                    task.name,
                    length=max(lengths),
                    threads=threads,
                    max_new_tokens=new_tokens if generates(task) else 0,
                    python=pythons[name],
                )

        report = Report(
            task=task.name,
            dataset=dataset_name or _dataset_name(data),
            split=split,
            rows=len(prepared.windows[EVALUATED].examples.ids)
            if prepared.windows
            else len(prepared.dataset[EVALUATED]),
            metric=prepared.main_metric,
            unit=prepared.unit,
            greater_is_better=prepared.greater_is_better,
            baseline=baseline,
            models=[results[baseline], *(result for name, result in results.items() if name != baseline)],
            environment={**environment_info(threads), "busy_cores": busy, **lanes.environments()},
            settings={
                "max_length": max_length or task.default_max_length,
                "max_samples": max_samples or "all",
                "batch_sizes": list(batch_sizes),
                "lengths": list(lengths),
                **({"new_tokens": new_tokens} if generates(task) else {}),
                "stream_rows": stream_rows,
                "rounds": rounds,
                "max_seconds": max_seconds,
                "eval_batch_size": eval_batch_size,
            },
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
    if output is not None:
        with atomic_folder(output, overwrite=overwrite) as folder:
            report.save(folder, html=html)
    return report


def check_report_folder(output: str | os.PathLike, *, html: bool = True, overwrite: bool = False) -> None:
    """Says before anything is measured whether the report could be written.

    Args:
        output: The folder for it.
        html: Whether the page is to be written.
        overwrite: Whether the folder may be replaced.

    Raises:
        FlexCompressError: The folder cannot be used; see [`optimum_flexcompress.output.check_output_folder`].
        MissingExtraError: The page was asked for, and matplotlib or Jinja2 is missing.
    """
    check_output_folder(output, overwrite=overwrite)
    if html:
        require_report_extra()


def require_report_extra() -> None:
    """Raises MissingExtraError, before anything is measured, when the page could not be written."""
    for module, package in (("matplotlib", "matplotlib"), ("jinja2", "Jinja2")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "report")


def _labelled_split(task: Task, data: DatasetDict, columns: Mapping[str, str] | None) -> str:
    """The split to report on, among those with labels."""
    column = class_column(task.find_columns(data, columns))
    labelled = data if column is None else without_unlabelled(data, column)
    name = select_split(labelled)
    if name == "train" and len(labelled) < len(data):
        raise FlexCompressError(
            "No split but train has labels: give labelled examples that the models were not trained on, or say "
            'split="train" (--split train) to measure on these all the same.'
        )
    return name


@contextmanager
def using_threads(threads: int | None):
    """Gives PyTorch that many threads for a while; yields the number."""
    check_threads(threads)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _timed_lengths(
    artifacts: Mapping[str, Artifact], task: Task, asked: Sequence[int] | None, new_tokens: int
) -> Sequence[int]:
    """The lengths to time: those asked for, else 128 or what all models take.

    Raises:
        FlexCompressError: A model takes shorter inputs only.
    """
    # A decoder has to have room for what it generates, too.
    generated = new_tokens if task.name == "text-generation" else 0
    limits = {name: position_limit(artifact.config) for name, artifact in artifacts.items()}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    name = min(limits, key=limits.get, default=None)
    if name is None or task.name == "image-classification":
        return asked or [TIMED_LENGTH]
    longest = limits[name] - generated
    if asked is None and longest >= 1:
        return [min(TIMED_LENGTH, longest)]
    if asked is None or max(asked) > longest:
        needed = generated + (1 if asked is None else max(asked))
        advice = f"--lengths {longest}" if longest >= 1 else f"--new-tokens below {limits[name]}"
        raise FlexCompressError(
            f"{name} takes at most {limits[name]} tokens: {needed} is too long to be measured, give {advice}."
        )
    return asked


def _prepare(
    artifact: Artifact,
    task: Task,
    loaded: DatasetDict,
    split: str,
    evaluated: Dataset,
    columns: Mapping[str, str] | None,
    max_length: int | None,
) -> Prepared:
    rows = DatasetDict({EVALUATED: evaluated})
    if names_of_model(artifact.config) is None and split != "train" and "train" in loaded:
        # A model without class names has them in the order of its training split.
        rows["train"] = loaded["train"]
    prepared = task.prepare(
        rows,
        artifact.load_processor(),
        max_length=max_length or task.default_max_length,
        columns=columns,
        model=artifact.config,
    )
    if EVALUATED not in prepared.dataset:
        raise FlexCompressError(f"The split {split!r} has no labels: choose another one with --split.")
    if prepared.label_names is not None and len(prepared.label_names) > artifact.config.num_labels:
        raise FlexCompressError(
            f"The data set has {len(prepared.label_names)} classes, but {artifact.path} has a head for "
            f"{artifact.config.num_labels}: benchmark a model that was trained for this data set."
        )
    return prepared


def _evaluate(
    artifacts: Mapping[str, Artifact],
    baseline: str,
    prepared: Prepared,
    batch_size: int,
    new_tokens: int,
    progress: bool,
) -> dict[str, Evaluation]:
    evaluations: dict[str, Evaluation] = {}
    for name in artifacts:
        # Where a task has no labels, the baseline's vectors stand in for them.
        unlabelled = artifacts[name].task.name == "feature-extraction"
        references = evaluations[baseline].predictions if unlabelled and name != baseline else None
        evaluations[name] = evaluate_artifact(
            artifacts[name],
            prepared,
            EVALUATED,
            batch_size=batch_size,
            max_new_tokens=new_tokens,
            references=references,
            progress=progress,
        )
        if unlabelled and name == baseline:
            evaluations[name].metrics = {prepared.main_metric: 1.0}
    return evaluations


def _describe(
    name: str, artifact: Artifact, evaluation: Evaluation, lengths: Sequence[int], new_tokens: int, rows: Dataset
) -> ModelResult:
    model = artifact.torch_model
    if model is None:
        model = skeleton(artifact.folder, artifact.task)
    macs = {}
    for length in lengths if artifact.task.name != "image-classification" else [0]:
        batch = forward_inputs(artifact, example_batch(artifact.config, artifact.task, 1, length), new_tokens)
        macs[str(length) if length else "image"] = count_macs(model, batch)
    config = lengths_in(artifact)
    longest = example_batch(artifact.config, artifact.task, 1, max(lengths))
    return ModelResult(
        name=name,
        path=str(artifact.path),
        backend=artifact.backend,
        precision=artifact.precision,
        lane=artifact.worker.lane if isinstance(artifact, LaneArtifact) else None,
        parameters=count_parameters(model),
        size=file_size(artifact.path),
        macs=macs,
        metrics={key: float(value) for key, value in evaluation.metrics.items()},
        lengths=None if config is None else kept_by_layer(config, model, longest, rows),
    )


def _dataset_name(data: Any) -> str:
    if isinstance(data, Dataset | DatasetDict):
        first = data if isinstance(data, Dataset) else next(iter(data.values()))
        return first.info.dataset_name or "data set"
    path = Path(data)
    return path.name if path.exists() else str(data)
