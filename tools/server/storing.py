"""Blobs that came whole, on their way into the store: many at a time, and the loop is woken once for all of them.

The loop's thread adds them; a thread takes all that waits, up to a bound, has
it stored (`storing_process`), and gives the loop the results of the whole group. So a blob costs
the loop no task, no timer and no wake-up of its own, and the store one sync in
hundreds. A group is stored while the next one gathers.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence

from store.digest import Digest
from store.errors import StoreError, StoreUnusable
from store.uploads import STORING_MOST

Blob = tuple[Digest, bytes]
SettleGroup = Callable[[Sequence[Blob], Sequence["Exception | None"]], object]
"""Told in the loop's thread of blobs why each was refused, or None: it is durable."""
Store = Callable[[Sequence[Blob]], Sequence["StoreError | None"]]
"""Stores blobs, and says of each why it was refused; may raise what concerns all of them."""

_GROUP_BLOBS = 512
_GROUP_BYTES = 8 << 20


class Storing:
    """Of one loop. `blobs` and `bytes`: those that were added and aren't settled."""

    def __init__(self, store: Store, settle: SettleGroup) -> None:
        self._store = store
        self._settle_group = settle
        self._loop = asyncio.get_running_loop()
        self.blobs = 0
        self.bytes = 0
        self._changed = threading.Condition()
        # Under `_changed`:
        self._waiting: deque[Blob] = deque()
        self._idle = 0
        self._closed = False
        self._threads: list[threading.Thread] = []

    def add(self, blobs: Sequence[Blob]) -> None:
        """Have them stored."""
        self.blobs += len(blobs)
        self.bytes += _size(blobs)
        with self._changed:
            if self._closed:
                self._loop.call_soon(self._settle, blobs, StoreUnusable("this server is ending"))
                return
            self._waiting.extend(blobs)
            self._see_taken()

    def _see_taken(self) -> None:
        """Have a thread take what waits, if one is free. With `_changed` held."""
        if not self._waiting:
            return
        if self._idle:
            self._changed.notify()
        elif len(self._threads) < STORING_MOST:
            thread = threading.Thread(target=self._run, name="storing", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                # There may be no more of them. One that there is takes what waits.
                if not self._threads:
                    group = list(self._waiting)
                    self._waiting.clear()
                    self._loop.call_soon(self._settle, group, StoreUnusable(f"can't store: {error}"))
            else:
                self._threads.append(thread)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if not self._waiting:
                    return
                group = self._take()
                self._see_taken()
            try:
                results: Sequence[Exception | None] | Exception = self._store(group)
            except Exception as error:  # noqa: BLE001 - told to whoever waits
                results = error
            try:
                self._loop.call_soon_threadsafe(self._settle, group, results)
            except RuntimeError:
                return  # the loop has ended, and nobody waits

    def _take(self) -> list[Blob]:
        waiting, size = self._waiting, 0
        group: list[Blob] = []
        while waiting and len(group) < _GROUP_BLOBS and size < _GROUP_BYTES:
            blob = waiting.popleft()
            group.append(blob)
            size += len(blob[1])
        return group

    def _settle(self, group: Sequence[Blob], results: Sequence[Exception | None] | Exception) -> None:
        if isinstance(results, Exception):
            results = [results] * len(group)
        self.blobs -= len(group)
        self.bytes -= _size(group)
        self._settle_group(group, results)

    def close(self) -> None:
        """Store what waits, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()


def _size(blobs: Sequence[Blob]) -> int:
    return sum([len(data) for _, data in blobs])
