"""A process that outlives this one by a moment: it does what this one can't do any more when it was killed.

    with guarded(partial(unmount_place, place, number), "…"):
        …

    with Guard(end_commands) as guard:      # is called with what was noted
        guard.note(b"/…/scratch/1")
        …

The guard is a fork that waits for the end of a pipe, which the kernel closes however this process ends, once it and
all that it has forked are gone or are other programs. Of its descriptors it holds standard error alone, so nobody who
reads from this process waits for the guard. To be made while this process has one thread; then any may use it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Self

from casfs.forking import keep_only

_END = b"\0"
"""Behind each note. One without a note says that there is nothing to do."""


class Guard:
    """Has a function called in another process if this one is killed. A context manager, at whose end it isn't."""

    def __init__(self, undo: Callable[[Sequence[bytes]], object], message: str = "") -> None:
        """`undo` gets the notes; it must do no harm where nothing is to be done.

        `message` then goes to standard error, where this process can't say it any more.
        """
        reading, self._pipe = os.pipe()
        self.process = os.fork()
        """The guard's process id."""
        if self.process == 0:
            code = 1
            try:
                os.close(self._pipe)
                _guard(reading, undo, message)
                code = 0
            finally:
                os._exit(code)
        os.close(reading)

    def note(self, text: bytes) -> None:
        """Tell it what there will be to do. `text` has no NUL, and isn't empty; a path, say."""
        # Less than a pipe takes at a time, so whole or not at all; that the guard has died is nothing to us.
        with suppress(OSError):
            os.write(self._pipe, text + _END)

    def close(self) -> None:
        """Nothing is to be done: end it. Harmless when repeated."""
        if self._pipe >= 0:
            with suppress(OSError):
                os.write(self._pipe, _END)
            os.close(self._pipe)
            self._pipe = -1
            with suppress(ChildProcessError):
                os.waitpid(self.process, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def guarded(undo: Callable[[], object], message: str) -> Iterator[None]:
    """Have `undo` called in another process if this one is killed inside; see `Guard`."""
    with Guard(lambda _: undo(), message):
        yield


def _guard(reading: int, undo: Callable[[Sequence[bytes]], object], message: str) -> None:
    # Not in the group that a terminal or a `timeout` ends.
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keep_only((reading, 2))
    said, notes = b"", list[bytes]()
    while more := os.read(reading, 4096):
        said += more
        *notes, _ = said.split(_END)
        # At once, and not when the pipe ends: a fork that isn't its program yet may have it, too.
        if b"" in notes:
            return
    undo(notes)
    if message:
        with suppress(OSError):
            os.write(2, message.encode() + b"\n")
