"""`optimum-cli flexcompress compress`: plans a recipe for a budget, or takes one by name, and runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo
from optimum.commands.flexcompress.base import TASKS, FlexCompressCommand, add_json_argument, read_columns
from optimum.commands.flexcompress.hub import add_hub_arguments, hub_target


if TYPE_CHECKING:
    from optimum_flexcompress.recipes import Recipe, RecipeResult
    from optimum_flexcompress.recipes.budget import Budget
    from optimum_flexcompress.recipes.forecast import Facts


class CompressCommand(FlexCompressCommand):
    """Compresses a model, stage by stage; an interrupted run goes on where it stopped."""

    COMMAND = CommandInfo(
        name="compress",
        help="Compress a model within a budget, or by a recipe: train, distil, prune, quantize, measure.",
    )
    EXAMPLES = """\
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --max-drop 1% -o OUT
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --max-drop 1% \\
    --target-latency 20ms --device-profile this-machine -o OUT
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --max-drop 1% --dry-run
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification -o OUT
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification -o OUT --choose int8-prune
optimum-cli flexcompress compress --list-recipes
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --recipe distil-int8 -o OUT
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --recipe distil-int8 -o OUT \\
    --set stages.distill.epochs=2 --set data.max_length=64
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --recipe full -o OUT \\
    --set stages.modular.skip=true --set stages.half.skip=true --set stages.distill.layers=0.5
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --max-drop 1% -o OUT --json
optimum-cli flexcompress compress -m MODEL --dataset DATA --task text-classification --max-drop 1% -o OUT \\
    --push-to-hub --hub-model-id me/student-int8

