"""`optimum-cli flexcompress search`: looks for the configurations of a model that are worth choosing."""

from __future__ import annotations

from optimum.commands.base import CommandInfo
from optimum.commands.flexcompress.base import TASKS, FlexCompressCommand, add_json_argument, read_columns
from optimum.commands.flexcompress.hub import add_hub_arguments, hub_target, push


class SearchCommand(FlexCompressCommand):
    """Searches what a trained model can become: length configurations, or assemblies of a modular checkpoint."""

    COMMAND = CommandInfo(
        name="search",
        help="Search the length configurations of a model, or the assemblies of a modular checkpoint: metric against "
        "MACs or latency.",
    )
    EXAMPLES = """\
optimum-cli flexcompress search -m adapted --dataset reviews --max-drop 1% -o front
optimum-cli flexcompress search -m adapted --dataset reviews --objective latency --runtime ort-int8 --threads 2 \\
    --max-latency 40 --save-pick adapted-40ms -o front
optimum-cli flexcompress search -m modular-t5 --dataset pairs --max-drop 2% --save-pick t5-small -o front
optimum-cli flexcompress search -m adapted --dataset reviews --storage postgresql://host/searches -o front-of-worker-2
"""
    INTERRUPTED = "what was scored is kept; run the same command again to go on from there."

    @staticmethod
    def parse_args(parser):
        """See the base class."""
        required = parser.add_argument_group("what to search")
        required.add_argument(
            "-m",
            "--model",
            required=True,
            metavar="DIR",
            help="Folder of a PyTorch model with an encoder, or its id on the Hub: its lengths are searched. Those of a "
            "modular checkpoint: its assemblies are.",
        )
        required.add_argument(
            "--dataset",
            required=True,
            metavar="DATA",
            help="Id on the Hub, a folder written by `save_to_disk`, a CSV, TSV, JSON or JSONL file, or a folder of such "
            "files named by split (train.csv, test.csv).",
        )
        required.add_argument(
            "-o",
            "--output",
            required=True,
            metavar="OUT",
            help="Folder for front.json and the pictures; the folder of an interrupted search to go on with it.",
        )
        required.add_argument(
            "--objective",
            default="macs",
            help="What to trade the metric against: macs, or latency measured on this machine (default: %(default)s).",
        )
        required.add_argument(
            "--runtime",
            default="pytorch",
            help="What runs the configurations: pytorch, or ONNX Runtime as ort or ort-int8 (default: %(default)s).",
        )
        required.add_argument("--task", help=f"What the model is for: {TASKS} (default: read from its config.json).")
        pick = parser.add_argument_group("what to pick")
        pick.add_argument(
            "--max-drop",
            metavar="SHARE",
            help="Pick the cheapest that loses at most this: 0.01, or 1%%, of the metric.",
        )
        pick.add_argument(
            "--max-cost",
            metavar="SHARE",
            help="Pick within this share of the full model's cost, around which is searched most.",
        )
        pick.add_argument(
            "--max-latency", type=float, metavar="MS", help="Pick within so many milliseconds a batch (latency only)."
        )
        pick.add_argument("--save-pick", metavar="DIR", help="Write the model with the picked lengths set to DIR.")
        data = parser.add_argument_group("data")
        data.add_argument("--split", help="Split to score on (default: validation, else a part of train).")
        data.add_argument(
            "--samples", type=int, default=1000, metavar="N", help="Examples to score on (default: %(default)s)."
        )
        data.add_argument(
            "--columns",
            metavar="ROLE=NAME",
            nargs="+",
            default=[],
            help="Names of the data set's columns where they are not the usual ones, such as text=review.",
        )
        data.add_argument(
            "--max-length",
            type=int,
            metavar="N",
            help="Cut inputs to N tokens (default: as trained, else the task's).",
        )
        data.add_argument("--metric", help="A metric of the task, or loss (default: the task's main one).")
        data.add_argument(
            "--batch-size", type=int, default=32, metavar="N", help="Rows at a time (default: %(default)s)."
        )
        how = parser.add_argument_group("how")
        how.add_argument("--unit", help="counts or fractions (default: as trained).")
        how.add_argument(
            "--population",
            type=int,
            default=20,
            metavar="N",
            help="Configurations in a generation (default: %(default)s).",
        )
        how.add_argument(
            "--trials",
            type=int,
            default=150,
            metavar="N",
            help="Configurations to score in all (default: %(default)s).",
        )
        how.add_argument(
            "--patience",
            type=int,
            metavar="N",
            help="End when N in a row have not moved the front; 0: never (default: twice the population).",
        )
        how.add_argument(
            "--storage",
            metavar="URL",
            help="Database that workers share, such as postgresql://user:password@host/name (default: an SQLite file in "
            "OUT, which workers on this machine share). Workers that measure latency need a machine each.",
        )
        how.add_argument(
            "--seed", type=int, default=42, metavar="N", help="Of everything random (default: %(default)s)."
        )
        how.add_argument(
            "--latency-batch-size",
            type=int,
            default=32,
            metavar="N",
            help="Rows of the batch that is timed (default: %(default)s).",
        )
        how.add_argument(
            "--new-tokens",
            type=int,
            default=32,
            metavar="N",
            help="Tokens that generating models generate (default: %(default)s).",
        )
        how.add_argument(
            "--threads", type=int, metavar="N", help="Threads for PyTorch and ONNX Runtime (default: PyTorch's)."
        )
        how.add_argument(
            "--bf16",
            action="store_true",
            help="Score lengths in bfloat16, faster on a processor that computes in it (PyTorch only).",
        )
        result = parser.add_argument_group("result")
        add_json_argument(result, "the front as JSON instead of a table")
        result.add_argument(
            "--no-picture", action="store_true", help="Do not draw the front, which needs the extra `report`."
        )
        add_hub_arguments(parser, "the model of --save-pick")

    def execute(self) -> None:
        """See the base class."""
        from optimum_flexcompress.methods.modular import is_modular
        from optimum_flexcompress.search import search_assemblies, search_lengths

        args = self.args

        repository = hub_target(args, args.save_pick)
        if is_modular(args.model):
            search, options = search_assemblies, {}
            self._refuse_for_assemblies()
        else:
            search, options = search_lengths, {"runtime": args.runtime, "unit": args.unit, "bf16": args.bf16}
        front = search(
            args.model,
            args.dataset,
            args.task,
            args.output,
            objective=args.objective,
            max_drop=args.max_drop,
            max_cost=args.max_cost,
            max_latency=args.max_latency,
            save_pick=args.save_pick,
            split=args.split,
            samples=args.samples,
            columns=read_columns(args.columns),
            max_length=args.max_length,
            metric=args.metric,
            population=args.population,
            trials=args.trials,
            patience=args.patience,
            storage=args.storage,
            seed=args.seed,
            batch_size=args.batch_size,
            latency_batch_size=args.latency_batch_size,
            new_tokens=args.new_tokens,
            threads=args.threads,
            picture=not args.no_picture,
            say=print,
            **options,
        )
        self.show(front, front.to_json())
        if front.picked is not None:
            drop, cost = 100 * front.drop(front.picked), 100 * front.picked.relative_cost
            print(f"\npicked: {front.name(front.picked)}, which loses {drop:.2f} % at {cost:.0f} % of the cost")
        if args.save_pick is not None:
            print(f"model: {args.save_pick}")
        if repository is not None:
            print(push(repository, args.save_pick, "Upload picked model"))

    def _refuse_for_assemblies(self) -> None:
        from optimum_flexcompress.errors import FlexCompressError

        args = self.args
        given = {"--unit": args.unit is not None, "--runtime": args.runtime != "pytorch", "--bf16": args.bf16}
        option = next((option for option, was_given in given.items() if was_given), None)
        if option is not None:
            raise FlexCompressError(
                f"{args.model} is a modular checkpoint, whose assemblies are searched in PyTorch in their own precision: "
                f"leave {option} out."
            )
