"""How a server or worker process ends: begun by signals, and over at its deadline whatever hangs.

    with Ending(Step(stop, seconds=23.0), ...) as ending:
        …                                   `stop` is called, in a thread, when SIGTERM or SIGINT comes
    return ending.code

The n-th SIGTERM or SIGINT begins the n-th step; one more after the last step ends the process at once, with exit code
128 + signal. A step that takes longer than it may ends the process with `Exit.OVERDUE`. Both use os._exit: an event
loop that is blocked, or a thread that waits for a dead disk, would hold up every other way out. The interpreter joins
such threads at its end, so the clock runs on after `with`, until the process is gone. That costs nothing that is
durable: blobs are published atomically, and the next start removes unpublished files.

Signals arrive on a descriptor that nothing else writes to, and a thread of their own reads it. asyncio's
add_signal_handler is not used: threads wake the loop through the same socket pair, which fills up under load, and the
byte of a signal that finds it full is lost.

To be entered in the main thread, after all forks. `begin` may be called in any thread.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NamedTuple, Self

from casfs.signals import waking_on_signals
from tools.exits import Exit
from tools.server.under_way import describe_threads

log = logging.getLogger("casfs.serve")

GRACE_SECONDS = 3.0
"""What closing everything has, after the calls that were under way had their time."""
_SAME_SECONDS = 0.1
"""timeout(1) signals a process and then its group: a repetition that fast is one request to end, not two."""
_SAY_SECONDS = 0.5
"""What saying why has. Standard error may be a full pipe, the log on a dead disk."""
_ALARM_SECONDS = 1.0
"""After the deadline, the kernel's own timer ends a process none of whose threads can run Python any more."""


class Step(NamedTuple):
    """One stage of ending. `act` begins it and must not wait; None `seconds`: it takes as long as it takes."""

    act: Callable[[], object]
    seconds: float | None = None


class Ending:
    """The end of this process. A context manager, that leaves everything as it was if no end has begun."""

    def __init__(
        self,
        *steps: Step,
        reload: Callable[[], object] | None = None,
        report: Callable[[], object] | None = None,
        insist: bool = True,
        last: Callable[[], object] = lambda: None,
        describe: Callable[[], str] = describe_threads,
    ) -> None:
        """`reload`: what SIGHUP does, `report`: what SIGUSR1 does; they must not wait. Without, it is not handled.

        `insist`: whether signals that come after the last step end the process at once. `last` is called before the
        process ends by `os._exit`. `describe` says what is under way.
        """
        self._steps = steps
        self._reload = reload
        self._report = report
        self._insist = insist
        self._last = last
        self._describe = describe
        self._lock = threading.Lock()
        # Under `_lock`:
        self._begun = 0
        self._since = 0.0
        self._until: float | None = None
        self._code = 0
        self._reason = ""
        self._left = False
        # Set up in `__enter__`:
        self._resources = ExitStack()
        self._woken = self._news = -1
        self._thread: threading.Thread | None = None

    @property
    def code(self) -> int:
        """The exit code of an end that was begun: 0 after a signal, else what `begin` was given."""
        return self._code

    @property
    def reason(self) -> str:
        """Why the process ends, or nothing."""
        return self._reason

    def begin(self, code: int, reason: str, step: int = 0) -> None:
        """End without a signal, for a reason that is in the exit code. Does nothing where that step has begun."""
        with self._lock:
            if self._left or self._begun > step:
                return
            self._code, self._reason = code, reason
            self._advance(step)
            os.eventfd_write(self._news, 1)

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            # In this order: while the handlers are still those of before, a signal does what it did before.
            self._woken = resources.enter_context(waking_on_signals())
            self._news = os.eventfd(0, os.EFD_CLOEXEC)
            resources.callback(os.close, self._news)
            for number in self._numbers():
                resources.callback(signal.signal, number, signal.signal(number, lambda *_: None))
            resources.callback(atexit.unregister, self._note_over)
            atexit.register(self._note_over)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
            self._resources = resources.pop_all()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers())
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            # What was begun goes on: the deadline holds until the process is gone.
            if self._begun:
                return
            self._left = True
            os.eventfd_write(self._news, 1)
        if self._thread is not None:
            self._thread.join()
        self._resources.close()

    def _note_over(self) -> None:
        """The interpreter has joined its threads: what is left takes milliseconds, and has an exit code already."""
        if self._begun:
            # Python itself would have them end the process with another.
            for number in self._numbers():
                signal.signal(number, signal.SIG_IGN)

    def _numbers(self) -> list[signal.Signals]:
        return [
            signal.SIGTERM,
            signal.SIGINT,
            *([signal.SIGHUP] if self._reload else []),
            *([signal.SIGUSR1] if self._report else []),
        ]

    # The thread.

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        poll.register(self._news, select.POLLIN)
        while not self._left:
            ready = dict(poll.poll(self._milliseconds_left()))
            if self._woken in ready:
                for number in os.read(self._woken, 64):
                    self._hear(number)
            if self._news in ready:
                os.eventfd_read(self._news)
            if self._milliseconds_left() == 0:
                self._end(self._code or Exit.OVERDUE, overdue=True)

    def _milliseconds_left(self) -> float | None:
        until = self._until
        return None if until is None else max(0.0, (until - time.monotonic()) * 1000)

    def _hear(self, number: int) -> None:
        act = self._reload if number == signal.SIGHUP else self._report if number == signal.SIGUSR1 else None
        if act is not None:
            try:
                act()
            except Exception:
                # No thread can be had, say. This one has to hear the signals that come yet.
                log.exception("what %s asks for can't be done", signal.Signals(number).name)
        if number not in (signal.SIGTERM, signal.SIGINT):
            return
        now = time.monotonic()
        with self._lock:
            if self._left or (self._since and now - self._since < _SAME_SECONDS):
                return
            self._since = now
            if self._begun < len(self._steps):
                self._reason = self._reason or f"{signal.Signals(number).name} came"
                self._advance(self._begun)
                return
        if self._insist:
            self._end(128 + number)

    def _advance(self, step: int) -> None:
        """Begin a step; under the lock."""
        act, seconds = self._steps[step]
        self._begun = step + 1
        if seconds is not None:
            self._until = time.monotonic() + seconds
            signal.setitimer(signal.ITIMER_REAL, seconds + _SAY_SECONDS + _ALARM_SECONDS)
        act()

    def _end(self, code: int, *, overdue: bool = False) -> None:
        """End this process now; one that is overdue says what it was at, as far as that can be said."""
        try:
            self._last()
            if overdue:
                line = f"not ended in time, {self._reason}; under way: {self._describe()}"
                saying = threading.Thread(target=_say, args=(line,), daemon=True)
                saying.start()
                saying.join(_SAY_SECONDS)
        finally:
            os._exit(code)


def _say(line: str) -> None:
    # Not by way of sys.stderr: a thread that hangs may hold its lock.
    with suppress(OSError):
        os.write(2, f"casfs: {line}\n".encode())
    # Else logging prints it on standard error, once more.
    if log.hasHandlers():
        log.error("%s", line)
