"""What every `optimum-cli flexcompress` command shares: errors in one sentence, exit codes, `--debug`.

Nothing here may import torch or transformers: `optimum-cli --help` loads it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable
from contextlib import nullcontext, redirect_stdout
from typing import Any, NoReturn, TextIO

from optimum.commands.base import BaseOptimumCLICommand


# What shells and schedulers expect of a process that a signal ended: 128 + the signal's number.
EXIT_ERROR = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
# Transformers imports torchao where it is installed, which warns of kernels for GPUs that this machine does not have,
# and makes torch warn of how it registers its types.
_NOISY = ("torchao", "torch.utils._pytree")
# For the help, which cannot import them: the keys of `optimum_flexcompress.tasks.TASKS`.
_TASKS = (
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
    "text2text-generation",
    "image-classification",
    "feature-extraction",
)
TASKS = f"{', '.join(_TASKS[:-1])} or {_TASKS[-1]}"
DISK_FULL = "the disk is full: make room, or choose an output folder on another disk, and run the command again."


class Terminated(KeyboardInterrupt):
    """SIGTERM, turned into an exception so that half-written output is removed on the way out."""


class FlexCompressCommand(BaseOptimumCLICommand):
    """A sub-command of `optimum-cli flexcompress`.

    Sub-classes set `COMMAND`, describe their arguments in the static method `parse_args`, and do their work in
    `execute`, which is also where their heavy imports belong.

    Attributes:
        EXAMPLES (`str`): Shown below the options by `--help`.
        INTERRUPTED (`str`): Said after a Ctrl-C; tells how to go on.
    """

    EXAMPLES: str = ""
    INTERRUPTED: str = "nothing was written; run the same command to start again."
    # Where the result goes.
    _stdout: TextIO | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Optimum builds a second instance, around the same parser, to run the command.
        if not kwargs.get("from_defaults_factory", False):
            describe_parser(self.parser, self.COMMAND.help, self.EXAMPLES)
            self.parser.add_argument(
                "--debug", action="store_true", help="Show the whole traceback when something fails."
            )

    def execute(self) -> None:
        """Does what the command is for.

        Raises:
            FlexCompressError: For everything that the user can mend.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `execute`.")

    @property
    def _as_json(self) -> bool:
        # Not every command has a result to print.
        return getattr(self.args, "json", False)

    def show(self, result: Any, as_json: str | dict[str, Any]) -> None:
        """Prints the result of the command.

        Args:
            result: For people to read; `None` where there is nothing to add.
            as_json: The same for programs, which `--json` prints instead: nothing else is on stdout then.
        """
        if not self._as_json:
            if result is not None:
                print(result, flush=True)
            return
        text = as_json if isinstance(as_json, str) else json.dumps(as_json, indent=1)
        print(text.rstrip("\n"), file=self._stdout, flush=True)

    def run(self) -> None:
        """Runs `execute`, and turns its failures into one sentence on stderr and an exit code."""
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        previous = signal.signal(signal.SIGTERM, _raise_terminated)
        try:
            try:
                self._stdout = sys.stdout
                # What is said on the way, by the Trainer, too, must not end up in the JSON.
                with redirect_stdout(sys.stderr) if self._as_json else nullcontext():
                    self.execute()
                # A full disk or a closed pipe must not turn into a silent success at interpreter exit.
                sys.stdout.flush()
            except ValueError as error:
                # Imported here because it comes with the whole package, which a wrong argument should not wait for.
                from optimum_flexcompress.errors import FlexCompressError

                if not isinstance(error, FlexCompressError):
                    raise
                self._fail(str(error), error)
            except BrokenPipeError:
                # The reader of our output went away (`| head`): nothing to report, and nowhere to report it.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(EXIT_ERROR)
            except OSError as error:
                self._fail(explain_os_error(error), error)
            except Exception as error:
                from optimum_flexcompress.errors import disk_is_full

                # Not every library that writes says so by an error of the system.
                if not disk_is_full(error, getattr(self.args, "output", None) or os.curdir):
                    raise
                self._fail(DISK_FULL, error)
        except KeyboardInterrupt as error:
            if self.args.debug:
                raise
            code = EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
            print(f"\ninterrupted: {self.INTERRUPTED}", file=sys.stderr)
            sys.exit(code)
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _fail(self, message: str, error: Exception) -> NoReturn:
        if self.args.debug:
            raise error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def add_json_argument(parser: ArgumentParser, what: str) -> None:
    """`--json`, for scripts.

    Args:
        parser: Of the command, or a group of it.
        what: Is printed then, such as "the front as JSON instead of a table".
    """
    parser.add_argument(
        "--json", action="store_true", help=f"Print {what}; everything else then goes to the standard error."
    )


def read_columns(arguments: Iterable[str]) -> dict[str, str]:
    """`--columns text=question label=intent` as a dictionary.

    Raises:
        FlexCompressError: One of them is not ROLE=NAME.
    """
    from optimum_flexcompress.errors import FlexCompressError

    columns = {}
    for argument in arguments:
        role, equals, name = argument.partition("=")
        if not (role and equals and name):
            raise FlexCompressError(f"--columns {argument}: write it as ROLE=NAME, such as text=question.")
        columns[role] = name
    return columns


def describe_parser(parser: ArgumentParser, help_text: str, examples: str) -> None:
    """Gives `parser` a description and a block of examples, which Optimum's base class leaves empty."""
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.description = help_text
    if examples:
        lines = "\n".join(f"  {line}".rstrip() for line in examples.strip().splitlines())
        parser.epilog = f"examples:\n{lines}"


def explain_os_error(error: OSError) -> str:
    """One sentence for an error of the operating system, or of a library that reports through `OSError`.

    Args:
        error: What was raised, by the system (with an `errno`) or by Transformers and the Hub client (without).

    Returns:
        The sentence, without a line break.
    """
    if error.errno == errno.ENOSPC:
        return DISK_FULL
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to use {error.filename}: choose a path that you may read and write."
    if error.errno == errno.ENOENT:
        return f"{error.filename} does not exist: check the path."
    if error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}; mend that, and run the command again."
    return " ".join(str(error).split())


def _raise_terminated(_signal_number, _frame) -> NoReturn:
    raise Terminated
