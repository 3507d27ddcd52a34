"""`optimum-cli flexcompress benchmark`: measures models side by side."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo
from optimum.commands.flexcompress.base import TASKS, FlexCompressCommand, add_json_argument, read_columns


if TYPE_CHECKING:
    from optimum_flexcompress.evaluation import Report


class BenchmarkCommand(FlexCompressCommand):
    """Measures models side by side and writes a report."""

    COMMAND = CommandInfo(
        name="benchmark", help="Measure models side by side: metric, size, MACs, latency, throughput, memory."
    )
    EXAMPLES = """\
optimum-cli flexcompress benchmark student student-int8 --baseline teacher --dataset banking77/test.csv -o report
optimum-cli flexcompress benchmark student --baseline teacher --dataset reviews.csv --columns text=review label=stars \\
    --batch-sizes 1 32 --lengths 128 384 --threads 2 -o report
optimum-cli flexcompress benchmark student-openvino student-ipex --python ipex=.venv-ipex/bin/python \\
    --baseline teacher --dataset banking77/test.csv -o report
"""

    @staticmethod
    def parse_args(parser):
        """See the base class."""
        required = parser.add_argument_group("what to measure")
        required.add_argument(
            "models",
            nargs="+",
            metavar="DIR",
            help="Model folders, PyTorch, ONNX (or one .onnx file in a folder that holds several), OpenVINO or IPEX, or "
            "ids on the Hugging Face Hub.",
        )
        required.add_argument(
            "--baseline", metavar="DIR", help="The model to compare the others with (default: the first DIR)."
        )
        required.add_argument(
            "--dataset",
            required=True,
            help="Id on the Hub, a folder written by `save_to_disk`, a CSV, TSV, JSON or JSONL file, or a folder of such "
            "files named by split (train.csv, test.csv).",
        )
        required.add_argument("-o", "--output", metavar="REPORT", help="Folder for report.json and report.html.")
        data = parser.add_argument_group("data")
        data.add_argument(
            "--task", help=f"What the models are for: {TASKS} (default: read from the baseline's config.json)."
        )
        data.add_argument("--split", help="Split to evaluate (default: test, else validation, else train).")
        data.add_argument(
            "--columns",
            metavar="ROLE=NAME",
            nargs="+",
            default=[],
            help="Names of the data set's columns where they are not the usual ones, such as text=review.",
        )
        data.add_argument("--max-samples", type=int, metavar="N", help="Evaluate on N rows drawn at random.")
        data.add_argument(
            "--max-length", type=int, metavar="N", help="Cut inputs to N tokens (default: 128; 384 for QA)."
        )
        data.add_argument(
            "--eval-batch-size",
            type=int,
            default=32,
            metavar="N",
            help="Rows at a time while evaluating (default: 32).",
        )
        data.add_argument(
            "--sentence",
            nargs="+",
            metavar="TEXT",
            help="A text, or two for a task that reads pairs, for which the report shows the words that models with "
            "dropped tokens keep (default: one of the data set).",
        )
        timing = parser.add_argument_group("timing")
        timing.add_argument(
            "--batch-sizes",
            type=int,
            nargs="+",
            default=[1, 32],
            metavar="N",
            help="Batch sizes to time (default: 1 32).",
        )
        timing.add_argument(
            "--lengths",
            type=int,
            nargs="+",
            metavar="N",
            help="Lengths in tokens to time (default: 128, or what the models take).",
        )
        timing.add_argument(
            "--new-tokens",
            type=int,
            default=32,
            metavar="N",
            help="Tokens that generating models generate (default: 32).",
        )
        timing.add_argument(
            "--stream-rows",
            type=int,
            default=64,
            metavar="N",
            help="Rows of the data set to time one by one at their real lengths; 0 for none (default: 64).",
        )
        timing.add_argument(
            "--rounds", type=int, default=15, metavar="N", help="Interleaved rounds for each figure (default: 15)."
        )
        timing.add_argument(
            "--max-seconds",
            type=float,
            default=60.0,
            metavar="S",
            help="Rough bound for timing one shape, all models together (default: 60).",
        )
        timing.add_argument(
            "--threads", type=int, metavar="N", help="Threads for PyTorch and ONNX Runtime (default: PyTorch's)."
        )
        timing.add_argument(
            "--python",
            action="append",
            default=[],
            metavar="LANE=PATH",
            help="Interpreter of another environment, for models that need it, such as ipex=.venv-ipex/bin/python.",
        )
        timing.add_argument("--no-memory", action="store_true", help="Do not measure peak memory.")
        result = parser.add_argument_group("result")
        add_json_argument(result, "the report as JSON instead of tables")
        result.add_argument(
            "--no-html", action="store_true", help="Do not write report.html, which needs the extra `report`."
        )
        result.add_argument("--overwrite", action="store_true", help="Replace what is in REPORT.")

    def execute(self) -> None:
        """See the base class."""
        args = self.args

        from optimum_flexcompress.evaluation.benchmark import check_report_folder, run_benchmark
        from optimum_flexcompress.evaluation.lanes import read_interpreters

        if args.output is not None:
            check_report_folder(args.output, html=not args.no_html, overwrite=args.overwrite)
        report = run_benchmark(
            args.models,
            baseline=args.baseline,
            task=args.task,
            data=args.dataset,
            split=args.split,
            columns=read_columns(args.columns),
            max_length=args.max_length,
            max_samples=args.max_samples,
            sentence=args.sentence,
            batch_sizes=args.batch_sizes,
            lengths=args.lengths,
            new_tokens=args.new_tokens,
            stream_rows=args.stream_rows,
            rounds=args.rounds,
            max_seconds=args.max_seconds,
            eval_batch_size=args.eval_batch_size,
            threads=args.threads,
            memory=not args.no_memory,
            interpreters=read_interpreters(args.python),
        )
        # Before it is written: what took long to measure is not lost with a disk that is full.
        self.show(report, report.to_json())
        if args.output is not None:
            self._write(report)

    def _write(self, report: Report) -> None:
        from optimum_flexcompress.errors import FlexCompressError
        from optimum_flexcompress.output import atomic_folder

        args = self.args
        try:
            with atomic_folder(args.output, overwrite=args.overwrite) as folder:
                report.save(folder, html=not args.no_html)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            raise FlexCompressError(
                f"the report above could not be written to {args.output}: "
                + (
                    "the disk is full; make room, or run again with -o on another disk."
                    if full
                    else f"{error.strerror or error}; run again with another -o."
                )
            ) from error
        page = "report.json" if args.no_html else "report.html"
        print(f"\nreport: {os.path.join(args.output, page)}")
