"""The package's messages follow the verbosity of Transformers and of Optimum.

Modules log through `logging.getLogger(__name__)`, as everywhere. Importing this module gives the logger above them a
level that is the quieter of the two libraries' as long as it has none of its own, and has messages shown on stderr
where the application has not said what is to become of them.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from optimum.utils import logging as optimum_logging
from transformers.utils import logging as transformers_logging


class _LibraryLogger(logging.Logger):
    """A logger whose level, while nobody sets one, is that of the quieter library."""

    @property
    def level(self) -> int:
        own = self.__dict__.get("level", logging.NOTSET)
        return own or max(transformers_logging.get_verbosity(), optimum_logging.get_verbosity())

    @level.setter
    def level(self, value: int) -> None:
        self.__dict__["level"] = value


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


_logger = logging.getLogger(__name__.partition(".")[0])
if not isinstance(_logger, _LibraryLogger):
    # The object itself, because others may hold it already.
    _logger.__class__ = _LibraryLogger
    _logger.addHandler(_Stderr())
