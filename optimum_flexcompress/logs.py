"""The package's messages follow the verbosity of Transformers and of Optimum.

Modules log through `logging.getLogger(__name__)`, as everywhere. Importing this module puts a logger above theirs whose
level is the quieter of the two libraries', so that it counts as long as none of ours has a level of its own, and has
messages shown on stderr where the application has not said what is to become of them.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from optimum.utils import logging as optimum_logging
from transformers.utils import logging as transformers_logging


class _QuieterLibrary(logging.Logger):
    """A logger whose level is that of the quieter library."""

    @property
    def level(self) -> int:
        return max(transformers_logging.get_verbosity(), optimum_logging.get_verbosity())

    @level.setter
    def level(self, value: int) -> None:
        pass


class _Stderr(logging.StreamHandler):
    """Writes to what is stderr now; silent where the root logger has handlers, to which messages go on."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def _follow(logger: logging.Logger) -> None:
    above = _QuieterLibrary(f"{logger.name} (verbosity)")
    above.parent = logger.parent
    above.addHandler(_Stderr())
    logger.parent = above


_follow(logging.getLogger(__name__.partition(".")[0]))
