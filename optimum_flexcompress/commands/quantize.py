"""`optimum-cli flexcompress quantize`: makes a model int8."""

from __future__ import annotations

from pathlib import Path

from optimum.commands.base import CommandInfo
from optimum.commands.flexcompress.base import TASKS, FlexCompressCommand, add_json_argument, read_columns
from optimum.commands.flexcompress.hub import add_hub_arguments, hub_target, push


class QuantizeCommand(FlexCompressCommand):
    """Makes a model int8; a PyTorch model is exported first."""

    COMMAND = CommandInfo(name="quantize", help="Make a model int8: dynamic, or static with calibration examples.")
    EXAMPLES = """\
optimum-cli flexcompress quantize -m student -o student-int8
optimum-cli flexcompress quantize -m student --mode static --dataset banking77/train.csv -o student-int8
optimum-cli flexcompress quantize -m student --mode static --dataset reviews.csv --columns text=review label=stars \\
    --target avx2 -o student-int8
optimum-cli flexcompress quantize -m student --backend openvino --mode static --dataset banking77/train.csv -o student-ov
optimum-cli flexcompress quantize -m length-adaptive --length-config 315,251,242,159,142,33 -o fewer-tokens-int8
optimum-cli flexcompress quantize -m me/student -o student-int8 --push-to-hub --hub-private-repo
"""

    @staticmethod
    def parse_args(parser):
        """See the base class."""
        required = parser.add_argument_group("what to quantize")
        required.add_argument(
            "-m",
            "--model",
            required=True,
            metavar="DIR",
            help="Model folder, PyTorch (compressed or not) or ONNX, or id on the Hugging Face Hub.",
        )
        required.add_argument("-o", "--output", required=True, metavar="OUT", help="Folder for the int8 model.")
        required.add_argument("--task", help=f"What the model is for: {TASKS} (default: read from its config.json).")
        how = parser.add_argument_group("how")
        how.add_argument(
            "--backend",
            default="ort",
            help="The runtime: ort, for ONNX Runtime; openvino, static only; ipex, for Intel Extension for PyTorch, in an "
            "environment of its own; or torchao, for PyTorch on CUDA (default: %(default)s).",
        )
        how.add_argument(
            "--mode",
            default="dynamic",
            help="dynamic takes the ranges of activations at run time; static from the examples of --dataset, which "
            "runs a little faster (default: %(default)s).",
        )
        how.add_argument(
            "--target",
            default="auto",
            help="The processor: avx2, avx512, avx512_vnni, arm64, tensorrt, or auto for this machine's (default: "
            "%(default)s).",
        )
        how.add_argument(
            "--per-tensor",
            action="store_true",
            help="One weight scale for each matrix instead of each output feature.",
        )
        how.add_argument(
            "--length-config",
            metavar="LENGTHS",
            help="How many tokens each layer keeps: counts (315,251,242) or fractions (1.0,0.8,0.5), one per layer, a "
            "JSON file with them, such as `search` writes for a pick, or full (default: what the model carries).",
        )
        how.add_argument(
            "--atol",
            type=float,
            metavar="X",
            help="Largest difference of the exported model to the original that is accepted, as a share of the largest "
            "output where that is above 1 (default: 1e-4).",
        )
        how.add_argument("--no-embeddings", action="store_true", help="Leave embedding tables in single precision.")
        how.add_argument("--no-fuse", action="store_true", help="Leave the graph as it was exported.")
        data = parser.add_argument_group("calibration (static)")
        data.add_argument(
            "--dataset",
            metavar="DATA",
            help="Id on the Hub, a folder written by `save_to_disk`, a CSV, TSV, JSON or JSONL file, or a folder of such "
            "files named by split (train.csv, test.csv).",
        )
        data.add_argument("--split", help="Split to draw examples from (default: train, else validation, else test).")
        data.add_argument(
            "--columns",
            metavar="ROLE=NAME",
            nargs="+",
            default=[],
            help="Names of the data set's columns where they are not the usual ones, such as text=review.",
        )
        data.add_argument(
            "--samples", type=int, default=200, metavar="N", help="Examples to calibrate on (default: %(default)s)."
        )
        data.add_argument(
            "--max-length", type=int, default=128, metavar="N", help="Cut examples to N tokens (default: %(default)s)."
        )
        data.add_argument(
            "--calibration",
            metavar="METHOD",
            help="mse takes the range that rounds best, percentile cuts outliers off, minmax keeps everything (default: "
            "mse).",
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace OUT if it exists.")
        add_json_argument(parser, "what was done as JSON")
        add_hub_arguments(parser)

    def execute(self) -> None:
        """See the base class."""
        args = self.args
        from optimum_flexcompress.quantization.backends import find_backend

        backend = find_backend(args.backend)

        from optimum_flexcompress.output import check_output_folder

        # Before anything is loaded, exported or calibrated.
        check_output_folder(args.output, overwrite=args.overwrite, source=args.model)
        options = {
            "per_channel": not args.per_tensor,
            "embeddings": not args.no_embeddings,
            "fuse": not args.no_fuse,
        }
        if args.calibration is not None:
            options["calibration_method"] = args.calibration
        if args.atol is not None:
            options["atol"] = args.atol
        target = backend.find_target(args.target, args.mode).name
        lengths = None
        if args.length_config is not None:
            from optimum_flexcompress.token_dropping import read_lengths

            lengths = read_lengths(args.length_config)
        columns = read_columns(args.columns)
        repository = hub_target(args, args.output)

        from optimum_flexcompress.hub import fetch_model

        model = fetch_model(args.model)
        self._check_not_int8(model)
        examples = self._examples(model, columns) if args.mode == "static" else None

        from optimum_flexcompress.evaluation import environment_info, file_size
        from optimum_flexcompress.evaluation.environment import describe_environment

        print(f"Making {args.model} int8 for {backend.description}: {args.mode}, {target}")
        environment = environment_info()
        print(describe_environment(environment))
        result = backend.quantize(
            model,
            args.output,
            args.mode,
            target,
            calibration_dataset=examples,
            num_calibration_samples=args.samples,
            task=args.task,
            **({} if lengths is None else {"length_config": lengths}),
            overwrite=args.overwrite,
            progress=True,
            **options,
        )
        from optimum_flexcompress.model_card import write_model_card

        write_model_card(result.path, base_model=args.model, task=args.task)
        summary = result.summary()
        self.show(
            summary,
            {
                "output": args.output,
                "model": args.model,
                "backend": args.backend,
                "mode": args.mode,
                "target": target,
                "bytes": file_size(args.output),
                "summary": summary.splitlines(),
                "environment": environment,
            },
        )
        print(f"Wrote {args.output}")
        if repository is not None:
            print(push(repository, args.output, "Upload int8 model"))

    def _check_not_int8(self, model: Path) -> None:
        from optimum_flexcompress.errors import FlexCompressError
        from optimum_flexcompress.quantization.saved import has_saved, peek_saved

        if has_saved(model):
            raise FlexCompressError(
                f"{self.args.model} is int8 already, for the backend {peek_saved(model).backend}: give the model that it "
                "was made from."
            )

    def _examples(self, model: Path, columns: dict[str, str]):
        from optimum_flexcompress.errors import FlexCompressError
        from optimum_flexcompress.quantization.calibration_data import calibration_examples

        args = self.args
        if args.dataset is None:
            raise FlexCompressError("--mode static needs calibration examples: give --dataset, or choose dynamic.")
        return calibration_examples(
            model,
            args.dataset,
            args.task,
            samples=args.samples,
            split=args.split,
            columns=columns,
            max_length=args.max_length,
        )
