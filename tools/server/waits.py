"""What tasks wait for, for a person who asks why a call makes no progress.

    with waiting_for(Reason.TURN):
        await mine

A mark is an entry in a table as long as the block lasts; nothing reads it until a list of calls is made. Marks carry
the time at which they began, so a task that waits again and again has made progress in between.

Used in the loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Set
from concurrent.futures import Future
from enum import Enum
from typing import Any

from store.digest import Digest


class Reason(Enum):
    """What a call waits for, as it is written behind "waits for"."""

    MESSAGE = "its message"
    LOOP = "its turn in the loop"
    ROOM = "room in the store's threads"
    STORE = "the store"
    TURN = "a turn for a large upload"
    THREAD = "a free thread"
    WORK = "a thread at work (disk or source)"
    CLIENT = "the client to take the answer"
    EVENT = "an event (an action, a change)"


class waiting_for:  # noqa: N801 - reads as a statement
    """A mark of the current task. A class and not a generator, which would cost 1 µs for each piece of an upload."""

    __slots__ = ("_blobs", "_outer", "_reason", "_task", "_work", "since")

    def __init__(self, reason: Reason, *, work: Future[Any] | None = None, blobs: Collection[Digest] = ()) -> None:
        """`work`: what a pool of threads was given. `blobs`: what is on its way into the store, with `Reason.STORE`."""
        self._reason = reason
        self._work = work
        self._blobs = blobs
        self.since = time.monotonic()
        self._task: asyncio.Task[Any] | None = None
        self._outer: waiting_for | None = None

    def __enter__(self) -> None:
        self._task = task = asyncio.current_task()
        self._outer = _marks.get(task)
        _marks[task] = self

    def __exit__(self, *_: object) -> None:
        if self._outer is None:
            _marks.pop(self._task, None)
        else:
            _marks[self._task] = self._outer

    def find_reason(self, waiting: Set[Digest]) -> Reason:
        """What it is now; `waiting`: blobs for which the store's threads have no room."""
        if self._work is not None:
            return Reason.WORK if self._work.running() or self._work.done() else Reason.THREAD
        return find_place(self._blobs, waiting) if self._blobs else self._reason


_marks: dict[asyncio.Task[Any] | None, waiting_for] = {}


def find_mark(task: asyncio.Task[Any] | None) -> waiting_for | None:
    """What a task waits for, if it has said so."""
    return _marks.get(task)


def find_place(blobs: Collection[Digest], waiting: Set[Digest]) -> Reason:
    """Where blobs are on their way into the store; `waiting` as above."""
    return Reason.STORE if waiting.isdisjoint(blobs) else Reason.ROOM
