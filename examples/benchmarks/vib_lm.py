"""VIB pruning of language models against magnitude pruning: perplexity at 30 and 50 % sparsity of the layers.

Two models: a GPT-2 of six layers that is trained here on WikiText-2, and stories260K, a pretrained LLaMA with grouped
queries. The text for the latter is made up by the model itself, and so is the text that it is measured on, which is
another sample. One run of masks serves both sizes; magnitude pruning removes at once the heads and FFN dims with the
smallest weights. Both have the same teacher, distillation losses, optimizer, learning rate and number of steps, those
with masks included, and leave the same share of the layers' parameters, within 1 %.

    python examples/benchmarks/vib_lm.py --wikitext DIR --gpt2-tokenizer DIR --llama DIR
    python examples/benchmarks/vib_lm.py --models llama --method vib --seed 0 ...
    python examples/benchmarks/vib_lm.py --show                                    # the table as far as it is

`--wikitext` holds `train.txt.xz`, `valid.txt.xz` and `test.txt.xz`; `--gpt2-tokenizer` `vocab.json` and `merges.txt`;
`--llama` `stories260K.bin` and `tok512.bin`, as published with llama2.c.

Minutes on two quiet cores with AVX512-BF16: training GPT-2 9; its masks 3, fine-tuning after them 3 for each size,
magnitude 4 for each size; stories 1, its masks 2, every other cell of it 1.5. In all about 35.
Every cell leaves a file in the work folder; what was run is not run again.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cells import Cells, mean_and_spread
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments, default_data_collator, set_seed
from vib_lm_models import (
    BLOCK,
    STORY_LENGTH,
    blocks,
    gpt2_tokenizer,
    load_llama2c,
    magnitude_prune,
    perplexity,
    read_pieces,
    small_gpt2,
    stories,
    wikitext,
)

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressConfig,
    FlexCompressTrainer,
    ModelStructure,
    VIBPruningConfig,
)
from optimum_flexcompress.configuration import MethodConfig
from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
from optimum_flexcompress.evaluation.formatting import text_table
from optimum_flexcompress.methods.vib.schedule import Schedule
from optimum_flexcompress.structure import count_parameters


RESULTS = Path(__file__).parent / "results" / "vib_lm.json"
MODELS = {"gpt2": "GPT-2, 6 layers, WikiText-2", "llama": "stories260K, its own stories"}
METHODS = {"vib": "VIB pruning", "magnitude": "magnitude"}
LEVELS = (0.3, 0.5)
ALIGN = {"gpt2": 8, "llama": 4}
RATE = {"gpt2": 5e-4, "llama": 1e-3}
STEPS = {"gpt2": 600, "llama": 800}
BATCH = {"gpt2": 16, "llama": 16}
TRAIN_STEPS, TRAIN_RATE = 1800, 1e-3
MASK_SHARE = 0.5
STORIES = 4096


def distillation() -> DistillationConfig:
    """The losses that both methods share."""
    return DistillationConfig(temperature=2.0, hidden_states_weight=1.0, layer_map="ordered")


class Bench:
    """Trains and measures one of the models.

    Args:
        name: `gpt2` or `llama`.
        options: The command line.
        cells: Where the cells are kept.
    """

    def __init__(self, name: str, options: argparse.Namespace, cells: Cells):
        self.name = name
        self.options = options
        self.cells = cells
        self.steps = options.steps or STEPS[name]
        self.mask_steps = round(MASK_SHARE * self.steps)

    @cached_property
    def text(self) -> dict[str, Any]:
        """`train` and `test`, in blocks."""
        limit = self.options.rows
        if self.name == "gpt2":
            tokenizer = gpt2_tokenizer(self.options.gpt2_tokenizer)
            return {
                split: blocks(wikitext(self.options.wikitext, tokenizer, split, limit), BLOCK)
                for split in ("train", "test")
            }
        count = limit or STORIES
        model = load_llama2c(self.options.llama / "stories260K.bin")
        made_up = {"train": stories(model, count, 0), "test": stories(model, max(count // 8, 8), 1)}
        pieces = read_pieces(self.options.llama / "tok512.bin")
        sample = "".join(pieces[index] for index in made_up["test"][1:60].tolist())
        print(f"stories260K: {sample.strip()} ...", flush=True)
        return {split: blocks(tokens, STORY_LENGTH) for split, tokens in made_up.items()}

    def train(
        self,
        model: PreTrainedModel,
        folder: Path,
        steps: int,
        rate: float,
        seed: int,
        methods: list[MethodConfig] | None = None,
        teacher: PreTrainedModel | None = None,
        schedule: str = "linear",
    ) -> FlexCompressTrainer:
        set_seed(seed)
        trainer = FlexCompressTrainer(
            model=model,
            teacher_model=teacher,
            args=TrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=BATCH[self.name],
                max_steps=steps,
                learning_rate=rate,
                lr_scheduler_type=schedule,
                warmup_steps=min(50, steps // 10),
                weight_decay=0.01,
                # Too small a model to gain from it.
                bf16=self.options.bf16 and self.name == "gpt2",
                save_strategy="no",
                logging_steps=50,
                report_to="none",
                seed=seed,
                use_cpu=not torch.cuda.is_available(),
            ),
            compression_config=FlexCompressConfig(methods=methods) if methods else None,
            train_dataset=self.text["train"],
            data_collator=default_data_collator,
        )
        trainer.train()
        return trainer

    # Cells

    def dense(self) -> dict[str, Any]:
        folder = self.cells.folder(f"{self.name}/dense")

        def run() -> dict[str, Any]:
            started = time.perf_counter()
            if self.name == "llama":
                load_llama2c(self.options.llama / "stories260K.bin").save_pretrained(folder)
            else:
                steps = TRAIN_STEPS if self.options.steps is None else self.steps
                trainer = self.train(small_gpt2(), folder, steps, TRAIN_RATE, 0, schedule="cosine")
                trainer.save_model(str(folder))
            return {"seconds": time.perf_counter() - started, "folder": str(folder), **self.measure(folder)}

        return self.cells.run(f"{self.name}/dense", run, model=True)

    def masks(self, seed: int) -> dict[str, Any]:
        teacher = self.dense()["folder"]
        name = f"{self.name}/masks/seed{seed}"
        folder = self.cells.folder(name)

        def run() -> dict[str, Any]:
            config = VIBPruningConfig(
                target_sparsity=LEVELS[-1],
                save_at_sparsities=list(LEVELS),
                align=ALIGN[self.name],
                warmup_fraction=0.05,
                ramp_fraction=0.65,
                hold_fraction=0.3,
                mask_learning_rate=max(0.05, 15 / self.mask_steps),
            )
            halts = Schedule.of(config, LEVELS[-1], list(LEVELS[:-1]), self.mask_steps).halts
            shutil.rmtree(folder, ignore_errors=True)
            started = time.perf_counter()
            trainer = self.train(
                AutoModelForCausalLM.from_pretrained(teacher),
                folder,
                self.mask_steps,
                RATE[self.name],
                seed,
                [config, distillation()],
                AutoModelForCausalLM.from_pretrained(teacher),
                "constant_with_warmup",
            )
            return {
                "seconds": time.perf_counter() - started,
                "steps": {f"{halt.sparsity:g}": halt.stop for halt in halts},
                "log": trainer.state.log_history,
                "folder": str(folder),
            }

        return self.cells.run(name, run, model=True)

    def compressed(self, method: str, level: float, seed: int) -> dict[str, Any]:
        name = f"{self.name}/{method}/{level:g}/seed{seed}"
        if self.cells.get(name) is None:
            # Their minutes are cells of their own.
            teacher = self.dense()["folder"]
            masks = self.masks(seed) if method == "vib" else {}

        def run() -> dict[str, Any]:
            started = time.perf_counter()
            steps, before = self.steps, 0.0
            if method == "vib":
                used = masks["steps"][f"{level:g}"]
                steps, before = self.steps - used, masks["seconds"] * used / self.mask_steps
                model = AutoModelForCausalLM.from_pretrained(Path(masks["folder"]) / f"sparsity-{level:g}")
            else:
                model = magnitude_prune(AutoModelForCausalLM.from_pretrained(teacher), level, ALIGN[self.name])
            at_once = perplexity(model, self.text["test"])
            folder = self.cells.folder(name)
            trainer = self.train(
                model,
                folder,
                steps,
                RATE[self.name],
                seed,
                [distillation()],
                AutoModelForCausalLM.from_pretrained(teacher),
            )
            trainer.save_model(str(folder))
            seconds = time.perf_counter() - started + before
            return {"seconds": seconds, "before_fine_tuning": at_once, **self.measure(folder)}

        return self.cells.run(name, run)

    def measure(self, folder: Path) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        counts = count_parameters(model)
        return {
            "perplexity": perplexity(model, self.text["test"]),
            "parameters": counts["total"],
            "layer_parameters": counts["prunable"],
            "structure": ModelStructure.of(model).to_dict(),
        }


def show(cells: Cells, seeds: list[int]) -> None:
    """The table as far as it is."""
    header = ["model", "method", "sparsity", "seeds", "perplexity", "before fine-tuning", "parameters k", "minutes"]
    rows, missing = [], []
    for name, title in MODELS.items():
        dense = cells.get(f"{name}/dense")
        if dense is not None:
            minutes = "" if name == "llama" else f"{dense['seconds'] / 60:.1f}"
            rows.append([title, "dense", "", "", f"{dense['perplexity']:.2f}", "", _thousands([dense]), minutes])
        for level in LEVELS:
            for method, called in METHODS.items():
                found = {seed: cells.get(f"{name}/{method}/{level:g}/seed{seed}") for seed in seeds}
                missing += [(name, method, level, seed) for seed, cell in found.items() if cell is None]
                done = [cell for cell in found.values() if cell is not None]
                if not done:
                    rows.append([title, called, f"{level:.0%}", "0", "", "", "", ""])
                    continue
                sparsity = 1 - done[0]["layer_parameters"] / dense["layer_parameters"]
                rows.append(
                    [
                        title,
                        called,
                        f"{sparsity:.1%}",
                        str(len(done)),
                        mean_and_spread([cell["perplexity"] for cell in done], 2),
                        mean_and_spread([cell["before_fine_tuning"] for cell in done], 1),
                        _thousands(done),
                        mean_and_spread([cell["seconds"] for cell in done], 1, 1 / 60),
                    ]
                )
    print(f"\n{text_table(header, rows)}")
    for name, method, level, seed in missing:
        print(
            f"  empty: python examples/benchmarks/vib_lm.py --models {name} --method {method} --sparsity {level:g} "
            f"--seed {seed} ..."
        )


def _thousands(cells: list[dict[str, Any]]) -> str:
    return f"{sum(cell['parameters'] for cell in cells) / len(cells) / 1e3:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sparsity", nargs="+", type=float, choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--wikitext", type=Path, help="folder of WikiText-2")
    parser.add_argument("--gpt2-tokenizer", type=Path, help="folder of GPT-2's tokenizer")
    parser.add_argument("--llama", type=Path, help="folder of stories260K")
    parser.add_argument("--work", type=Path, default=Path("runs/vib_lm"))
    parser.add_argument("--steps", type=int, help="of a compression, mask steps included; 600 and 800 by default")
    parser.add_argument("--rows", type=int, help="lines of text, and stories, to try the script out")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="GPT-2 in bfloat16")
    parser.add_argument("--threads", type=int, default=environment_info()["usable_cores"])
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    cells = Cells(
        options.work,
        {key: getattr(options, key) for key in ("steps", "rows", "bf16")},
        options.threads,
        options.output,
    )
    print(describe_environment(environment_info(options.threads)))
    needed = {"gpt2": ("wikitext", "gpt2_tokenizer"), "llama": ("llama",)}
    for name in options.models * (not options.show):
        for folder in needed[name]:
            if getattr(options, folder) is None:
                parser.error(f"{name} needs --{folder.replace('_', '-')}")
        bench = Bench(name, options, cells)
        for seed in options.seed:
            for level in options.sparsity:
                for method in options.method:
                    bench.compressed(method, level, seed)
                    cells.write(options.output)
    show(cells, options.seed)


if __name__ == "__main__":
    main()
