"""A log file whose failures cost nothing but its lines."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from contextlib import suppress
from pathlib import Path


class LogFile(logging.handlers.WatchedFileHandler):
    """Lines at the end of a file, which may be rotated. Each is one write, so that processes share the file.

    A line that can't be written is lost, which is said once on standard error, until one can be again: the store may
    be deleted or its disk full, and whoever logs is answering a request. The handler of the standard library raises
    where the file can't be opened, and prints a traceback for each line that can't be written.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file can't be opened."""
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
        self._failing = False
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, if that can be done."""
        self._failed = False
        try:
            super().emit(record)
        except OSError as error:
            self._note(error)
        if not self._failed:
            self._failing = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the standard library's name
        """What went wrong within `emit`."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._note(error)
        else:
            # A record that can't be formatted: a bug, which the standard library reports.
            super().handleError(record)

    def _note(self, error: OSError) -> None:
        self._failed = True
        if not self._failing:
            self._failing = True
            with suppress(OSError):
                os.write(2, os.fsencode(f"casfs: can't write to {self.baseFilename}: {error.strerror}\n"))
        self._forget_buffer()

    def _forget_buffer(self) -> None:
        """What couldn't be written stays in the stream's buffer, and would come again with each line."""
        stream, self.stream = self.stream, None  # the next line opens it
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.close()
