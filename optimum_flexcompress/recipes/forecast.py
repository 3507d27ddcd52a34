"""How long a recipe is going to take here, from a short measurement.

A few training steps and forward passes of the model are timed on real rows of the data, on a copy in memory that is
thrown away, and the model is made int8 once. What a stage takes is counted in these: examples times the time of one,
times the share of the model that is left by then, times what the method adds. That is an estimate: a machine that does
other work meanwhile, or inputs unlike those that were drawn, make it wrong.

| stage | a step takes |
|---|---|
| `finetune` | a training step |
| `distill` | the student's step and the teacher's forward pass, 1.23 times that with MiniLM (train_overhead.json) |
| `prune` | 1.15 steps (masks add 0.02 by vib_text.json, matching hidden states the rest), and the teacher's forward pass |
| `length-adaptive` | a step, and one for each sub-model by the tokens and layers that it has on average |
| `modular` | a step, one of each module, and a forward pass of the original layers |
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FlexCompressError
from .allocator import keeping_freed_memory
from .stages import INPUT, StageSpec
from .stages.training import attention_options


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from ..tasks import Task
    from .inputs import Inputs
    from .schema import Recipe

MINILM_OVERHEAD, MASK_OVERHEAD = 1.23, 1.15
# Of the full model's cost, for configurations as a search scores them.
MEAN_COST = 0.6
# Rows of a step in the training stages, unless they say something else.
STEP_ROWS = 32
# Opening and measuring the memory of a model, in seconds.
PER_MODEL = 15.0
# Batches as large as those of the training, of few tokens.
_DRAWN, _TIMED_TOKENS, _MOST_ROWS, _LABELLED = 256, 2048, STEP_ROWS, 4096
_QUANTILES = (1 / 6, 1 / 2, 5 / 6)
_REPEATS = 3


@dataclass(frozen=True)
class Facts:
    """What a plan and a forecast go by.

    Attributes:
        task: Name of the task.
        kind: `encoder`, `decoder` or `encoder-decoder`.
        layers: Of the shallowest stack.
        even: Whether every stack has an even number of them.
        width: Hidden size.
        labels: Whether the task has labels to train on.
        trained: Whether the model seems to be fine-tuned already.
        rows: Rows to train on, windows of long inputs counted one by one.
        eval_rows: Rows to evaluate on.
        steps_per_epoch: Optimizer steps in a pass over the training rows, `STEP_ROWS` at a time.
        tokens: The median of an input; None for images.
        bf16: Whether the processor computes in bfloat16.
        shape: What latencies are of, such as `1x128`: batch x tokens.
        int8_milliseconds: Time of such a batch by the model in int8, before any training.
        graph_seconds: Time to export the model and to make it int8.
        step_seconds: Forward and backward pass of a row, on average.
        forward_seconds: Forward pass of a row.
        update_seconds: Update of the weights, of a step.
        busy_cores: What other processes took when this was measured; None where the system does not tell.
    """

    task: str
    kind: str
    layers: int
    even: bool
    width: int
    labels: bool
    trained: bool
    rows: int
    eval_rows: int
    steps_per_epoch: int
    tokens: int | None
    bf16: bool
    shape: str
    int8_milliseconds: float
    graph_seconds: float
    step_seconds: float
    forward_seconds: float
    update_seconds: float
    busy_cores: float | None = None


def look(recipe: Recipe, model: str, task: Task, inputs: Inputs, skeleton: PreTrainedModel) -> Facts:
    """Measures what a plan and a forecast need.

    Args:
        recipe: Says how the data is used, and the first shape of its benchmark what is timed.
        model: Folder or Hub id.
        task: The task.
        inputs: The data.
        skeleton: The model without its weights.
    """
    import numpy as np
    from datasets import DatasetDict

    from ..architectures import describe
    from ..data import select_split, take
    from ..evaluation.artifact import LABELS
    from ..evaluation.environment import busy_cores
    from .inputs import no_progress_bars
    from .stages.training import ATTENTION_DROPOUT, has_head, head_fits, load_config

    if "train" not in inputs.data:
        raise FlexCompressError("the data set has no training split, which every compression needs: give one with it.")
    view = describe(skeleton)
    processor = task.load_processor(model)
    train = inputs.data["train"]
    drawn = take(train, _DRAWN, recipe.seed)
    length = min(recipe.data.max_length or task.default_max_length, getattr(processor, "model_max_length", 1 << 30))
    config, settings = load_config(model), {"max_length": length, "columns": recipe.data.columns}
    with no_progress_bars():
        prepared = task.prepare(DatasetDict(train=drawn), processor, label_names=inputs.label_names, **settings)
        shown = DatasetDict(train=_showing_all_labels(task, train, recipe))
        trained = has_head(task.auto_class, config) and head_fits(
            config, lambda: task.prepare(shown, processor, model=config, **settings)
        )
    rows = prepared.dataset["train"]
    sizes = np.sort([len(ids) for ids in rows["input_ids"]]) if "input_ids" in rows.column_names else None
    per_example = len(rows) / len(drawn)
    # Some tasks make them from the inputs, batch by batch.
    labels = bool(set(LABELS) & set(prepared.collator([rows[0]])))
    dropout = {name: 0.0 for name in ATTENTION_DROPOUT if hasattr(skeleton.config, name)}
    loaded = task.load_model(model, ignore_mismatched_sizes=True, **prepared.model_kwargs, **dropout)
    bf16 = _computes_in_bf16()
    causal = all(stack.is_causal for stack in view.stacks.values())
    kind = "encoder-decoder" if len(view.stacks) > 1 else "decoder" if causal else "encoder"
    count = max(1, round(len(train) * per_example))
    eval_rows = len(inputs.data[select_split(inputs.data)])
    return Facts(
        task=task.name,
        kind=kind,
        layers=min(len(stack.layers) for stack in view.stacks.values()),
        even=all(len(stack.layers) % 2 == 0 for stack in view.stacks.values()),
        width=view.hidden_size,
        labels=labels,
        trained=trained,
        rows=count,
        eval_rows=max(1, round(eval_rows * per_example)),
        steps_per_epoch=-(-count // STEP_ROWS),
        tokens=None if sizes is None else int(np.median(sizes)),
        bf16=bf16,
        busy_cores=busy_cores(),
        **_time_int8(recipe, loaded, task, length),
        **_time_training(loaded, prepared, bf16, labels),
    )


def _showing_all_labels(task: Task, rows: Dataset, recipe: Recipe) -> Dataset:
    """A few rows among which every class is."""
    from ..tasks.labels import class_column, flatten

    column = class_column(task.find_columns({"train": rows}, recipe.data.columns))
    if column is None:
        return rows.select(range(min(_MOST_ROWS, len(rows))))
    seen: set[Any] = set()
    chosen = []
    for row, value in enumerate(rows[column]):
        new = set(flatten([value])) - seen
        if new and len(chosen) < _LABELLED:
            chosen.append(row)
            seen |= new
    return rows.select(chosen)


def _time_int8(recipe: Recipe, model: PreTrainedModel, task: Task, length: int) -> dict[str, Any]:
    from ..evaluation import measure_side_by_side, open_artifact
    from ..evaluation.inputs import example_batch
    from ..evaluation.workloads import runner, timed_shapes
    from ..quantization import quantize_folder

    settings = next(spec.stage.settings for spec in recipe.stages if spec.type == "benchmark")
    shapes = timed_shapes(task, settings.batch_sizes, settings.lengths or [length], settings.new_tokens)
    shape, batch_size, length = shapes[0]
    with tempfile.TemporaryDirectory(prefix="flexcompress-plan-") as folder:
        started = time.perf_counter()
        quantize_folder(model.eval(), Path(folder) / "int8", task=task.name)
        seconds = time.perf_counter() - started
        artifact = open_artifact(Path(folder) / "int8", task, threads=settings.threads)
        run = runner(artifact, example_batch(artifact.config, task, batch_size, length), settings.new_tokens)
        timing = measure_side_by_side(
            {"int8": run}, rounds=9, max_seconds=10, threads=settings.threads, progress=False
        )
    return {"shape": shape, "int8_milliseconds": 1e3 * timing["int8"].median, "graph_seconds": seconds}


def _computes_in_bf16() -> bool:
    """Whether the device that trains is fast in bfloat16."""
    import torch

    from ..evaluation.environment import environment_info

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16"} & set(environment_info()["flags"]))


@keeping_freed_memory()
def _time_training(model: PreTrainedModel, prepared: Any, bf16: bool, labels: bool) -> dict[str, float]:
    """Steps on a few rows of three lengths, none without labels; the weights are thrown away afterwards."""
    import torch

    from .dropout import fast_dropout

    rows = prepared.dataset["train"]
    order = list(range(len(rows)))
    if "input_ids" in rows.column_names:
        order.sort(key=[len(ids) for ids in rows["input_ids"]].__getitem__)
    batches = []
    for quantile in _QUANTILES:
        middle = int(quantile * len(order))
        longest = len(rows[order[middle]].get("input_ids", ())) or 256
        size = max(1, min(_MOST_ROWS, _TIMED_TOKENS // longest, len(order)))
        start = max(0, min(middle, len(order) - size))
        batches.append((size, prepared.collator([rows[index] for index in order[start : start + size]])))

    # As the Trainer does, which leaves out what the model does not take.
    accepted = inspect.signature(model.forward).parameters
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    if bf16 and (faster := attention_options()):
        model.set_attn_implementation(**faster)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def forward(batch: Mapping[str, Any]) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return model(**{name: value.to(device) for name, value in batch.items() if name in accepted})

    def step(batch: Mapping[str, Any]) -> None:
        loss = forward(batch).get("loss")
        if loss is None:
            raise FlexCompressError("the model returns no loss on this data, so it cannot be trained: look at --task.")
        loss.backward()

    def fastest(function: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(_REPEATS):
            started = now()
            function()
            seconds.append(now() - started)
        return min(seconds)

    def per_row(function: Callable[[Mapping[str, Any]], Any]) -> float:
        seconds = []
        for size, batch in batches:
            # The first of a shape takes longer, and there are few shapes in a training.
            function(batch)
            seconds.append(fastest(partial(function, batch)) / size)
        return sum(seconds) / len(seconds)

    with torch.inference_mode():
        forward_seconds = per_row(forward)
    if not labels:
        return {"step_seconds": 0.0, "forward_seconds": forward_seconds, "update_seconds": 0.0}
    model.train()
    with fast_dropout():
        step_seconds = per_row(step)
    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.parameters() if parameter.grad is not None), lr=0.0
    )
    optimizer.step()
    update_seconds = fastest(optimizer.step)
    return {"step_seconds": step_seconds, "forward_seconds": forward_seconds, "update_seconds": update_seconds}


def forecast(recipe: Recipe, facts: Facts) -> dict[str, float | None]:
    """What each stage is going to take.

    Args:
        recipe: The recipe.
        facts: What was measured.

    Returns:
        Seconds by stage; None for one of a type that is not known here.
    """
    shares = {INPUT: 1.0}
    seconds: dict[str, float | None] = {}
    for spec in recipe.stages:
        shares[spec.name] = _share(spec, shares, facts)
        estimate = _ESTIMATES.get(spec.type)
        seconds[spec.name] = None if estimate is None else estimate(spec, shares, facts)
    return seconds


def _share(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    """What the stage's model costs, as a share of the model that the user gave."""
    source, settings = spec.stage.source(), spec.stage.settings
    before = shares.get(source, 1.0) if source else 1.0
    if spec.type == "distill" and isinstance(settings.layers, float):
        return before * settings.layers
    if spec.type == "distill" and isinstance(settings.layers, int | list):
        layers = settings.layers if isinstance(settings.layers, int) else len(settings.layers)
        return layers / facts.layers
    if spec.type == "assemble" and settings.ratio:
        return before / settings.ratio
    if spec.type == "prune" and settings.target_sparsity is not None:
        return shares.get(settings.sparsity_of, before) * (1 - settings.target_sparsity)
    if spec.type == "prune" and settings.target_macs is not None and settings.target_macs < 1:
        return before * settings.target_macs
    return before


