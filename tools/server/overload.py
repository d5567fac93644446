"""Overload, said once: a line when it begins, a line when it ends, numbers in between.

A server is overloaded when it has stopped reading connections as too much waits (`tools.server.load`), or when a call
or an upload has waited longer than `LONG_SECONDS`. It is no longer overloaded when neither was so for `CLEAR_SECONDS`.
It is looked at every `LOOK_SECONDS`, so calls cost nothing for it.

Used in the loop's thread, but for `pressure` and `is_on`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from tools.output import count, format_size

log = logging.getLogger("casfs.serve")

LONG_SECONDS = 1.0
CLEAR_SECONDS = 5.0
LOOK_SECONDS = 1.0


class Pressure(NamedTuple):
    """What a server has taken in and isn't done with.

    `calls` and `bytes`: of calls, and of blobs of calls, that wait for their turn. `uploads`: those that wait to be
    taken piece by piece. `storing`: blobs that the store's threads have. `unread`: connections that are not read.
    """

    calls: int = 0
    bytes: int = 0
    uploads: int = 0
    storing: int = 0
    unread: int = 0

    def most(self, other: Pressure) -> Pressure:
        """The larger of each number."""
        return Pressure(*map(max, self, other))

    def __str__(self) -> str:
        are = "is" if self.unread == 1 else "are"
        return (
            f"{count(self.calls, 'call')} and {count(self.uploads, 'upload')} wait ({format_size(self.bytes)}), "
            f"{count(self.unread, 'connection')} {are} not read"
        )


class Watched(Protocol):
    """A server."""

    def pressure(self) -> Pressure:
        """What waits now. For any thread."""
        ...

    def oldest_wait(self, now: float) -> float:
        """For how many seconds the oldest of it has waited, by the monotonic clock."""
        ...

    def take_full(self) -> bool:
        """Whether connections were not read at some time since the last call."""
        ...


class Overload:
    """Whether a server is overloaded."""

    def __init__(
        self,
        server: Watched,
        began: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`began` is called when an overload begins."""
        self._server = server
        self._began = began
        self._clock = clock
        self.is_on = False
        self._since = 0.0
        self._last = 0.0
        """When it was last seen."""
        self._most = Pressure()
        self._longest = 0.0

    def pressure(self) -> Pressure:
        """What waits now. For any thread."""
        return self._server.pressure()

    def look(self) -> None:
        """See whether it begins, goes on or ends."""
        now = self._clock()
        pressure, oldest = self._server.pressure(), self._server.oldest_wait(now)
        full = self._server.take_full()
        if full or oldest > LONG_SECONDS:
            if not self.is_on:
                self._begin(now, pressure, oldest)
            self._last = now
        if self.is_on:
            self._most = self._most.most(pressure)
            self._longest = max(self._longest, oldest)
            if now - self._last >= CLEAR_SECONDS:
                self.end()

    def _begin(self, now: float, pressure: Pressure, oldest: float) -> None:
        self.is_on = True
        self._since = now
        self._most, self._longest = Pressure(), 0.0
        self._began()
        log.warning(
            "overloaded: %s, the oldest for %.1f s. Calls are answered in turn, none is refused; clients give up at "
            "their own deadlines. If this happens often: longer deadlines (Bazel: --remote_timeout), more --processes, "
            "a faster disk. SIGUSR1 lists the calls; see docs/overload.md",
            pressure,
            oldest,
        )

    def end(self) -> None:
        """It is over, or the server ends."""
        if self.is_on:
            self.is_on = False
            log.info(
                "no longer overloaded, after %.0f s; at most %s, the oldest for %.1f s",
                self._clock() - self._since,
                self._most,
                self._longest,
            )
