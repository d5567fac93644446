"""The calls that are under way: how old, and what each waits for; for a log, a page and a person.

Transports are asked for theirs when somebody wants the list, so a call costs nothing for it but the times of its begin
and of its last step, which its transport knows anyway. Calls that are alike are one line.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from concurrent.futures import Future
from typing import NamedTuple

from store.digest import Digest
from tools.output import count
from tools.server.under_way import describe_threads
from tools.server.waits import Reason

log = logging.getLogger("casfs.serve")

LINES_MOST = 100
STALLED_SECONDS = 10.0
"""Without progress; then a call gets a line in a log that has debug lines."""
_ASK_SECONDS = 5.0
"""What the loop has to answer."""


class CallUnderWay(NamedTuple):
    """One call. `began` and `moved` (its last progress) by the monotonic clock; `key` tells it apart from others."""

    key: Hashable
    method: str
    client: str
    connection: int
    began: float
    moved: float
    reason: Reason


Source = Callable[[Set[Digest]], Iterable[CallUnderWay]]
"""Lists the calls of one transport. It is given the blobs for which the store's threads have no room."""


class Group(NamedTuple):
    """Calls that are alike; in seconds: the ages of the oldest and the youngest, the longest time without progress.

    `connections`: their numbers, in order.
    """

    method: str
    client: str
    reason: Reason
    connections: tuple[int, ...]
    number: int
    oldest: float
    youngest: float
    stalled: float

    @property
    def where(self) -> str:
        """Their connections: the number of the only one, or how many."""
        one, *others = self.connections
        return f"{len(self.connections):,} connections" if others else f"connection {one}"

    def __str__(self) -> str:
        whose = f"{self.method} from {self.client or 'a local client'}, {self.where}"
        if self.number == 1:
            what = f"{self.oldest:.1f} s old, {self.stalled:.1f} s without progress, waits"
        else:
            what = (
                f"{count(self.number, 'call')}, {self.youngest:.1f} to {self.oldest:.1f} s old, "
                f"up to {self.stalled:.1f} s without progress, wait"
            )
        return f"{whose}: {what} for {self.reason.value}"


def group(calls: Sequence[CallUnderWay], now: float) -> list[Group]:
    """Those that are alike together, the oldest first. Of many connections, those of a client are put together."""
    groups = _group(calls, now, lambda call: (call.method, call.client, call.reason, call.connection))
    if len(groups) > LINES_MOST:
        return _group(calls, now, lambda call: (call.method, call.client, call.reason))
    return groups


def _group(calls: Sequence[CallUnderWay], now: float, kind: Callable[[CallUnderWay], Hashable]) -> list[Group]:
    alike: dict[Hashable, list[CallUnderWay]] = {}
    for call in calls:
        alike.setdefault(kind(call), []).append(call)
    groups = [
        Group(
            those[0].method,
            those[0].client,
            those[0].reason,
            connections=tuple(sorted({call.connection for call in those})),
            number=len(those),
            oldest=now - min(call.began for call in those),
            youngest=now - max(call.began for call in those),
            stalled=now - min(call.moved for call in those),
        )
        for those in alike.values()
    ]
    return sorted(groups, key=lambda one: -one.oldest)


def count_rest(groups: Sequence[Group], most: int) -> int:
    """Calls of the groups after the first `most`."""
    return sum(one.number for one in groups[most:])


class CallsUnderWay:
    """Those of one loop, from all transports that were added."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._sources: list[Source] = []
        self._find_waiting: Callable[[], Set[Digest]] = frozenset
        self._said: set[Hashable] = set()

    def add(self, source: Source) -> None:
        """List its calls, too."""
        self._sources.append(source)

    def watch_gate(self, find_waiting: Callable[[], Set[Digest]]) -> None:
        """Tell apart what waits for room in the store's threads, by the blobs that do."""
        self._find_waiting = find_waiting

    # In the loop's thread.

    def find(self) -> list[CallUnderWay]:
        """All calls."""
        waiting = self._find_waiting()
        return [call for source in self._sources for call in source(waiting)]

    def look(self) -> None:
        """Write a debug line for each call that makes no progress, once; to be called every second or so."""
        if not log.isEnabledFor(logging.DEBUG):
            return
        now = time.monotonic()
        stalled = [call for call in self.find() if now - call.moved >= STALLED_SECONDS]
        for call in stalled:
            if call.key not in self._said:
                log.debug("no progress: %s", group([call], now)[0])
        # A call that moved on and stops again has its line already, but its key must not be kept for ever.
        self._said = {call.key for call in stalled}

    # In any other thread.

    def ask(self) -> list[Group]:
        """The calls in groups, from another thread. Raises TimeoutError where the loop doesn't answer."""
        answer: Future[list[CallUnderWay]] = Future()
        try:
            self._loop.call_soon_threadsafe(self._answer, answer)
        except RuntimeError:
            return []  # the loop has ended
        return group(answer.result(_ASK_SECONDS), time.monotonic())

    def _answer(self, answer: Future[list[CallUnderWay]]) -> None:
        if answer.set_running_or_notify_cancel():
            try:
                answer.set_result(self.find())
            except Exception as error:  # noqa: BLE001 - raised where it was asked for
                answer.set_exception(error)

    def report(self) -> None:
        """Write the list to the log, in a thread of its own: a loop or a disk that hangs doesn't hold up the caller."""
        threading.Thread(target=self._report, name="report", daemon=True).start()

    def _report(self) -> None:
        # Whoever asked wants an answer, whatever level the log has.
        level = max(logging.INFO, log.getEffectiveLevel())
        try:
            groups = self.ask()
        except TimeoutError:
            said = describe_threads()
            log.log(level, "SIGUSR1: the event loop has not answered in %g s; threads: %s", _ASK_SECONDS, said)
            return
        number = count(count_rest(groups, 0), "call")
        log.log(level, "SIGUSR1: %s under way; threads: %s", number, describe_threads())
        for one in groups[:LINES_MOST]:
            log.log(level, "under way: %s", one)
        if rest := count_rest(groups, LINES_MOST):
            log.log(level, "under way: and %s more", count(rest, "call"))
