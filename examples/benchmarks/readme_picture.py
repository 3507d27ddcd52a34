"""The picture of the README: how much faster models got, and what of their metric they kept.

Drawn from the results beside this script. Every line starts at a fine-tuned model in
PyTorch in single precision; speeds are for a batch of 32, side by side in one run of each benchmark.

    python examples/benchmarks/readme_picture.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from length_pipeline import DENSE, DENSE_FP32, PRUNED
from staged import ratio, read_json


matplotlib.use("Agg")
RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[2] / "docs" / "source" / "images" / "speed.png"
STACKED = {
    "full_stack": (
        "IMDB, 256 tokens",
        "accuracy",
        "32x256",
        {
            "int8": DENSE,
            "pruned": PRUNED,
            "tokens dropped": "stacked, best at 0.7 of the pruned model's MACs, int8",
        },
    ),
    "quala_squad": (
        "SQuAD, 384 tokens",
        "f1",
        "32x384",
        {"int8": DENSE, "tokens dropped": "cheapest within 0.5 % of the fine-tuned model, int8"},
    ),
}
Line = list[tuple[str, float, float]]


def quickstart(report: dict) -> Line:
    """Name, speed-up and share of the metric, of each model."""
    names = {"finetune": "", "distill": "3 of 6 layers", "export": "ONNX Runtime", "quantize": "int8"}
    models = {model["name"]: model for model in report["models"]}
    base = models["finetune"]
    return [
        (
            title,
            models[name]["latency"]["32x64"]["speedup"] or 1.0,
            models[name]["metrics"]["accuracy"] / base["metrics"]["accuracy"],
        )
        for name, title in names.items()
    ]


def stacked(report: dict, metric: str, shape: str, models: dict[str, str]) -> Line:
    """The same for a benchmark that drops tokens, of the models with those names."""
    scores = {row["name"]: row["score"]["metrics"][metric] for row in report["models"] if row["score"]}
    timings = report["timings"]["shapes"][shape]
    line = [("", 1.0, 1.0)]
    for title, name in models.items():
        line.append((title, ratio(timings, DENSE_FP32, name), scores[name] / scores[DENSE_FP32]))
    return line


def draw(lines: dict[str, Line], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for index, (title, line) in enumerate(lines.items()):
        color = ("#0072b2", "#d55e00", "#009e73")[index % 3]
        axes.plot([x for _, x, _ in line], [100 * y for *_, y in line], "o-", color=color, label=title, markersize=7)
        for text, x, y in line:
            # The uppermost line has room above it, the others below.
            below = index > 0
            axes.annotate(
                f"{text}\n{x:.1f}x" if text else "",
                (x, 100 * y),
                textcoords="offset points",
                xytext=(0, -11 if below else 9),
                ha="center",
                va="top" if below else "bottom",
                fontsize=9,
                color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    axes.axhline(99, color="#999999", linewidth=0.8, linestyle="--")
    axes.annotate(
        "1 % lost", (0.01, 99), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=9, color="#666666"
    )
    axes.set_xscale("log")
    ticks = [1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(right=22)
    axes.set_xlabel("times as fast as the fine-tuned model in PyTorch fp32, batch 32 (log scale)")
    axes.set_ylabel("% of its metric kept")
    low = min(100 * y for line in lines.values() for *_, y in line)
    axes.set_ylim(min(low - 1.5, 97), 101.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args()
    lines = {"Banking77, 64 tokens": quickstart(read_json(RESULTS / "quickstart.json"))}
    for name, (title, *of) in STACKED.items():
        lines[title] = stacked(read_json(RESULTS / f"{name}.json"), *of)
    draw(lines, options.output)
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
