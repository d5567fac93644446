"""The seam between a worker and whoever schedules: what a worker takes, and how it tells what becomes of it.

A scheduler is a `WorkSource`: a worker asks it for the next action, in a thread
that may wait, and gets an `Assignment`. The built-in one (`tools.server.scheduler`)
and those of clusters look the same from here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from store.digest import Digest
from tools.reapi.generated import remote_execution_pb2 as reapi


class Stage(Enum):
    """What a worker is at, of an action."""

    FETCHING = "fetch"
    RUNNING = "run"
    UPLOADING = "upload"


class Stop:
    """Says once, to whoever waits on its descriptor, that an action is to be ended. Any thread may call."""

    __slots__ = ("_closed", "_descriptor", "_lock", "_set")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Under `_lock`. No descriptor before somebody wants to wait: thousands may be queued.
        self._descriptor = -1
        self._set = False
        self._closed = False

    def fileno(self) -> int:
        """A descriptor that is readable from `set` on. Raises ValueError after `close`."""
        with self._lock:
            if self._closed:
                raise ValueError("nobody waits any more")
            if self._descriptor < 0:
                self._descriptor = os.eventfd(int(self._set), os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            return self._descriptor

    def set(self) -> None:
        """End it; harmless when repeated, and when it has ended."""
        with self._lock:
            if not self._set and self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)
            self._set = True

    @property
    def is_set(self) -> bool:
        """Whether it is to be ended."""
        return self._set

    def close(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self._closed = True
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Assignment:
    """An action to run. `queued`: since when it waits, in seconds since the epoch; 0 where nobody knows.

    `message` is what is run, where the scheduler sent it along; it may differ
    from what has that digest, in its timeout. Else the blob is read.
    `note` is told each stage as it begins, `finish` the response, once, by the
    thread that runs it; neither raises.
    """

    action: Digest
    instance: str = ""
    queued: float = 0.0
    message: reapi.Action | None = None
    note: Callable[[Stage], None] = _ignore
    finish: Callable[[reapi.ExecuteResponse], None] = _ignore
    stop: Stop = field(default_factory=Stop)


class WorkSource(Protocol):
    """Where actions come from. Each of a worker's threads calls `take`."""

    def take(self) -> Assignment | None:
        """The next action, as soon as there is one; None when this worker gets no more."""
        ...

    def drain(self) -> None:
        """Have threads get no more; what runs goes on. Harmless when repeated."""
        ...

    def stop_all(self) -> None:
        """End what runs."""
        ...
