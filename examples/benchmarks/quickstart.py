"""Runs `make quickstart` and keeps the raw figures of its report, which the README quotes.

python examples/benchmarks/quickstart.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path


ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "quickstart.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="where the quick start writes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    # Stages that an earlier run finished are skipped.
    subprocess.run(["make", "quickstart", f"OUT={options.run}"], cwd=ROOT, check=True)
    report = json.loads((ROOT / options.run / "benchmark" / "report.json").read_text(encoding="utf-8"))
    for model in report["models"]:
        model["path"] = Path(model["path"]).name
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
