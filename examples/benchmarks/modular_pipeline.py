"""What the benchmarks of Modular Transformers share: one modular training against a training for every size."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cells import Cells, mean_and_spread
from modular_latency import TARGET, TITLE, generation_latency, latency_table
from transformers import PreTrainedModel, Seq2SeqTrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressConfig,
    FlexCompressSeq2SeqTrainer,
    ModularConfig,
    ModularModel,
)
from optimum_flexcompress.configuration import MethodConfig
from optimum_flexcompress.evaluation.assemblies import draw_against_ratio, draw_assemblies
from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.evaluation.formatting import text_table
from optimum_flexcompress.methods.distillation import make_student
from optimum_flexcompress.methods.modular import STRATEGIES, Assembly, Piece
from optimum_flexcompress.structure import count_parameters


PARTS = ("ours", "named", "unfrozen", "baselines", "latency")
RATIOS = (1.1, 1.5, 2.0, 3.0, 4.0, 6.0)
BASELINE_RATIOS = (1.5, 3.0, 6.0)
# What size-first would be with the modules above the layers that are kept; only some ratios keep any.
UPSIDE_DOWN, UPSIDE_DOWN_RATIOS = "modules on top", (1.1, 1.5)
# Another modular training, which is told the ratios of the baselines, as these are made for one each.
NAMED = "size-first, ratios named"
# Another one, of all weights instead of the modules alone, as the baselines train all theirs.
UNFROZEN = "size-first, all weights"
# For each the part that runs it, its cell, and its settings.
TRAININGS = {
    NAMED: ("named", "modular, ratios named", {"ratios": list(BASELINE_RATIOS)}),
    UNFROZEN: ("unfrozen", "modular, all weights", {"freeze_originals": False}),
}
# What is compared with the baselines.
COMPARED = ("size-first", *TRAININGS)
BASELINES = ("truncate", "distil", "theseus")
BUDGETS = ("each", "shared")
# What differs on the test set by chance as easily as that is a tie.
SIGNIFICANT = 0.05
TITLES = {
    "truncate": "fewer layers, fine-tuned",
    "distil": "fewer layers, logits distilled",
    "theseus": "BERT-of-Theseus",
}


@dataclass
class Setting:
    """What all cells of a run share.

    Attributes:
        teacher_steps: Optimizer steps of the full model.
        steps: Optimizer steps of the modular training, and of a baseline with the budget `each`.
        batch_size: Examples in a step.
        teacher_rate: Learning rate of the full model.
        rate: Learning rate of everything after it.
        bf16: Whether forward and backward passes run in bfloat16.
        seed: Of every training after that of the full model, which has the seed 0: with another seed, a work folder may
            start from a copy of `cells/full.json` and `models/full`.
        facts: Sizes of model and data.
    """

    teacher_steps: int
    steps: int
    batch_size: int
    teacher_rate: float
    rate: float
    bf16: bool = False
    seed: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """What is learned.

    Attributes:
        train: Rows with `input_ids` and `labels`.
        collate: Makes a batch of rows.
        make_model: A new full model.
        predict: What a model generates for the test set.
        score: Metrics of that.
        p_value: How likely it is that what two models generate differs as much in the first metric by chance alone.
        metrics: The metrics to show, with their digits; the first one decides.
        lower_is_better: Its direction.
        example: `input_ids` and `attention_mask` of inputs, a batch of which is timed.
        new_tokens: Tokens that are generated then.
    """

    train: Sequence[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    make_model: Callable[[], PreTrainedModel]
    predict: Callable[[PreTrainedModel], list[Any]]
    score: Callable[[list[Any]], dict[str, float]]
    p_value: Callable[[list[Any], list[Any]], float]
    metrics: dict[str, int]
    lower_is_better: bool
    example: dict[str, torch.Tensor]
    new_tokens: int


class Plan:
    """The cells, each of which runs those that it needs first.

    Args:
        cells: Where they are kept.
        task: What is learned.
        setting: What they share.
    """

    def __init__(self, cells: Cells, task: Task, setting: Setting):
        self.cells, self.task, self.setting = cells, task, setting
        # What a saved model generates, by its folder: a size-first assembly is compared with six baselines.
        self._predicted: dict[str, list[Any]] = {}

    # Trainings

    def _train(
        self,
        model: PreTrainedModel,
        folder: Path,
        steps: int,
        rate: float,
        methods: list[MethodConfig] | None = None,
        teacher: PreTrainedModel | None = None,
        seed: int | None = None,
    ) -> float:
        """Trains, from the last checkpoint where there is one, and saves into `folder`; seconds of this call."""
        checkpoints = folder.with_name(f"{folder.name}-checkpoints")
        seed = self.setting.seed if seed is None else seed
        set_seed(seed)
        trainer = FlexCompressSeq2SeqTrainer(
            model=model,
            teacher_model=teacher,
            args=Seq2SeqTrainingArguments(
                output_dir=str(checkpoints),
                max_steps=steps,
                per_device_train_batch_size=self.setting.batch_size,
                learning_rate=rate,
                lr_scheduler_type="linear",
                warmup_steps=min(100, steps // 10),
                group_by_length=True,
                save_steps=max(min(250, steps // 2), 1),
                save_total_limit=1,
                logging_steps=max(min(50, steps // 4), 1),
                report_to="none",
                bf16=self.setting.bf16,
                seed=seed,
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            compression_config=FlexCompressConfig(methods=methods) if methods else None,
            train_dataset=self.task.train,
            data_collator=self.task.collate,
        )
        last = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=last)
        seconds = time.perf_counter() - started
        trainer.save_model(str(folder))
        shutil.rmtree(checkpoints, ignore_errors=True)
        return seconds

    def _finish(self, model: PreTrainedModel, saved: Path | None, **more: Any) -> dict[str, Any]:
        """Saves and scores a model."""
        model = model.eval()
        if saved is not None:
            model.save_pretrained(saved)
        counts = count_parameters(model)
        layers = [len(stack) for stack in _stacks(model)]
        found = {"layers": layers, "parameters": counts["total"], "layer_parameters": counts["prunable"]}
        return {**found, **self.task.score(self.task.predict(model)), **more}

    def _load(self, cell: dict[str, Any]) -> PreTrainedModel:
        return type(self.task.make_model()).from_pretrained(cell["folder"])

    def _answers(self, cell: dict[str, Any]) -> list[Any]:
        folder = cell["folder"]
        if folder not in self._predicted:
            self._predicted[folder] = self.task.predict(self._load(cell))
        return self._predicted[folder]

    def full(self) -> dict[str, Any]:
        folder = self.cells.folder("full")

        def run() -> dict[str, Any]:
            set_seed(0)
            model = self.task.make_model()
            seconds = self._train(model, folder, self.setting.teacher_steps, self.setting.teacher_rate, seed=0)
            return self._finish(model, None, seconds=seconds, folder=str(folder))

        return self.cells.run("full", run, model=True)

    def modular(self, strategy: str) -> dict[str, Any]:
        _, name, settings = TRAININGS.get(strategy, ("ours", "modular", {}))
        folder = self.cells.folder(name)

        def run() -> dict[str, Any]:
            model, config = self._load(self.full()), ModularConfig(**settings)
            seconds = self._train(model, folder, self.setting.steps, self.setting.rate, [config])
            return {"seconds": seconds, "folder": str(folder)}

        return self.cells.run(name, run, model=True)

    def assembled(self, strategy: str, ratio: float, model: bool = False) -> dict[str, Any]:
        """The cell of an assembly; with `model`, the model is there, too."""
        name = f"assembled/{strategy}/{ratio:g}"

        def run() -> dict[str, Any]:
            model = ModularModel.from_pretrained(self.modular(strategy)["folder"])
            assembly = model.choose(strategy if strategy in STRATEGIES else "size-first", ratio)
            if strategy == UPSIDE_DOWN:
                assembly = upside_down(assembly)
            folder = self.cells.folder(name)
            facts = {"folder": str(folder), "assembly": assembly.to_dict(), "ratio": assembly.ratio}
            return self._finish(model.assemble(assembly), folder, **facts)

        return self.cells.run(name, run, model)

    def baseline(self, method: str, ratio: float, budget: str, model: bool = False) -> dict[str, Any] | None:
        """The cell of a baseline; `None` where the method cannot have the ratio. With `model`, the model is there, too."""
        if not possible(method, ratio):
            return None
        # The sizes are those of the size-first assemblies.
        steps = self.setting.steps if budget == "each" else self.setting.steps // len(BASELINE_RATIOS)
        name = f"{method}/{ratio:g}/{budget}"

        def run() -> dict[str, Any]:
            teacher, folder = self._load(self.full()), self.cells.folder(name)
            if method == "theseus":
                return self._theseus(teacher, round(ratio), steps, folder)
            probe = ModularModel(teacher, ModularConfig()).choose("size-first", ratio)
            student = make_student(teacher, layers={key: len(pieces) for key, pieces in probe.stacks.items()})
            methods = [DistillationConfig()] if method == "distil" else None
            teaching = teacher if method == "distil" else None
            seconds = self._train(student, folder, steps, self.setting.rate, methods, teaching)
            return self._finish(student, folder, seconds=seconds, steps=steps, folder=str(folder))

        return self.cells.run(name, run, model)

    def _theseus(self, model: PreTrainedModel, granularity: int, steps: int, folder: Path) -> dict[str, Any]:
        between = folder.with_name(f"{folder.name}-modular")
        config = ModularConfig.theseus(granularity, freeze_originals=False)
        seconds = self._train(model, between, steps, self.setting.rate, [config])
        modular = ModularModel.from_pretrained(between)
        small = modular.assemble(modular.smallest())
        shutil.rmtree(between)
        return self._finish(small, folder, seconds=seconds, steps=steps, folder=str(folder))

    def compared(self, method: str, ratio: float, budget: str, strategy: str = "size-first") -> dict[str, Any] | None:
        """The cell of a baseline beside an assembly; `None` where the method cannot have the ratio."""
        if not possible(method, ratio):
            return None

        def run() -> dict[str, Any]:
            ours = self.assembled(strategy, ratio, model=True)
            theirs = self.baseline(method, ratio, budget, model=True)
            return {"p_value": self.task.p_value(self._answers(ours), self._answers(theirs))}

        return self.cells.run(comparison(method, ratio, budget, strategy), run)

    def folders(self, temporary: Path) -> dict[str, Path]:
        """The full model and all assembled ones, to be timed.

        Where the trained ones are gone, models of the same sizes take their place: how long a fixed number of tokens
        takes does not depend on the weights.
        """
        wanted = {f"{strategy} {ratio:g}": (strategy, ratio) for ratio in RATIOS for strategy in STRATEGIES}
        names = ["full", *(f"assembled/{strategy}/{ratio:g}" for strategy, ratio in wanted.values())]
        if all(self.cells.has_model(name) for name in names):
            return dict(zip(("full", *wanted), (Path(self.cells.get(name)["folder"]) for name in names), strict=True))
        set_seed(self.setting.seed)
        model = self.task.make_model()
        model.save_pretrained(temporary / "full")
        untrained, found = ModularModel(model, ModularConfig()), {"full": temporary / "full"}
        for name, (strategy, ratio) in wanted.items():
            found[name] = temporary / name
            untrained.assemble(untrained.choose(strategy, ratio)).save_pretrained(found[name])
        return found


def upside_down(assembly: Assembly) -> Assembly:
    """The same numbers of layers and modules in each stack, in the opposite order."""
    stacks = {
        name: tuple(
            Piece(piece.granularity, (pieces[-1].stop - piece.stop) // piece.granularity) for piece in reversed(pieces)
        )
        for name, pieces in assembly.stacks.items()
    }
    return Assembly(stacks)


def _stacks(model: PreTrainedModel) -> list[Any]:
    from optimum_flexcompress.architectures import describe

    return [stack.layers for stack in describe(model).stacks.values()]


def orders(ratio: float) -> tuple[str, ...]:
    """The assemblies of a ratio, from the modules that were trained alone."""
    return (*STRATEGIES, *([UPSIDE_DOWN] if ratio in UPSIDE_DOWN_RATIOS else []))


def comparison(method: str, ratio: float, budget: str, strategy: str) -> str:
    """The name of the cell that compares a baseline with an assembly."""
    folder = f"compared {TRAININGS[strategy][0]}" if strategy in TRAININGS else "compared"
    return f"{folder}/{method}/{ratio:g}/{budget}"


def possible(method: str, ratio: float) -> bool:
    """Whether a baseline can have a ratio: Theseus has one granularity for the whole model."""
    return method != "theseus" or ratio == round(ratio)


def add_arguments(parser: argparse.ArgumentParser, name: str, steps: int, teacher_steps: int, rate: float) -> None:
    """The options that the benchmarks share."""
    results = Path(__file__).parent / "results" / f"{name}.json"
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, default=Path("runs") / name)
    parser.add_argument("--steps", type=int, default=steps, help="of the modular training (default: %(default)s)")
    parser.add_argument(
        "--teacher-steps", type=int, default=teacher_steps, help="of the full model (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="rows of a step (default: %(default)s)")
    parser.add_argument("--teacher-rate", type=float, default=rate, help="learning rate (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=rate, help="that of all later steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all trainings but the full model's (default: 0)")
    parser.add_argument("--rows", type=int, help="bound of the rows to train on, to try the script out")
    parser.add_argument("--test-rows", type=int, help="bound of the rows to score on")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--retime", action="store_true", help="measure the latency again")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=results)


def main(name: str, options: argparse.Namespace, task: Task, facts: dict[str, Any]) -> None:
    """Runs the parts that were asked for, and shows all that has been run so far.

    Args:
        name: Name of the script.
        options: What [`add_arguments`] added.
        task: What is learned.
        facts: Sizes of model and data, beside those in the options.
    """
    torch.set_num_threads(options.threads)
    facts = {**facts, "rows": options.rows, "test_rows": options.test_rows}
    names = ("teacher_steps", "steps", "batch_size", "teacher_rate", "rate", "bf16", "seed")
    setting = Setting(**{key: getattr(options, key) for key in names}, facts=facts)
    cells = Cells(options.work, asdict(setting), options.threads, options.output)
    plan = Plan(cells, task, setting)
    print(describe_environment(environment_info(options.threads)))

    def write() -> None:
        cells.write(options.output)
        draw(plan, options.output.parent, name)

    if not options.show:
        run(plan, options.parts, write)
        if "latency" in options.parts:
            if options.retime:
                cells.forget("latency")
            cells.run("latency", lambda: _latency(plan, options.threads))
            write()
    command = without_parts(name, sys.argv[1:])
    header, rows, empty = table(plan, command)
    print(f"\n{name}: {facts}\n{text_table(header, rows)}")
    print("\n".join([*verdicts(plan), *over_seeds(options.output, task.metrics)]))
    latency = cells.get("latency")
    if latency is None:
        empty.append(f"{command} --parts latency")
    else:
        print(f"\nGeneration of {latency['new_tokens']} tokens from inputs of {latency['input']}")
        print(text_table(*latency_table(latency)))
        speedup = latency["runs"][TITLE]["size-first 6"]["speedup"]
        print(f"6x, {TITLE}: {speedup:.2f}x (at least {TARGET} wanted)")
        print("size-first and speed-first 6 have the same sizes: what tells them apart is noise")
    for command in empty:
        print(f"  empty: {command}")


def _latency(plan: Plan, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        return generation_latency(plan.folders(Path(temporary)), plan.task.example, plan.task.new_tokens, threads)


def without_parts(name: str, words: Sequence[str]) -> str:
    """The command of a script without what says which parts to run, so that another part has the same options."""
    kept, left_out = [], False
    for word in words:
        if word.startswith("--"):
            left_out = word in ("--parts", "--retime", "--show")
        if not left_out:
            kept.append(word)
    return shlex.join(["python", f"examples/benchmarks/{name}.py", *kept])


def run(plan: Plan, parts: Sequence[str], write: Callable[[], None]) -> None:
    """Runs the trainings of some parts, those that compare most first."""
    if "ours" in parts:
        for ratio in RATIOS:
            for strategy in orders(ratio):
                plan.assembled(strategy, ratio)
            compare(plan, ratio)
            write()
    for strategy in [name for name, (part, *_) in TRAININGS.items() if part in parts]:
        for ratio in RATIOS:
            plan.assembled(strategy, ratio)
            compare(plan, ratio)
            write()
    if "baselines" in parts:
        for budget in reversed(BUDGETS):
            for ratio in BASELINE_RATIOS:
                for method in BASELINES:
                    plan.baseline(method, ratio, budget)
                    compare(plan, ratio)
                    write()


def compare(plan: Plan, ratio: float) -> None:
    """Compares the baselines of a ratio with its assemblies, where the models of both are there."""
    for method, budget, strategy in product(BASELINES, BUDGETS, COMPARED):
        names = (f"assembled/{strategy}/{ratio:g}", f"{method}/{ratio:g}/{budget}")
        if all(plan.cells.has_model(name) for name in names):
            plan.compared(method, ratio, budget, strategy)


def table(plan: Plan, command: str) -> tuple[list[str], list[list[str]], list[str]]:
    """The comparison as far as it has been run.

    Returns:
        Header, rows, and the commands of the empty cells.
    """
    metrics = plan.task.metrics
    header = ["ratio", "model", "steps", "layers", "parameters M", *metrics]
    rows, empty = [], []

    def add(ratio: str, title: str, steps: int, cell: dict[str, Any] | None, part: str) -> None:
        if cell is None:
            empty.append(f"{command} --parts {part}")
            rows.append([ratio, title, str(steps), *([""] * (len(header) - 3))])
            return
        sizes = ["+".join(map(str, cell["layers"])), f"{cell['parameters'] / 1e6:.2f}"]
        rows.append(
            [ratio, title, str(steps), *sizes, *(f"{cell[name]:.{digits}f}" for name, digits in metrics.items())]
        )

    add("1", "full model", plan.setting.teacher_steps, plan.cells.get("full"), "ours")
    for ratio in RATIOS:
        for strategy in orders(ratio):
            cell = plan.cells.get(f"assembled/{strategy}/{ratio:g}")
            add(f"{ratio:g}", f"modular, {strategy}", plan.setting.steps, cell, "ours")
        for strategy, (part, *_) in TRAININGS.items():
            cell = plan.cells.get(f"assembled/{strategy}/{ratio:g}")
            add(f"{ratio:g}", f"modular, {strategy}", plan.setting.steps, cell, part)
        for method in BASELINES if ratio in BASELINE_RATIOS else ():
            for budget in BUDGETS if possible(method, ratio) else ():
                steps = plan.setting.steps if budget == "each" else plan.setting.steps // len(BASELINE_RATIOS)
                add(f"{ratio:g}", TITLES[method], steps, plan.cells.get(f"{method}/{ratio:g}/{budget}"), "baselines")
    return header, rows, list(dict.fromkeys(empty))


def verdicts(plan: Plan) -> list[str]:
    """How the size-first assemblies stand against the best baseline of each budget."""
    found = [
        verdict(plan, ratio, budget, strategy)
        for strategy in COMPARED
        for ratio in BASELINE_RATIOS
        for budget in BUDGETS
    ]
    return [line for line in found if line is not None]


def verdict(plan: Plan, ratio: float, budget: str, strategy: str) -> str | None:
    """How an assembly stands against the best baseline; `None` where one of them is missing."""
    ours = plan.cells.get(f"assembled/{strategy}/{ratio:g}")
    cells = {
        method: cell for method in BASELINES if (cell := plan.cells.get(f"{method}/{ratio:g}/{budget}")) is not None
    }
    if ours is None or not cells:
        return None
    name = next(iter(plan.task.metrics))
    sign = -1 if plan.task.lower_is_better else 1
    best = max(cells, key=lambda method: sign * cells[method][name])
    change = sign * (ours[name] - cells[best][name])
    against = plan.cells.get(comparison(best, ratio, budget, strategy))
    chance = f", p = {against['p_value']:.3f}" if against else ""
    if change == 0 or (against and against["p_value"] >= SIGNIFICANT):
        word = "ties"
    else:
        word = "wins" if change > 0 else "loses"
    return (
        f"{ratio:g}x, steps {budget}: modular, {strategy}, {word}, {name} {ours[name]:.2f} against "
        f"{cells[best][name]:.2f} of {TITLES[best]}{chance}"
    )


def over_seeds(output: Path, metrics: dict[str, int]) -> list[str]:
    """Mean and standard deviation of the cells that files of other seeds have too, named `<results>_seed<N>.json`."""
    files = [output, *sorted(output.parent.glob(f"{output.stem}_seed*.json"))]
    if len(files) < 2:
        return []
    runs = [json.loads(file.read_text(encoding="utf-8"))["cells"] for file in files]
    found = [f"Over {len(files)} seeds:"]
    for name in runs[0]:
        same = [run[name] for run in runs if name in run and metrics.keys() <= run[name].keys()]
        # The full model is the same one.
        if len(same) == len(runs) and name != "full":
            shown = [f"{m} {mean_and_spread([cell[m] for cell in same], digits)}" for m, digits in metrics.items()]
            found.append(f"  {name}: {', '.join(shown)}")
    return found


def draw(plan: Plan, folder: Path, name: str) -> None:
    """Pictures of what has been run: what assemblies use, and metric and latency against the ratio."""
    cells, latency = plan.cells, plan.cells.get("latency")
    full = cells.get("full")
    assembled = {(s, r): cell for s in STRATEGIES for r in RATIOS if (cell := cells.get(f"assembled/{s}/{r:g}"))}
    if full is None or not assembled:
        return
    folder.mkdir(parents=True, exist_ok=True)
    plans = {f"{strategy} {ratio:g}x": cell["assembly"] for (strategy, ratio), cell in assembled.items()}
    draw_assemblies(plans, folder / f"{name}_assemblies.png")
    metric = next(iter(plan.task.metrics))
    lines: dict[str, list[tuple[float, float]]] = {}
    for (strategy, ratio), cell in assembled.items():
        lines.setdefault(f"modular, {strategy}", [(1.0, full[metric])]).append((ratio, cell[metric]))
    for strategy, ratio in product(TRAININGS, RATIOS):
        if cell := cells.get(f"assembled/{strategy}/{ratio:g}"):
            lines.setdefault(f"modular, {strategy}", []).append((ratio, cell[metric]))
    for method in BASELINES:
        for ratio in BASELINE_RATIOS:
            if cell := cells.get(f"{method}/{ratio:g}/shared"):
                lines.setdefault(f"{TITLES[method]}, shared steps", []).append((ratio, cell[metric]))
    panels = {metric: lines}
    for title, run_of in latency["runs"].items() if latency else ():
        if title.endswith("greedy, batch 32"):
            panels[f"milliseconds, {title}"] = {
                f"modular, {s}": [
                    (1.0, run_of["full"]["milliseconds"]),
                    *((r, run_of[f"{s} {r:g}"]["milliseconds"]) for r in RATIOS),
                ]
                for s in STRATEGIES
            }
    draw_against_ratio(panels, folder / f"{name}_ratios.png")
