"""`optimum-cli flexcompress assemble`: makes a plain model from a modular checkpoint."""

from __future__ import annotations

from optimum.commands.base import CommandInfo
from optimum.commands.flexcompress.base import FlexCompressCommand, add_json_argument
from optimum.commands.flexcompress.hub import add_hub_arguments, hub_target, push


class AssembleCommand(FlexCompressCommand):
    """Makes a plain model of fewer layers from a modular checkpoint."""

    COMMAND = CommandInfo(
        name="assemble", help="Make a model of any depth from a modular checkpoint, without further training."
    )
    EXAMPLES = """\
optimum-cli flexcompress assemble -m modular-t5 --strategy size-first --ratio 2 -o t5-half
optimum-cli flexcompress assemble -m modular-t5 --strategy speed-first --ratio 1.5 -o t5-fast
optimum-cli flexcompress assemble -m modular-t5 --strategy plan.json -o t5-mine
optimum-cli flexcompress assemble -m me/modular-t5 --ratio 2 -o t5-half --push-to-hub
"""

    @staticmethod
    def parse_args(parser):
        """See the base class."""
        required = parser.add_argument_group("what to make")
        required.add_argument(
            "-m",
            "--model",
            required=True,
            metavar="DIR",
            help="Folder that training with ModularConfig wrote, or its id on the Hugging Face Hub: the full model, and its "
            "modules.",
        )
        required.add_argument("-o", "--output", required=True, metavar="OUT", help="Folder for the assembled model.")
        required.add_argument(
            "--strategy",
            default="size-first",
            metavar="NAME|PLAN.json",
            help="size-first takes evenly from encoder and decoder; speed-first takes from the decoder, which runs for "
            'each generated token, before the encoder; or a JSON file with a list for each stack, such as {"decoder": '
            '[{"layer": 0}, {"layer": 1}, {"granularity": 2, "block": 1}]} (default: %(default)s).',
        )
        required.add_argument(
            "--ratio",
            type=float,
            metavar="R",
            help="Layers of the full model over those of the result, encoder and decoder together: 24 layers become 12 "
            "with 2. The nearest that can be had is taken. Not with a plan.",
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace OUT if it exists.")
        add_json_argument(parser, "what was assembled as JSON")
        add_hub_arguments(parser)

    def execute(self) -> None:
        """See the base class."""
        args = self.args

        from optimum_flexcompress.errors import FlexCompressError
        from optimum_flexcompress.output import check_output_folder

        plan = args.strategy.endswith(".json")
        if plan == (args.ratio is not None):
            raise FlexCompressError(
                "A plan says itself how many layers there are: leave --ratio out."
                if plan
                else f"--strategy {args.strategy} needs to know how small: give --ratio, such as --ratio 2."
            )
        check_output_folder(args.output, overwrite=args.overwrite, source=args.model)
        repository = hub_target(args, args.output)

        from optimum_flexcompress.evaluation.formatting import counted
        from optimum_flexcompress.methods.modular import Assembly, ModularModel

        # Before the model is loaded.
        assembly = Assembly.from_json_file(args.strategy) if plan else None
        modular = ModularModel.from_pretrained(args.model, dtype="auto")
        if assembly is None:
            assembly = modular.choose(args.strategy, args.ratio)
        assembly = modular.save_assembled(assembly, args.output, source=args.model, overwrite=args.overwrite)
        full, layers = sum(modular.depths.values()), counted(assembly.layers, "layer")
        missed = args.ratio is not None and f"{args.ratio:.4g}" != f"{assembly.ratio:.4g}"
        self.show(
            f"{assembly.summary()}\n{full} layers became {assembly.layers}: a ratio of {assembly.ratio:.4g}"
            + (f", the nearest to the {args.ratio:g} asked for" if missed else ""),
            {
                "output": args.output,
                "layers": assembly.layers,
                "full_layers": full,
                "ratio": assembly.ratio,
                "assembly": assembly.to_dict(),
            },
        )
        print(f"Wrote {args.output}")
        if repository is not None:
            print(push(repository, args.output, f"Upload model of {layers}"))
