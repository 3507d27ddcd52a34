"""The models that `int8_backends.py` compares, and how each of its backends makes and opens them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from staged import train
from transformers import BertConfig, BertForSequenceClassification

from optimum_flexcompress import FlexCompressConfig, LengthAdaptiveConfig, VIBPruningConfig, set_lengths
from optimum_flexcompress.data import take
from optimum_flexcompress.evaluation import count_macs, count_parameters, file_size
from optimum_flexcompress.evaluation.artifact import Artifact, model_artifact
from optimum_flexcompress.evaluation.inputs import example_batch
from optimum_flexcompress.output import atomic_folder
from optimum_flexcompress.quantization.backends import BACKENDS
from optimum_flexcompress.quantization.calibration_data import calibration_examples
from optimum_flexcompress.search import hold_out, search_lengths
from optimum_flexcompress.search.front import Point
from optimum_flexcompress.tasks import get_task
from optimum_flexcompress.token_dropping import lengths_of


TASK = get_task("text-classification")
# Of training; SST-2 has sentences of up to 66 tokens, phrases and all.
MAX_LENGTH, SEED = 128, 42
# As QuaLA-MiniLM keeps 315, 251, 242, 159, 142 and 33 of 384 tokens.
LENGTHS = (0.82, 0.65, 0.63, 0.41, 0.37, 0.09)
# One model, at the lengths above and at those that a search picks for it.
ADAPTIVE = ("length-adaptive", "searched lengths")
VARIANTS = ("dense", "pruned", *ADAPTIVE)
SPARSITY, MASK_STEPS = 0.5, 150
# Of the search: sentences, and the share of the multiply-accumulates at which their loss is to be least.
HELD_OUT, TRIALS, MAX_COST = 1000, 60, 0.4
FP32, STOCK = "PyTorch fp32", "OpenVINO int8 of the stock export"
BASE = "BERT-base, PyTorch fp32, SDPA, random weights"


@dataclass(frozen=True)
class Way:
    """A way to int8.

    Attributes:
        title: In the tables.
        backend: As `--backend` names it.
        mode: As `--mode` names it.
        lane: The environment that makes and runs it.
    """

    title: str
    backend: str
    mode: str
    lane: str = "main"


WAYS = tuple(
    way
    for way in (
        Way("ONNX Runtime int8, dynamic", "ort", "dynamic"),
        Way("ONNX Runtime int8, static", "ort", "static"),
        Way("OpenVINO int8", "openvino", "static"),
        Way("IPEX int8, static", "ipex", "static", "ipex"),
        Way("IPEX int8, dynamic", "ipex", "dynamic", "ipex"),
    )
    if way.backend in BACKENDS
)


@dataclass
class Maker:
    """Makes models and artifacts below a work folder; what is there is not made again.

    Attributes:
        work: The folder.
        sst2: The data set.
        source: The encoder to start from.
        model: An encoder fine-tuned on SST-2 already, or `None`.
        rows: Bound of the training rows, or `None`.
        steps: Bound of the steps of every training, to try the script out.
        bf16: Whether to train in bfloat16.
        interpreters: Lane -> interpreter.
    """

    work: Path
    sst2: Path
    source: str
    model: str | None
    rows: int | None
    steps: int | None
    bf16: bool
    interpreters: Mapping[str, str]

    def folder(self, variant: str) -> Path:
        """Of a model in single precision."""
        return Path(self.model) if variant == "dense" and self.model else self.work / "models" / variant

    def artifact(self, variant: str, way: Way) -> Path:
        """Of an int8 model."""
        return self.work / "int8" / f"{variant}-{way.backend}-{way.mode}"

    @property
    def stock(self) -> Path:
        """Of the dense model as others export and quantize it."""
        return self.work / "int8" / "dense-stock-openvino"

    def data(self, splits: DatasetDict) -> tuple[DatasetDict, Dataset]:
        """The rows to train and to report on, and rows to search on that no training sees."""
        rows = None if self.rows is None else self.rows + HELD_OUT
        train, held_out = hold_out(take(splits["train"], rows, SEED), HELD_OUT, SEED)
        return DatasetDict(train=train, validation=splits["validation"]), held_out

    # -- Models ---------------------------------------------------------------------------------------------------

    def make_model(self, variant: str, splits: DatasetDict) -> dict[str, Any]:
        """Trains a variant, and describes it."""
        (data, held_out), started = self.data(splits), time.perf_counter()
        if variant == "dense" and not self.model:
            self._train("dense", self.source, data, num_train_epochs=2, learning_rate=5e-5)
        elif variant == "pruned":
            # Masks alone, with frozen weights: minutes, and no fine-tuning afterwards.
            # Masks that have fewer steps than this cannot settle.
            steps = MASK_STEPS if self.steps is None else max(self.steps, 40)
            config = VIBPruningConfig(
                target_sparsity=SPARSITY,
                mode="faster",
                mask_learning_rate=max(0.1, 15 / steps),
                warmup_fraction=0.0,
                ramp_fraction=0.6,
                hold_fraction=0.4,
                data_fraction=0.1 if self.steps is None else 1.0,
            )
            self._train("pruned", self.folder("dense"), data, config, max_steps=steps, learning_rate=1e-4)
        elif variant in ADAPTIVE:
            # Fractions of each sentence: counts that suit 384 tokens would drop nothing of sentences this short.
            config = LengthAdaptiveConfig(num_sandwich=1, unit="fractions", length_drop=0.3, layer_drop=0.0)
            self._train("adapted", self.folder("dense"), data, config, num_train_epochs=1, learning_rate=3e-5)
            lengths = list(LENGTHS) if variant == "length-adaptive" else self._search(held_out).lengths
            adapted = self.folder("adapted")
            model = set_lengths(TASK.load_model(adapted), lengths)
            with atomic_folder(self.folder(variant), overwrite=True) as folder:
                model.save_pretrained(folder)
                TASK.load_processor(adapted).save_pretrained(folder)
        model = TASK.load_model(self.folder(variant))
        macs = {str(length): count_macs(model, example_batch(model.config, TASK, 1, length)) for length in (128, 384)}
        lengths = lengths_of(model)
        return {
            "seconds": time.perf_counter() - started,
            "lengths": None if lengths is None else list(lengths.values),
            "parameters": count_parameters(model),
            "bytes": file_size(self.folder(variant)),
            "macs": macs,
        }

    def _search(self, held_out: Dataset) -> Point:
        """The lengths of the least loss at a share of the multiply-accumulates."""
        few = {} if self.steps is None else {"trials": 8, "population": 4}
        front = search_lengths(
            self.folder("adapted"),
            DatasetDict(validation=held_out),
            TASK,
            self.work / "search",
            metric="loss",
            max_cost=MAX_COST,
            samples=None,
            max_length=MAX_LENGTH,
            seed=SEED,
            say=print,
            **{"trials": TRIALS, "population": 12, **few},
        )
        return front.picked

    def _train(self, name: str, start: str | Path, data: DatasetDict, config: Any = None, **arguments: Any) -> None:
        if self.steps is not None:
            arguments = {"max_steps": self.steps, **arguments}
        methods = None if config is None else FlexCompressConfig(methods=[config])
        folder = self.work / "models" / name
        train(folder, start, TASK, data, max_length=MAX_LENGTH, seed=SEED, config=methods, bf16=self.bf16, **arguments)

    # -- Int8 -----------------------------------------------------------------------------------------------------

    def make_artifact(self, variant: str, way: Way, samples: int) -> dict[str, Any]:
        """Quantizes a variant, in the environment of the backend."""
        output, started = self.artifact(variant, way), time.perf_counter()
        if way.lane in self.interpreters:
            command = [
                *(self.interpreters[way.lane], "-c", "from optimum.commands.optimum_cli import main; main()"),
                *("flexcompress", "quantize", "-m", str(self.folder(variant)), "-o", str(output), "--overwrite"),
                *("--backend", way.backend, "--mode", way.mode),
            ]
            if way.mode == "static":
                command += ["--dataset", str(self.sst2), "--samples", str(samples)]
            subprocess.run(command, check=True)
        else:
            backend = BACKENDS[way.backend]
            target = backend.find_target("auto", way.mode).name
            examples = self._examples(samples) if way.mode == "static" else None
            backend.quantize(
                self.folder(variant), output, way.mode, target, calibration_dataset=examples, overwrite=True
            )
        return {"seconds": time.perf_counter() - started, "bytes": file_size(output)}

    def _examples(self, samples: int) -> Any:
        return calibration_examples(self.folder("dense"), self.sst2, TASK.name, samples=samples, split="train")

    def make_stock(self, samples: int) -> dict[str, Any]:
        """What one would do without this package: Optimum's export, NNCF with its preset for transformers."""
        import nncf
        import openvino
        from optimum.exporters.onnx import main_export

        started = time.perf_counter()
        with atomic_folder(self.stock, overwrite=True) as folder:
            main_export(str(self.folder("dense")), folder / "onnx", task=TASK.name, do_validation=False)
            model = openvino.Core().read_model(folder / "onnx" / "model.onnx")
            names = [name for port in model.inputs for name in port.get_names()]
            examples = [
                {name: np.asarray([row[name]]) if name in row else np.zeros((1, len(row["input_ids"])), np.int64)
                 for name in names}
                for row in self._examples(samples)
            ]  # fmt: skip
            quantized = nncf.quantize(
                model,
                nncf.Dataset(examples),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(examples),
            )
            openvino.save_model(quantized, folder / "openvino_model.xml", compress_to_fp16=False)
        return {
            "seconds": time.perf_counter() - started,
            "bytes": (self.stock / "openvino_model.bin").stat().st_size,
        }

    def open_stock(self, threads: int) -> Artifact:
        """The dense model as others export and quantize it."""
        config = TASK.load_model(self.folder("dense")).config
        model = StockOpenVINO(self.stock / "openvino_model.xml", threads)
        return Artifact(self.stock, TASK, "openvino", "int8", model, config, frozenset(model.names))


class StockOpenVINO:
    """A compiled model that takes and gives tensors.

    Args:
        file: The IR.
        threads: Threads.
    """

    device = torch.device("cpu")

    def __init__(self, file: Path, threads: int):
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._model = openvino.Core().compile_model(file, "CPU", settings)
        self.names = [port.get_any_name() for port in self._model.inputs]

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
        (logits,) = self._model(arrays).values()
        return {"logits": torch.from_numpy(logits)}


def bert_base() -> Artifact:
    """BERT-base with random weights, which change no timing."""
    torch.manual_seed(0)
    return model_artifact(BertForSequenceClassification(BertConfig(attn_implementation="sdpa")).eval(), TASK, BASE)


def versions_of(path: Path) -> dict[str, str]:
    """What made an artifact, where it says so."""
    record = path / "flexcompress_backend.json"
    return json.loads(record.read_text(encoding="utf-8"))["versions"] if record.is_file() else {}
