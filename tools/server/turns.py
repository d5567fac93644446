"""The loop's time, shared among connections: who wants little of it goes before who wants much.

Of those that have something to do, connections with few calls under way go
first: a calm client's call doesn't wait behind a thousand uploads of others. But
one turn in four is for the rest, which so is never starved. Among equals the
next one is always that which has used least of the loop. A connection that comes
back after a while counts as having used no less than those that wait, however
long it was away: time that wasn't used isn't saved up. A new one counts as having
used a slice more, and no one for more than a few: a call that took long isn't
paid for by seconds of waiting. (This is fair queueing by virtual start times;
Linux's CFS did it so.)

    turns.add(connection)       it has something to do
    connection.work(seconds)    called when it is its turn; whether there is more

Between a few slices the loop looks at its sockets again. Used in the loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any, Protocol

SLICE_SECONDS = 0.001
_SLICE_LEAST = 0.0002
_AHEAD_MOST = 10 * SLICE_SECONDS
"""That a connection counts as having used more than those that wait, and that it is charged for one turn."""
_ROUND_SECONDS = 0.1
"""In which all that wait should have had their turn: slices are shorter where there are many."""
_HEAVY_EVERY = 4
"""One turn of so many is for who has much under way."""
_LOOK_SECONDS = 0.004
"""Of work between two looks at the sockets."""
_AT_ONCE_SECONDS = 0.002
"""Of work that is done as it comes, while nobody waits."""
_PAUSE_SECONDS = 0.00005
"""Nothing to do for so long: the loop has looked at its sockets meanwhile."""


class Worker(Protocol):
    """Who takes turns. `used` (seconds) and `queued` belong to `Turns`; at first -1.0 and False."""

    used: float
    queued: bool

    @property
    def is_light(self) -> bool:
        """It has few calls under way."""
        ...

    def work(self, seconds: float) -> bool:
        """Do something for about so long; whether there is more to do now. Mustn't raise."""
        ...


class _Line:
    """Those that wait, of one kind; each kind's use is a measure of its own, since they get unlike shares."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, int, Worker]] = []
        self.floor = 0.0
        """What whoever had the last turn had used before it; only grows."""

    def let_in(self, worker: Worker) -> None:
        """Have it count as having used no less than those that wait, nor much more: it may come of the other line."""
        worker.used = min(max(worker.used, self.floor), self.floor + _AHEAD_MOST)


class Turns:
    """Of one loop."""

    def __init__(
        self,
        clock: Callable[[], float],
        call_soon: Callable[[Callable[[], None]], Any],
    ) -> None:
        self._clock = clock
        self._call_soon = call_soon
        self._light = _Line()
        self._heavy = _Line()
        self._turn = 0
        self._numbers = count()
        self._scheduled = False
        self._working = False
        self._spent = 0.0
        self._ended = 0.0

    def __len__(self) -> int:
        """Those that wait for their turn."""
        return len(self._light.waiting) + len(self._heavy.waiting)

    def add(self, worker: Worker) -> None:
        """It has something to do: at once, where nobody waits or works."""
        if worker.queued:
            return
        line = self._line_of(worker)
        if worker.used < 0:
            worker.used = line.floor + SLICE_SECONDS
        # Whom another's work adds waits: done at once, it would add the next one, in frames that have no end.
        if not len(self) and not self._working:
            now = self._clock()
            if now - self._ended > _PAUSE_SECONDS:
                self._spent = 0.0
            if self._spent < _AT_ONCE_SECONDS:
                # It competes with nobody: what it has used is what others are compared with.
                line.let_in(worker)
                line.floor = worker.used
                more = self._have_worked(worker, SLICE_SECONDS)
                self._ended = self._clock()
                self._spent += self._ended - now
                if not more:
                    return
        self._wait(worker)

    def _line_of(self, worker: Worker) -> _Line:
        return self._light if worker.is_light else self._heavy

    def _have_worked(self, worker: Worker, seconds: float) -> bool:
        began = self._clock()
        self._working = True
        more = worker.work(seconds)
        self._working = False
        # By the clock, and no more than so much: an interruption mustn't be paid for by whoever it happened to, and
        # asking for the CPU's time takes as long as much of what is measured.
        worker.used += min(self._clock() - began, _AHEAD_MOST)
        return more and not worker.queued

    def _wait(self, worker: Worker) -> None:
        line = self._line_of(worker)
        line.let_in(worker)
        worker.queued = True
        heappush(line.waiting, (worker.used, next(self._numbers), worker))
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        light, heavy = self._light.waiting, self._heavy.waiting
        seconds = min(SLICE_SECONDS, max(_SLICE_LEAST, _ROUND_SECONDS / (len(self) or 1)))
        end = self._clock() + _LOOK_SECONDS
        while light or heavy:
            self._turn += 1
            line = self._heavy if heavy and (not light or not self._turn % _HEAVY_EVERY) else self._light
            line.floor, _, worker = heappop(line.waiting)
            worker.queued = False
            if self._have_worked(worker, seconds):
                self._wait(worker)
            if self._clock() >= end:
                break
        self._ended, self._spent = self._clock(), _AT_ONCE_SECONDS
        if (light or heavy) and not self._scheduled:
            self._scheduled = True
            self._call_soon(self._run)
