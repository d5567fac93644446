"""Unexpected errors in the log: each once, with its traceback, and then how often it came again.

A bug or a broken disk fails every call alike, and formatting a traceback costs more than the call: thousands a second
would slow the server down and fill the disk with one message. Errors of one type from one line of code are one fault.

Used by any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

SECONDS = 60.0
_MOST = 128
"""Faults that are counted at a time. The oldest makes room for another."""

_Key = tuple[type[BaseException], str, int]


@dataclass(slots=True)
class _Fault:
    """`since` is of the clock; `where` for the line that says how often it came again."""

    since: float
    where: str
    again: int = 0


class FaultLog:
    """Logs errors to one logger."""

    def __init__(
        self, log: logging.Logger, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """A fault is counted for so many `seconds` after it was logged; the next one is then logged as the first."""
        self._log = log
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        # Under `_lock`:
        self._faults: OrderedDict[_Key, _Fault] = OrderedDict()
        self._timer: threading.Timer | None = None

    def note(self, error: BaseException, text: str, *arguments: object) -> None:
        """Log it, or count it. `text` and `arguments` are those of a log call; a traceback follows."""
        key = _key_of(error)
        now = self._clock()
        with self._lock:
            over = self._take_over(now)
            fault = self._faults.get(key)
            if fault is None:
                self._faults[key] = _Fault(now, f"{key[0].__name__} at {key[1]}:{key[2]}")
                if len(self._faults) > _MOST:
                    over.append(self._faults.popitem(last=False)[1])
            else:
                fault.again += 1
                self._start_timer()
        self._tell(over)
        if fault is None:
            self._log.error(text, *arguments, exc_info=error)

    def flush(self) -> None:
        """Say what was only counted so far, and forget it."""
        with self._lock:
            over = list(self._faults.values())
            self._faults.clear()
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        self._tell(over)

    def _take_over(self, now: float) -> list[_Fault]:
        """Those whose time is over, the oldest first; under the lock."""
        over = []
        while self._faults and now - next(iter(self._faults.values())).since >= self._seconds:
            over.append(self._faults.popitem(last=False)[1])
        return over

    def _start_timer(self) -> None:
        """Have the count said when its time is over, also if no other error comes; under the lock."""
        if self._timer is None:
            timer = threading.Timer(self._seconds, self._expire)
            timer.daemon = True
            # No thread can be had: then the next error has it said, or the end.
            with suppress(RuntimeError):
                timer.start()
                self._timer = timer

    def _expire(self) -> None:
        with self._lock:
            self._timer = None
            over = self._take_over(self._clock())
            if any(fault.again for fault in self._faults.values()):
                self._start_timer()
        self._tell(over)

    def _tell(self, faults: list[_Fault]) -> None:
        for fault in faults:
            if fault.again:
                seconds = min(self._clock() - fault.since, self._seconds)
                self._log.error("%s: %d more times in %.0f s", fault.where, fault.again, seconds)


def _key_of(error: BaseException) -> _Key:
    """Its type, and the line that raised it."""
    raised = error.__traceback__
    if raised is None:
        return type(error), "?", 0
    while raised.tb_next is not None:
        raised = raised.tb_next
    return type(error), raised.tb_frame.f_code.co_filename, raised.tb_lineno
