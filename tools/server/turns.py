"""The loop's time, shared among connections: who has much to do waits for who has little.

Each connection that has something to do gets a slice of about a millisecond in
turn; connections that had nothing lately come before those that are always
busy, so that a calm client's call doesn't wait behind a thousand uploads. This
is FQ-CoDel's scheduler (RFC 8290, section 4.2) with time in place of bytes: a
slice that took longer is paid for by turns left out. Between a few slices the
loop looks at its sockets again.

    turns.add(connection)       it has something to do
    connection.work(seconds)    called when it is its turn; whether there is more

Used in the loop's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

SLICE_SECONDS = 0.001
_ROUND_SECONDS = 0.004
"""Of work between two looks at the sockets."""
_AT_ONCE_SECONDS = 0.002
"""Of work that is done as it comes, while nobody waits."""
_PAUSE_SECONDS = 0.00005
"""Nothing to do for so long: the loop has looked at its sockets meanwhile."""


class Worker(Protocol):
    """Who takes turns. `debt` and `queued` belong to `Turns`; at first 0.0 and False."""

    debt: float
    queued: bool

    def work(self, seconds: float) -> bool:
        """Do something for about so long; whether there is more to do now. Mustn't raise."""
        ...


class Turns:
    """Of one loop."""

    def __init__(self, clock: Callable[[], float], call_soon: Callable[[Callable[[], None]], Any]) -> None:
        self._clock = clock
        self._call_soon = call_soon
        self._new: deque[Worker] = deque()
        self._old: deque[Worker] = deque()
        self._scheduled = False
        self._spent = 0.0
        self._ended = 0.0

    def __len__(self) -> int:
        """Those that wait for their turn."""
        return len(self._new) + len(self._old)

    def add(self, worker: Worker) -> None:
        """It has something to do: at once, where nobody waits."""
        if worker.queued:
            return
        if not self._new and not self._old:
            began = self._clock()
            if began - self._ended > _PAUSE_SECONDS:
                self._spent = 0.0
            if self._spent < _AT_ONCE_SECONDS:
                more = worker.work(SLICE_SECONDS)
                self._ended = ended = self._clock()
                self._spent += ended - began
                if not more:
                    return
                worker.debt = ended - began - SLICE_SECONDS
                worker.queued = True
                self._old.append(worker)
                self._schedule()
                return
        worker.queued = True
        worker.debt = 0.0
        self._new.append(worker)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        now = self._clock()
        end = now + _ROUND_SECONDS
        new, old = self._new, self._old
        while now < end:
            # Whoever is new stays for one more round, so that it isn't new again at once.
            stays = bool(new)
            if not stays and not old:
                self._ended, self._spent = now, _AT_ONCE_SECONDS
                return
            worker = (new or old).popleft()
            if worker.debt >= SLICE_SECONDS:
                worker.debt -= SLICE_SECONDS
                old.append(worker)
                continue
            more = worker.work(SLICE_SECONDS)
            done = self._clock()
            worker.debt = max(0.0, worker.debt + done - now - SLICE_SECONDS)
            now = done
            if more or stays:
                old.append(worker)
            else:
                worker.queued = False
        if new or old:
            self._schedule()
