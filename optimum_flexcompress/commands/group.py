"""`optimum-cli flexcompress`: the group that holds the sub-commands."""

from __future__ import annotations

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.flexcompress.assemble import AssembleCommand
from optimum.commands.flexcompress.base import describe_parser
from optimum.commands.flexcompress.benchmark import BenchmarkCommand
from optimum.commands.flexcompress.compress import CompressCommand
from optimum.commands.flexcompress.quantize import QuantizeCommand
from optimum.commands.flexcompress.search import SearchCommand


_COMMANDS = (CompressCommand, AssembleCommand, SearchCommand, QuantizeCommand, BenchmarkCommand)


class FlexCompressGroupCommand(BaseOptimumCLICommand):
    """Lists the sub-commands; run on its own it prints its help."""

    COMMAND = CommandInfo(name="flexcompress", help="Make transformers smaller and faster, and measure what it costs.")
    SUBCOMMANDS = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in _COMMANDS
    )

    EXAMPLES = """\
optimum-cli flexcompress compress -m bert-base-uncased --dataset reviews.csv --task text-classification \\
    --recipe distil-int8 -o small
optimum-cli flexcompress benchmark small/quantize --baseline small/finetune --dataset reviews.csv -o report
"""

    @staticmethod
    def parse_args(parser):
        describe_parser(parser, FlexCompressGroupCommand.COMMAND.help, FlexCompressGroupCommand.EXAMPLES)