def _training(spec: StageSpec, per_row: float, share: float, facts: Facts) -> float:
    settings = spec.stage.settings
    batch = settings.batch_size * settings.gradient_accumulation_steps
    steps = settings.max_steps or -(-facts.rows // batch) * settings.epochs
    if settings.max_steps is None and spec.type == "prune" and settings.mode != "vtrans":
        steps = max(steps * settings.data_fraction, settings.min_steps if settings.mode == "fast" else 0)
    return steps * (batch * per_row + share * facts.update_seconds) + facts.eval_rows * facts.forward_seconds * share


def taken_as_it_is(spec: StageSpec, facts: Facts) -> bool:
    """Whether the stage fine-tunes what is fine-tuned already, and so does nothing."""
    return spec.type == "finetune" and facts.trained and spec.stage.settings.skip_if_trained


def _finetune(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    if taken_as_it_is(spec, facts):
        return 0.0
    share = shares[spec.name]
    return _training(spec, share * facts.step_seconds, share, facts)


def _distill(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    settings, share = spec.stage.settings, shares[spec.name]
    per_row = share * facts.step_seconds + shares[settings.teacher] * facts.forward_seconds
    return _training(spec, per_row * (MINILM_OVERHEAD if "minilm" in settings.methods else 1.0), share, facts)


def _prune(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    # The masked model has the sizes of the one before until the masks are folded in.
    share = shares[spec.stage.settings.model]
    teacher = shares[spec.stage.taught_by] if spec.stage.taught_by else 0.0
    return _training(spec, MASK_OVERHEAD * share * facts.step_seconds + teacher * facts.forward_seconds, share, facts)


def _adapt(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    settings, share = spec.stage.settings, shares[spec.name]
    method = settings.methods["length_adaptive"] or {}
    drop, layer_drop = method.get("length_drop", 0.2), method.get("layer_drop", 0.2)
    layers = range(1, facts.layers + 1)
    smallest = sum((1 - drop) ** layer for layer in layers) / facts.layers
    random = sum((1 - drop / 2) ** layer for layer in layers) / facts.layers * (1 - layer_drop)
    passes = 1 + smallest + method.get("num_sandwich", 2) * random
    teacher = shares[settings.teacher] * facts.forward_seconds if settings.teacher else 0.0
    return _training(spec, passes * share * facts.step_seconds + teacher, share, facts)


def _modular(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    share = shares[spec.name]
    modules = sum(1 / size for size in spec.stage.settings.config().granularities if facts.layers % size == 0)
    per_row = share * ((1 + modules) * facts.step_seconds + facts.forward_seconds)
    return _training(spec, per_row, share, facts)


def _search(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    settings = spec.stage.settings
    rows = min(settings.samples, max(1, facts.rows // 5))
    return settings.trials * rows * facts.forward_seconds * shares[settings.model] * MEAN_COST


def _keep(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    settings = spec.stage.settings
    rows = min(settings.samples, max(1, facts.rows // 5))
    return rows * facts.forward_seconds * (shares[settings.model] + shares[settings.baseline])


def _pick(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    return 1000 * facts.forward_seconds if spec.stage.settings.baseline else 0.0


def _graph(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    return facts.graph_seconds


def _benchmark(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    settings = spec.stage.settings
    evaluated = sum(facts.eval_rows * facts.forward_seconds * shares[name] for name in spec.stage.inputs())
    timed = len(settings.batch_sizes) * len(settings.lengths or [0]) * settings.max_seconds
    return evaluated + timed + PER_MODEL * len(spec.stage.inputs())


def _nothing(spec: StageSpec, shares: Mapping[str, float], facts: Facts) -> float:
    return 0.0


_ESTIMATES: dict[str, Callable[[StageSpec, Mapping[str, float], Facts], float]] = {
    "finetune": _finetune,
    "distill": _distill,
    "prune": _prune,
    "length-adaptive": _adapt,
    "modular": _modular,
    "assemble": _nothing,
    "search": _search,
    "keep": _keep,
    "pick": _pick,
    "export": _graph,
    "quantize": _graph,
    "benchmark": _benchmark,
    "choose": _nothing,
}
