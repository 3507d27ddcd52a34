"""Errors, exit codes and interruptions, as every command of the group shares them."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from pathlib import Path

import pytest
from optimum.commands.base import CommandInfo
from optimum.commands.flexcompress.base import DISK_FULL, FlexCompressCommand, explain_os_error
from safetensors import SafetensorError

from optimum_flexcompress.errors import FlexCompressError


class Probe(FlexCompressCommand):
    COMMAND = CommandInfo(name="probe", help="Does what the test says.")
    EXAMPLES = "probe --word x"
    action = staticmethod(lambda args: None)

    @staticmethod
    def parse_args(parser):
        parser.add_argument("--word")

    def execute(self):
        type(self).action(self.args)


@pytest.fixture
def run(monkeypatch):
    """Parses a command line and runs it with the given action; returns the exit code."""

    def run(action, *arguments):
        monkeypatch.setattr(Probe, "action", staticmethod(action))
        parser = argparse.ArgumentParser("optimum-cli")
        Probe(parser.add_subparsers())
        try:
            args = parser.parse_args(["probe", *arguments])
            args.func(args).run()
        except SystemExit as end:
            return end.code
        return 0

    return run


def raising(error):
    def action(args):
        raise error

    return action


def test_success(run, capsys):
    assert run(lambda args: print(args.word), "--word", "hello") == 0
    assert capsys.readouterr() == ("hello\n", "")


def test_an_error_is_one_sentence_and_exit_code_1(run, capsys):
    assert run(raising(FlexCompressError("no such thing: name another."))) == 1
    assert capsys.readouterr() == ("", "error: no such thing: name another.\n")


def test_debug_shows_the_error_itself(run):
    with pytest.raises(FlexCompressError, match="no such thing"):
        run(raising(FlexCompressError("no such thing")), "--debug")
    with pytest.raises(KeyboardInterrupt):
        run(raising(KeyboardInterrupt()), "--debug")


def test_a_mistake_of_ours_is_not_dressed_up(run):
    with pytest.raises(ZeroDivisionError):
        run(lambda args: 1 / 0)


def test_a_full_disk_that_a_library_met(run, capsys):
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert run(raising(error)) == 1
    assert capsys.readouterr() == ("", f"error: {DISK_FULL}\n")
    with pytest.raises(SafetensorError):
        run(raising(SafetensorError("Error while serializing: something else")))


def test_interrupted_by_the_user(run, capsys):
    assert run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == f"\ninterrupted: {Probe.INTERRUPTED}\n"


# In a process of its own: a signal that is delivered late, when the command has put the usual handler back, would end
# the process that runs the tests.
TERMINATED = """
import argparse, signal, time
from tests.commands.test_base import Probe

def action(args):
    try:
        print("started", flush=True)
        time.sleep(600)
    finally:
        print("unwound")

before = signal.getsignal(signal.SIGTERM)
Probe.action = staticmethod(action)
parser = argparse.ArgumentParser("optimum-cli")
Probe(parser.add_subparsers())
args = parser.parse_args(["probe"])
try:
    args.func(args).run()
finally:
    assert signal.getsignal(signal.SIGTERM) is before
"""


def test_terminated_unwinds_like_an_interruption():
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", TERMINATED], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n", process.stderr.read()
        process.terminate()
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (143, "unwound\n")
    assert err.endswith(f"\ninterrupted: {Probe.INTERRUPTED}\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "the disk is full: make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "no permission to use /a/b"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/b"), "/a/b does not exist"),
        (OSError(errno.EMFILE, "Too many open files", "/a/b"), "Too many open files: /a/b"),
        (OSError("Several lines\n  from a library."), "Several lines from a library."),
    ],
)
def test_errors_of_the_system(run, capsys, error, message):
    assert message in explain_os_error(error)
    assert run(raising(error)) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_wrong_arguments_exit_with_2(run, capsys):
    assert run(lambda args: None, "--wrod", "x") == 2
    assert "unrecognized arguments: --wrod" in capsys.readouterr().err


def test_help_shows_the_examples(run, capsys):
    assert run(lambda args: None, "--help") == 0
    printed = capsys.readouterr().out
    assert "Does what the test says." in printed and "examples:\n  probe --word x" in printed and "--debug" in printed
