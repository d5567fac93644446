"""How large a store may get: space is reserved before anything is written, and room is made in the background.

    0 ............ low ............ high .... limit
                    collection ends  begins   nothing gets in

What is used is the sum of all blobs with a row, which the index keeps up to
date with every change, and of what has none (results of actions, files that
Bazel wrote, the cold tier): that is counted by each collection, and what this
process adds meanwhile by hand. So a reservation costs one look at the index,
whatever the size of the store.

Processes share what is used, not what is reserved: several that serve one
store can pass the limit by what the others are just writing. One collection
runs at a time, whoever began it.

Threads may share a `Quota`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from store.action_cache import ActionCache
from store.blobs import total_bytes
from store.errors import NoSpace, StoreError
from store.gc import Collected, Collector, unindexed_bytes
from store.index import Index
from store.layout import Layout

log = logging.getLogger("casfs")

_PATIENCE_SECONDS = 10.0
"""How long a reservation waits for a collection."""
_GRACE_SECONDS = 60
"""What was used within it stays: longer than `store.presence` vouches for a blob without looking."""
_PAUSE_SECONDS = 1.0
"""Between two collections, as each looks at every file: where all is in use there is nothing to gain from haste."""


class Reservation:
    """Space that was promised; a context manager, at whose end it is given back or has been used."""

    __slots__ = ("_quota", "_size")

    def __init__(self, quota: Quota | None, size: int) -> None:
        self._quota = quota
        self._size = size

    def cover(self, size: int) -> None:
        """See that at least so much is promised. Raises NoSpace."""
        if self._quota is not None and size > self._size:
            more = self._quota.reserve(size - self._size)
            self._size, more._quota = size, None

    def release(self) -> None:
        """Give it back; harmless when repeated."""
        if self._quota is not None:
            self._quota._release(self._size)
            self._quota = None

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Space(Protocol):
    """Who is asked before something is written."""

    def reserve(self, size: int, *, may_wait: bool = True) -> Reservation:
        """Promise so many bytes; without `may_wait` at once. Raises NoSpace."""
        ...

    def close(self) -> None: ...


class Unlimited:
    """As much as the disk has."""

    def reserve(self, size: int, *, may_wait: bool = True) -> Reservation:
        """Always."""
        return Reservation(None, size)

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes; `grace` in seconds: what was used within it is not collected."""

    limit: int
    high: int
    low: int
    grace: int = _GRACE_SECONDS

    @classmethod
    def below(cls, limit: int, grace: int = _GRACE_SECONDS) -> Limits:
        """Collections from nine tenths of a limit down to eight."""
        return cls(limit, limit * 9 // 10, limit * 8 // 10, grace)


class Quota:
    """Keeps one store below its limit."""

    def __init__(
        self,
        layout: Layout,
        index: Index,
        actions: ActionCache,
        collector: Collector,
        limits: Limits,
        patience: float = _PATIENCE_SECONDS,
        note: Callable[[Collected], object] = lambda done: None,
    ) -> None:
        """`patience`: seconds that a reservation waits for a collection. `note` is told what each did."""
        self._note = note
        self._index = index
        self._actions = actions
        self._collector = collector
        self._limits = limits
        self._patience = patience
        self._lock_path = layout.index / "collect.lock"
        self._changed = threading.Condition()
        # Under `_changed`:
        self._reserved = 0
        self._asked = 0
        """By those who wait."""
        self._wanted = False
        self._closed = False
        self._begun = 0
        self._ended = 0
        """Collections; they come one after the other."""
        self._counted_results = 0
        """What this process had written of action results when unindexed files were last counted."""
        self._thread: threading.Thread | None = None

    def used(self) -> int:
        """Bytes in the store, without what is reserved."""
        written = self._actions.written_bytes - self._counted_results
        return total_bytes(self._index) + unindexed_bytes(self._index) + written

    def reserve(self, size: int, *, may_wait: bool = True) -> Reservation:
        """Promise so many bytes, waiting for a collection where one is needed and may be waited for. Raises NoSpace."""
        if size > self._limits.limit:
            raise NoSpace(f"{size} bytes don't fit: the store may have {self._limits.limit} (--max-size)")
        with self._changed:
            self._asked += size
            try:
                self._wait_for_room(size, may_wait)
            finally:
                self._asked -= size
            self._reserved += size
        return Reservation(self, size)

    def _wait_for_room(self, size: int, may_wait: bool) -> None:
        deadline = time.monotonic() + self._patience
        # One that begins from now on; where that makes no room, another wouldn't either.
        enough = self._begun + 1
        while (needed := self.used() + self._reserved + size) > self._limits.limit:
            self._want_collection()
            hopeless = self._closed or self._ended >= enough or not may_wait
            if hopeless or not self._changed.wait(deadline - time.monotonic()):
                raise NoSpace(
                    f"no room for {size} bytes: the store has {self.used()} of {self._limits.limit} (--max-size), "
                    "and what could go doesn't suffice"
                )
        if needed > self._limits.high:
            self._want_collection()

    def _release(self, size: int) -> None:
        with self._changed:
            self._reserved -= size
            self._changed.notify_all()

    def _want_collection(self) -> None:
        self._wanted = True
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="collect", daemon=True)
            thread.start()
            self._thread = thread
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                self._wanted = False
                self._begun += 1
                excess = self._reserved + self._asked
            try:
                self._collect(excess)
            except (StoreError, OSError) as error:
                log.warning("collecting: %s", error)
            with self._changed:
                self._ended += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed, _PAUSE_SECONDS)

    def _collect(self, excess: int) -> None:
        """Bring the store down so far that what is reserved and asked for fits below the low mark, too."""
        low = max(self._limits.low - excess, 0)
        with self._alone():
            written = self._actions.written_bytes
            if self.used() + excess <= self._limits.high:
                return  # another process was faster
            done = self._collector.collect(low, low, grace=self._limits.grace)
            with self._changed:
                self._counted_results = written
        self._note(done)
        log.info("collected %d files with %d bytes", done.removed_blobs, done.removed_bytes)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One collection at a time, whatever process began it."""
        lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def close(self) -> None:
        """End the thread, after the collection it is at; harmless when repeated."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
