"""What a step of length-adaptive training costs, in time and in memory, against a plain step.

Times, side by side on the same batches, a step of the stock Trainer and steps of the FlexCompressTrainer with
`LengthAdaptiveConfig` (the full model, the smallest sub-model and random ones), on a BERT of the shape of the 6-layer
MiniLM (384 wide, 12 heads) with random weights, which changes no timing. Peak memory is that of a fresh process which
trains three steps, less what the libraries take.

    python examples/benchmarks/length_step.py
    python examples/benchmarks/length_step.py --shapes 8x128 --rounds 3        # a quick look
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import psutil
import torch
from staged import write_json
from train_overhead import Lockstep, build_data, build_models, quiet_arguments
from transformers import Trainer

from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer, LengthAdaptiveConfig
from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.evaluation.latency import measure_side_by_side


RESULTS = Path(__file__).parent / "results" / "length_step.json"
PLAIN = "plain step"
METHODS = {
    "2 random sub-models": LengthAdaptiveConfig(num_sandwich=2),
    "1 random sub-model": LengthAdaptiveConfig(num_sandwich=1),
}
TARGETED, TIME_TARGET, MEMORY_TARGET = "2 random sub-models", 3.6, 1.15


def trainer_of(name: str, batch_size: int, length: int, folder: str, cuda: bool, steps: int = 1_000_000) -> Trainer:
    model, _ = build_models(length)
    args = quiet_arguments(folder, batch_size, cuda, steps)
    data = build_data(length, batch_size)
    if name == PLAIN:
        return Trainer(model=model, args=args, train_dataset=data)
    config = FlexCompressConfig(methods=[METHODS[name]])
    return FlexCompressTrainer(model=model, args=args, train_dataset=data, compression_config=config)


def peak_memory(name: str, batch_size: int, length: int, options: argparse.Namespace) -> float:
    """Megabytes, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, "--shapes", f"{batch_size}x{length}"]
    command += ["--threads", str(options.threads)] + (["--cuda"] if options.cuda else [])
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def train_and_tell(name: str, batch_size: int, length: int, options: argparse.Namespace) -> None:
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(name, batch_size, length, folder, options.cuda, steps=3).train()
    peak = torch.cuda.max_memory_allocated() if options.cuda else 1024 * resource.getrusage(0).ru_maxrss - before
    print(json.dumps(peak / 2**20))


def measure(batch_size: int, length: int, options: argparse.Namespace) -> dict:
    names = [PLAIN, *METHODS]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainers = {name: trainer_of(name, batch_size, length, folder, options.cuda) for name in names}
        steps = {name: stack.enter_context(Lockstep(trainers[name], options.threads)) for name in names}

        def timed(step):
            def run() -> None:
                step()
                if options.cuda:
                    torch.cuda.synchronize()

            return run

        timings = measure_side_by_side(
            {name: timed(step) for name, step in steps.items()},
            rounds=options.rounds,
            threads=options.threads,
            description=f"{batch_size} x {length}",
        )
    memory = {name: median(peak_memory(name, batch_size, length, options) for _ in range(3)) for name in names}
    plain = torch.tensor(timings[PLAIN].seconds)
    # Of each round, whose parts were measured right after each other.
    ratios = {name: (torch.tensor(timings[name].seconds) / plain).median().item() for name in METHODS}
    return {
        "batch_size": batch_size,
        "length": length,
        "time_over_plain": ratios,
        "memory_over_plain": {name: memory[name] / memory[PLAIN] for name in METHODS},
        "peak_megabytes": memory,
        "milliseconds": {name: 1000 * timing.median for name, timing in timings.items()},
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32x128", "8x384"], help="batch x length")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    parser.add_argument("--peak", choices=[PLAIN, *METHODS], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    if options.peak:
        train_and_tell(options.peak, *shapes[0], options)
        return
    environment = environment_info(options.threads)
    print(describe_environment(environment))
    report = {"environment": environment, "targets": {"time": TIME_TARGET, "memory": MEMORY_TARGET}, "results": []}
    for batch_size, length in shapes:
        result = measure(batch_size, length, options)
        report["results"].append(result)
        write_json(options.output, report)
        print(f"batch {batch_size} x {length} tokens: plain step {result['milliseconds'][PLAIN]:.0f} ms")
        for name in METHODS:
            time, memory = result["time_over_plain"][name], result["memory_over_plain"][name]
            print(f"  {name:<20} {time:.2f} x the time, {memory:.2f} x the memory")
    print(f"Targets with {TARGETED}: at most {TIME_TARGET} and {MEMORY_TARGET}. Wrote {options.output}")


if __name__ == "__main__":
    main()
