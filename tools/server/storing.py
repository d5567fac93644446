"""Blobs that came whole, on their way into the store: many at a time, and the loop is woken once for all of them.

The loop's thread adds them; a thread takes all that waits, up to a bound, has
it stored, and gives the loop the results of the whole group. So a blob costs
the loop no task, no timer and no wake-up of its own, and the store one sync in
hundreds. A group is stored while the next one gathers.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from store.digest import Digest
from store.errors import StoreError, StoreUnusable

Settle = Callable[["Exception | None"], object]
"""Told in the loop's thread why a blob was refused, or None: it is durable."""
Store = Callable[[Sequence[tuple[Digest, bytes]]], Sequence["StoreError | None"]]
"""Stores blobs, and says of each why it was refused; may raise what concerns all of them."""

_THREADS = 2
_GROUP_BLOBS = 512
_GROUP_BYTES = 8 << 20


class Whole(NamedTuple):
    """A blob with its bytes."""

    digest: Digest
    data: bytes
    settle: Settle


class Storing:
    """Of one loop. `blobs` and `bytes`: those that were added and aren't settled."""

    def __init__(self, store: Store, settled: Callable[[], object]) -> None:
        """`settled` is called in the loop's thread after each group."""
        self._store = store
        self._settled = settled
        self._loop = asyncio.get_running_loop()
        self.blobs = 0
        self.bytes = 0
        self._changed = threading.Condition()
        # Under `_changed`:
        self._waiting: deque[Whole] = deque()
        self._idle = 0
        self._closed = False
        self._threads: list[threading.Thread] = []

    def add(self, whole: Whole) -> None:
        """Have it stored."""
        self.blobs += 1
        self.bytes += len(whole.data)
        with self._changed:
            if self._closed:
                self._loop.call_soon(self._settle, [whole], StoreUnusable("this server is ending"))
                return
            self._waiting.append(whole)
            if self._idle:
                self._changed.notify()
            elif len(self._threads) < _THREADS:
                thread = threading.Thread(target=self._run, name="storing", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if not self._waiting:
                    return
                group = self._take()
            try:
                results: Sequence[Exception | None] | Exception = self._store(
                    [(whole.digest, whole.data) for whole in group]
                )
            except Exception as error:  # noqa: BLE001 - told to whoever waits
                results = error
            try:
                self._loop.call_soon_threadsafe(self._settle, group, results)
            except RuntimeError:
                return  # the loop has ended, and nobody waits

    def _take(self) -> list[Whole]:
        waiting, size = self._waiting, 0
        group: list[Whole] = []
        while waiting and len(group) < _GROUP_BLOBS and size < _GROUP_BYTES:
            whole = waiting.popleft()
            group.append(whole)
            size += len(whole.data)
        return group

    def _settle(self, group: Sequence[Whole], results: Sequence[Exception | None] | Exception) -> None:
        if isinstance(results, Exception):
            results = [results] * len(group)
        self.blobs -= len(group)
        for whole, refused in zip(group, results, strict=True):
            self.bytes -= len(whole.data)
            whole.settle(refused)
        self._settled()

    def close(self) -> None:
        """Store what waits, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()


def settle_future(done: asyncio.Future[Exception | None], refused: Exception | None) -> None:
    """A `Settle` for who awaits, with `done` as its first argument."""
    if not done.done():
        done.set_result(refused)
