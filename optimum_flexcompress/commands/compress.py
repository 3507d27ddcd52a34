"""`optimum-cli flexcompress compress`: runs a recipe."""

from __future__ import annotations

import json
import os

from optimum.commands.base import CommandInfo
from optimum.commands.flexcompress.base import FlexCompressCommand, read_columns
from optimum.commands.flexcompress.hub import add_hub_arguments, hub_target


class CompressCommand(FlexCompressCommand):
    """Compresses a model by a recipe, stage by stage; an interrupted run goes on where it stopped."""

    COMMAND = CommandInfo(name="compress", help="Run a whole recipe: train, distil, export, quantize, measure.")
    EXAMPLES = """\
optimum-cli flexcompress compress --list-recipes
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --recipe distil-int8 -o OUT
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --recipe distil-int8 -o OUT \\
    --set stages.distill.epochs=2 --set data.max_length=64
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification -o OUT --push-to-hub \\
    --hub-model-id me/student-int8
"""
    INTERRUPTED = "stages that finished are kept; run the same command again to go on from there."

    @staticmethod
    def parse_args(parser):
        """See the base class."""
        required = parser.add_argument_group("what to compress")
        required.add_argument("-m", "--model", help="Model folder, or id on the Hugging Face Hub.")
        required.add_argument(
            "--dataset",
            help="Id on the Hub, a folder written by `save_to_disk`, a CSV, TSV or JSONL file, or a folder of such files "
            "named by split (train.csv, test.csv).",
        )
        required.add_argument("--task", help="What the model is for, such as text-classification.")
        required.add_argument(
            "--recipe", default="distil-int8", help="Name of a recipe, or a .yaml file (default: %(default)s)."
        )
        required.add_argument(
            "-o", "--output", help="Folder for the results; the folder of an interrupted run to go on with it."
        )
        more = parser.add_argument_group("settings")
        more.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="Change a setting of the recipe, such as stages.distill.epochs=2 or data.max_train_samples=1000; may be "
            "given more than once.",
        )
        more.add_argument(
            "--columns",
            metavar="ROLE=NAME",
            nargs="+",
            default=[],
            help="Names of the data set's columns where they are not the usual ones, such as text=question.",
        )
        more.add_argument(
            "--overwrite",
            action="store_true",
            help="Run every stage again, also those that an earlier run in OUTPUT finished.",
        )
        more.add_argument("--list-recipes", action="store_true", help="List the recipes and stop.")
        hub = add_hub_arguments(parser, "the last model that the recipe makes")
        hub.add_argument(
            "--hub-stage", metavar="STAGE", help="Push the model of another stage of the recipe, such as distill."
        )

    def execute(self) -> None:
        """See the base class."""
        args = self.args
        if args.list_recipes:
            self._list_recipes()
            return
        for option in ("model", "dataset", "task", "output"):
            if getattr(args, option) is None:
                self.parser.error(f"--{option} is needed (see --help)")

        from optimum_flexcompress.recipes import load_recipe, run_recipe

        overrides = list(args.overrides)
        for role, name in read_columns(args.columns).items():
            # JSON strings are YAML strings: a column called `1` or `null` stays text.
            overrides.append(f"data.columns.{role}={json.dumps(name)}")
        recipe = load_recipe(args.recipe, overrides)
        repository = hub_target(args, args.output)
        stage = recipe.model_stage(args.hub_stage)
        self._quieten()
        result = run_recipe(
            recipe,
            args.model,
            args.dataset,
            args.task,
            args.output,
            overwrite=args.overwrite,
            names={stage: repository.repo_id} if repository is not None else {},
        )
        if repository is not None:
            url = repository.push(result.folders[stage], f"Upload model made by the recipe {recipe.name}")
            print(f"Pushed {stage} to {repository.repo_id}: {url}")

    def _list_recipes(self) -> None:
        from optimum_flexcompress.recipes import list_recipes

        for name, description in list_recipes().items():
            print(f"{name:<16} {description}")

    def _quieten(self) -> None:
        # A recipe replaces heads and drops layers on purpose; the warnings about it would only frighten. Whoever sets
        # the variable, or asks for --debug, gets them.
        if self.args.debug or "TRANSFORMERS_VERBOSITY" in os.environ:
            return
        import warnings

        from transformers.utils import logging

        logging.set_verbosity_error()
        # Said at every checkpoint on some file systems; the Trainer then goes by the numbers in the names.
        warnings.filterwarnings("ignore", message="mtime may not be reliable")
