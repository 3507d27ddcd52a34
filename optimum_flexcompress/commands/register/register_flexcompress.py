"""Found by `optimum-cli`, which imports every file of the namespace package `optimum.commands.register`."""

from __future__ import annotations

from optimum.commands.flexcompress.group import FlexCompressGroupCommand


REGISTER_COMMANDS = [FlexCompressGroupCommand]
