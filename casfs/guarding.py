"""A process that outlives this one by a moment: it does what this one can't do any more when it was killed.

    with guarded(partial(unmount_place, place, number), "…"):
        …

The guard is a fork that waits for the end of a pipe, which the kernel closes however this process ends. Of its
descriptors it holds standard error alone, so nobody who reads from this process waits for the guard. To be made while
this process has one thread.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def guarded(undo: Callable[[], object], message: str) -> Iterator[None]:
    """Have `undo` called in another process if this one ends inside; it must do no harm where nothing is to be done.

    `message` then goes to standard error, where this process can't say it any more.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _guard(reading, undo, message)
            code = 0
        finally:
            os._exit(code)
    os.close(reading)
    try:
        yield
    finally:
        # A byte: it ended as it should, and there is nothing to do.
        with suppress(OSError):
            os.write(writing, b".")
        os.close(writing)
        os.waitpid(child, 0)


def _guard(reading: int, undo: Callable[[], object], message: str) -> None:
    # Not in the group that a terminal or a `timeout` ends.
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    kept = os.dup2(reading, 3) if reading != 3 else reading
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    if not os.read(kept, 1):
        undo()
        with suppress(OSError):
            os.write(2, message.encode() + b"\n")
