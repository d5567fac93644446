"""What keeps a worker from running an action, beside errors of the store, of sandboxes and of requests.

    WorkerError                never the command's fault: whoever asked may try again, perhaps elsewhere
    ├── Cancelled              nobody wants the result any more
    ├── InputFailed            an input couldn't be brought in while the command ran
    └── ScratchFull            the command's disk had no room left

`tools.worker.answering` has the codes.
"""

from __future__ import annotations


class WorkerError(Exception):
    """An action couldn't be run, for a reason that lies with this worker."""


class Cancelled(WorkerError):
    """Nobody wants the result any more."""


class InputFailed(WorkerError):
    """An input couldn't be brought in while the command ran, so that its result means nothing."""


class ScratchFull(WorkerError):
    """The disk that the command writes to was full, so that its result means nothing."""