Without --recipe the command plans which methods to stack: it looks at the model, the inputs and the latency of the int8
model on this machine. --max-drop 1% returns the fastest model that loses at most 1 % of the metric of the fine-tuned
model, as a share of it; --target-latency 20ms one that takes no longer for a batch, by default one input of the longest
length. With neither, the models are shown to choose from: the same command with a budget, or with --choose NAME, then
takes one, and trains nothing again. Every model is kept in OUT. Where no model keeps the budget, OUT/best is the one
that comes nearest, and the exit code is not 0.
"""
    # What a plan went by.
    _facts: Facts | None = None
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
        required.add_argument("--task", help=f"What the model is for: {TASKS}.")
        required.add_argument(
            "--recipe", help="Name of a recipe, or a .yaml file, instead of a plan (see --list-recipes)."
        )
        required.add_argument(
            "-o", "--output", help="Folder for the results; the folder of an interrupted run to go on with it."
        )
        budget = parser.add_argument_group("budget")
        budget.add_argument(
            "--max-drop",
            metavar="SHARE",
            help="Return the fastest model that loses at most this of the fine-tuned model's metric: 1%%, or 0.01.",
        )
        budget.add_argument(
            "--target-latency",
            metavar="TIME",
            help="Return a model that takes no longer for a batch: 20ms, or 0.02s. The best one, without --max-drop.",
        )
        budget.add_argument(
            "--device-profile",
            metavar="PROFILE",
            help="Where latency counts: this-machine, its int8 instructions and the threads that PyTorch has here "
            "(default).",
        )
        budget.add_argument(
            "--choose", metavar="NAME", help="Return this one of the measured models, such as int8-prune."
        )
        budget.add_argument(
            "--dry-run",
            action="store_true",
            help="Print what would be done, and how long it would take here; a few steps are timed, nothing is trained "
            "or written.",
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
        add_json_argument(more, "what was made, or with --dry-run or --list-recipes what would be, as JSON")
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
        for option in ("model", "dataset", "task", *(() if args.dry_run else ("output",))):
            if getattr(args, option) is None:
                self.parser.error(f"--{option} is needed (see --help)")

        from optimum_flexcompress.recipes import load_recipe, run_recipe
        from optimum_flexcompress.recipes.budget import Budget
        from optimum_flexcompress.recipes.forecast import forecast

        budget = Budget.read(args.max_drop, args.target_latency, args.choose)
        self._check_flags()
        overrides = list(args.overrides)
        for role, name in read_columns(args.columns).items():
            # JSON strings are YAML strings: a column called `1` or `null` stays text.
            overrides.append(f"data.columns.{role}={json.dumps(name)}")
        given = None if args.recipe is None else load_recipe(args.recipe, overrides)
        repository = hub_target(args, args.output)
        self._quieten()
        recipe = self._planned(budget, overrides) if given is None else given
        if args.dry_run:
            self._show_times(recipe, [*budget.overrides, *overrides])
            return
        stage = recipe.model_stage(args.hub_stage)
        result = run_recipe(
            recipe,
            args.model,
            args.dataset,
            args.task,
            args.output,
            overwrite=args.overwrite,
            names={stage: repository.repo_id} if repository is not None else {},
            expected=None if self._facts is None else forecast(recipe, self._facts),
        )
        report = {
            "output": str(result.output),
            "recipe": recipe.name,
            "seconds": result.seconds,
            "skipped": result.skipped,
            "stages": {
                name: {"folder": str(folder), "metrics": result.metrics[name]}
                for name, folder in result.folders.items()
            },
        }
        try:
            self._check_choice(result)
            if repository is not None:
                url = repository.push(result.folders[stage], f"Upload model made by the recipe {recipe.name}")
                print(f"Pushed {stage} to {repository.repo_id}: {url}")
                report["pushed"] = {"stage": stage, "repository": repository.repo_id, "url": url}
        finally:
            # In words it has been said already, stage by stage.
            self.show(None, report)

    def _check_flags(self) -> None:
        from optimum_flexcompress.errors import FlexCompressError

        args = self.args
        asked = [
            f"--{name.replace('_', '-')}"
            for name in ("max_drop", "target_latency", "choose")
            if getattr(args, name) is not None
        ]
        if args.recipe is not None and (asked or args.device_profile is not None):
            flags = " and ".join([*asked, *(["--device-profile"] if args.device_profile is not None else [])])
            raise FlexCompressError(
                f"{flags} and --recipe contradict each other: leave --recipe out, so that the command plans for the "
                "budget, or set the recipe's own limits with --set (stages.pick.max_drop, stages.best.max_drop)."
            )
        if args.choose is not None and len(asked) > 1:
            others = " and ".join(flag for flag in asked if flag != "--choose")
            raise FlexCompressError(
                f"--choose and {others} contradict each other: one names the model, the other has it looked for; give "
                "one of them."
            )
        if args.device_profile not in (None, "this-machine"):
            raise FlexCompressError(
                f"--device-profile {args.device_profile} is not known: latency is measured where the command runs, so "
                "run it on the machine that serves, with --device-profile this-machine."
            )
        for option in ("push_to_hub", "overwrite"):
            if args.dry_run and getattr(args, option):
                name = option.replace("_", "-")
                raise FlexCompressError(
                    f"--dry-run and --{name} contradict each other: a dry run writes nothing; leave one of them out."
                )
        if args.hub_stage is not None and not args.push_to_hub:
            raise FlexCompressError("--hub-stage is for pushing to the Hub: add --push-to-hub, or leave it out.")
        if args.recipe is None and args.push_to_hub and not asked and args.hub_stage is None:
            raise FlexCompressError(
                "--push-to-hub pushes the chosen model, and nothing says which: add --max-drop, --target-latency or "
                "--choose, or name a stage with --hub-stage."
            )

    def _planned(self, budget: Budget, overrides: list[str]) -> Recipe:
        """The recipe for a budget, by the plan of an earlier run in OUT where there is one."""
        from optimum_flexcompress.evaluation.environment import describe_environment, environment_info
        from optimum_flexcompress.recipes.planner import earlier_plan, make_plan, planned_recipe

        args = self.args
        print(f"this-machine: {describe_environment(environment_info())}")
        plan = None
        if args.output is not None and not args.overwrite:
            plan = earlier_plan(args.output, args.model, args.dataset, args.task, budget, overrides)
        if plan is not None:
            print(f"Going on by the plan of the earlier run in {args.output} (--overwrite plans and runs anew):")
        else:
            plan = make_plan(args.model, args.dataset, args.task, budget, overrides, print)
            print("Plan (+ applies, - does not; in brackets the benchmarks that the rule rests on):")
        print(plan, flush=True)
        self._facts = plan.facts
        return planned_recipe(plan, budget, overrides)

    def _show_times(self, recipe: Recipe, overrides: list[str]) -> None:
        """What a run would do and take.

        Args:
            recipe: What would be run.
            overrides: The settings that follow those of a plan.
        """
        from optimum_flexcompress.recipes.forecast import forecast
        from optimum_flexcompress.recipes.planner import measure, time_table

        args = self.args
        facts = self._facts
        if facts is None:
            facts, _ = measure(recipe, args.model, args.dataset, args.task, print)
        seconds = forecast(recipe, facts)
        by_hand = None if recipe.plan is None else self._by_hand(recipe, overrides)
        self.show(
            f"\n{time_table(recipe, seconds, facts)}",
            {
                "recipe": {"name": recipe.name, **recipe.to_dict()},
                "facts": dataclasses.asdict(facts),
                "seconds": seconds,
                **({} if by_hand is None else {"command": by_hand}),
            },
        )
        if by_hand is not None:
            print(f"\nThe same by hand:\n{by_hand}")
        print("\nThis was a dry run: nothing was trained, and nothing was written.")

    def _by_hand(self, recipe: Recipe, overrides: list[str]) -> str:
        """The command that runs a plan as the recipe that it is made of."""
        from optimum_flexcompress.recipes.planner import RECIPE
        from optimum_flexcompress.recipes.rules import Plan

        args = self.args
        # A folder that is there may hold the run of a plan, which another recipe does not go on with.
        output = "OUT" if args.output is None or os.path.exists(args.output) else args.output
        words = ["optimum-cli", "flexcompress", "compress", "-m", args.model, "--dataset", args.dataset]
        words += ["--task", args.task, "--recipe", RECIPE, "-o", output]
        for override in [*Plan.from_dict(recipe.plan).overrides, *overrides]:
            words += ["--set", override]
        return shlex.join(words)

    def _check_choice(self, result: RecipeResult) -> None:
        """Says how to choose where nothing was chosen.

        Raises:
            FlexCompressError: The budget could not be met.
        """
        from optimum_flexcompress.errors import FlexCompressError

        for name, choice in result.metrics.items():
            if "met" not in choice:
                continue
            folder = result.folders[name]
            if not choice["met"]:
                kept = f"All models are kept in {result.output}, this one is {folder}."
                pushed = " Nothing was pushed." if self.args.push_to_hub else ""
                raise FlexCompressError(f"{choice['sentence']} {kept}{pushed}")
            if choice["chosen"] is not None:
                print(f"Chosen: {choice['sentence']} It is in {folder}.")
            elif self.args.recipe is None:
                print(
                    "Choose one: the same command with --max-drop 1%, --target-latency 20ms or --choose NAME puts it into "
                    f"{folder}, and trains nothing again."
                )

    def _list_recipes(self) -> None:
        from optimum_flexcompress.recipes import list_recipes

        recipes = list_recipes()
        self.show("\n".join(f"{name:<16} {description}" for name, description in recipes.items()), recipes)

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
