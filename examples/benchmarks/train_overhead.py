"""What distillation adds to a training step.

Times, side by side on the same batches, a step of the stock Trainer on the student, a forward pass of the teacher,
and steps of the FlexCompressTrainer with logits distillation and with MiniLM version 2. The overhead of a method is
its step over the sum of the first two. The teacher has the shape of the 6-layer MiniLM (384 wide, 12 heads), the
student three layers of it; weights are random, which changes no timing.

    python examples/benchmarks/train_overhead.py
    python examples/benchmarks/train_overhead.py --lengths 128 --batch-sizes 8 --rounds 3     # a quick look
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from optimum_flexcompress import DistillationConfig, FlexCompressConfig, FlexCompressTrainer, MiniLMConfig
from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.evaluation.latency import measure_side_by_side
from optimum_flexcompress.methods.distillation import make_student


METHODS = {"logits": DistillationConfig(), "minilm-v2": MiniLMConfig()}
TARGETS = {("logits", 128): 1.1, ("minilm-v2", 128): 1.5}
LABELS = 77
# The 6-layer MiniLM's shape.
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


class Lockstep(TrainerCallback):
    """Runs a trainer in a thread of its own, one optimizer step whenever it is told to.

    So the steps of several trainers interleave, each with all that its real loop does: fetching a batch, clipping,
    the optimizer, logs.
    """

    def __init__(self, trainer: Trainer, threads: int):
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._error: BaseException | None = None
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._run, args=(trainer, threads), daemon=True)

    def __enter__(self) -> Callable[[], None]:
        self._thread.start()
        self._wait()
        return self.step

    def __exit__(self, *exception) -> None:
        self._stopping = True
        self._go.release()
        self._thread.join()

    def step(self) -> None:
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError("A trainer stopped early.") from self._error

    def _run(self, trainer: Trainer, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            trainer.train()
        except BaseException as error:
            self._error = error
        self._done.release()

    def on_train_begin(self, args, state, control, **kwargs):
        self._pause(control)

    def on_step_end(self, args, state, control, **kwargs):
        self._pause(control)

    def _pause(self, control) -> None:
        self._done.release()
        self._go.acquire()
        if self._stopping:
            control.should_training_stop = True


def build_models(length: int) -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    """Teacher and student."""
    torch.manual_seed(0)
    config = BertConfig(**MINILM, max_position_embeddings=max(512, length), num_labels=LABELS)
    teacher = BertForSequenceClassification(config).eval()
    return teacher, make_student(teacher, layers=3)


def build_data(length: int, batch_size: int) -> Dataset:
    """Rows of the full length: padding would only make the relations cheaper."""
    generator = torch.Generator().manual_seed(0)
    rows = 4 * batch_size
    return Dataset.from_dict(
        {
            "input_ids": torch.randint(1000, 30000, (rows, length), generator=generator).tolist(),
            "attention_mask": torch.ones(rows, length, dtype=torch.long).tolist(),
            "labels": torch.randint(LABELS, (rows,), generator=generator).tolist(),
        }
    ).with_format("torch")


def quiet_arguments(folder: str, batch_size: int, cuda: bool, steps: int = 1_000_000) -> TrainingArguments:
    """Arguments of trainings that are only timed."""
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=1e-5,
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        use_cpu=not cuda,
    )


def measure(length: int, batch_size: int, options: argparse.Namespace, folder: str) -> dict:
    """Timings and overheads at one length."""
    teacher, student = build_models(length)
    data = build_data(length, batch_size)
    args = quiet_arguments(folder, batch_size, options.cuda)
    batch = {name: value.to(args.device) for name, value in data[:batch_size].items() if name != "labels"}

    def synchronise() -> None:
        if options.cuda:
            torch.cuda.synchronize()

    @torch.no_grad()
    def teacher_forward() -> None:
        teacher(**batch)
        synchronise()

    def copy_of(model: BertForSequenceClassification) -> BertForSequenceClassification:
        copy = BertForSequenceClassification(model.config)
        copy.load_state_dict(model.state_dict())
        return copy

    trainers = {"student step": Trainer(model=copy_of(student), args=args, train_dataset=data)}
    for name, method in METHODS.items():
        trainers[name] = FlexCompressTrainer(
            model=copy_of(student),
            teacher_model=teacher,
            args=args,
            train_dataset=data,
            compression_config=FlexCompressConfig(methods=[method]),
        )
    for trainer in trainers.values():
        # The steps are timed; what they print is not of interest.
        trainer.callback_handler.callbacks = [
            callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ != "PrinterCallback"
        ]
    with ExitStack() as stack:
        steps = {name: stack.enter_context(Lockstep(trainer, options.threads)) for name, trainer in trainers.items()}

        def timed(step: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                step()
                synchronise()

            return run

        timings = measure_side_by_side(
            {name: timed(step) for name, step in steps.items()} | {"teacher forward": teacher_forward},
            rounds=options.rounds,
            threads=options.threads,
            description=f"{batch_size} x {length}",
        )
    base = torch.tensor([timings[name].seconds for name in ("student step", "teacher forward")]).sum(0)
    overheads = {}
    for name in METHODS:
        # Of each round, whose parts were measured right after each other.
        ratios = torch.tensor(timings[name].seconds) / base
        low, high = ratios.quantile(torch.tensor([0.25, 0.75])).tolist()
        overheads[name] = {
            "median": ratios.median().item(),
            "quartiles": [low, high],
            "target": TARGETS.get((name, length)),
        }
    return {
        "length": length,
        "batch_size": batch_size,
        "overhead": overheads,
        "milliseconds": {name: 1000 * timing.median for name, timing in timings.items()},
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 384])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 8], help="one for each length")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "train_overhead.json", help="JSON to write"
    )
    options = parser.parse_args()
    if len(options.lengths) != len(options.batch_sizes):
        parser.error("give as many --batch-sizes as --lengths")
    environment = environment_info(options.threads)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for length, batch_size in zip(options.lengths, options.batch_sizes):
            result = measure(length, batch_size, options, folder)
            results.append(result)
            print(f"batch {batch_size} x {length} tokens")
            for name, value in result["milliseconds"].items():
                print(f"  {name:<16} {value:8.1f} ms")
            for name, overhead in result["overhead"].items():
                low, high = overhead["quartiles"]
                target = f", target at most {overhead['target']}" if overhead["target"] else ""
                print(f"  {name:<16} {overhead['median']:8.3f} x (quartiles {low:.3f} to {high:.3f}{target})")
    print(describe_environment(environment))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "results": results}, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
