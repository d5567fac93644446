"""Where the traces of a worker's actions go: a directory with a file each, named by the action's digest."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from casfs.tracing import check_traceable
from store.digest import Digest
from store.errors import BadInput
from tools.worker.errors import WorkerError


class Traces:
    """A directory of traces. Threads may share it."""

    def __init__(self, directory: Path, engine: str) -> None:
        """Makes the directory. Raises BadInput, and MissingCapability for an engine that can't be traced."""
        check_traceable(engine)
        self._directory = directory.absolute()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"can't make the directory {directory} for traces: {error.strerror}") from error

    def begin(self, action: Digest) -> Path:
        """A new, empty file: ``<hash>.trace``, or ``<hash>.2.trace`` and so on when the action was run before.

        Raises WorkerError.
        """
        for number in count(1):
            suffix = ".trace" if number == 1 else f".{number}.trace"
            path = self._directory / f"{action.hash.hex()}{suffix}"
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
            except FileExistsError:
                continue
            except OSError as error:
                raise WorkerError(f"can't write the trace {path}: {error.strerror}") from error
            return path
        raise AssertionError("numbers don't end")
