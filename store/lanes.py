"""Lanes: a source and the threads that ask it. What they are for, and who decides, is `store.hydration`'s.

What is read and written by several threads: an attempt's `moved` and
`abandoned`, plain values; a lane's queue. Everything else belongs to the tower.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field

from store.digest import Digest
from store.ingest import Ingest
from store.sources import BatchSource, Source, Stream, Supply

_LANE_THREADS = 4
_PIECE = 256 << 10


@dataclass(eq=False, slots=True)
class Flight:
    """A blob on its way."""

    digest: Digest
    future: Future[None] = field(default_factory=Future)
    next_source: int = 0
    complaints: list[str] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Attempt:
    """One question to one source. `moved`: when it last made progress, 0 until its turn has come."""

    flight: Flight
    lane: Lane
    ingest: Ingest
    moved: float = 0.0
    abandoned: bool = False
    round: object = None
    """What its lane's thread is at, with others perhaps: the thread of a given up round is silent until it is back."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: `found`, or `error`, or neither where the source hasn't the blob."""

    attempt: Attempt
    found: bool = False
    error: Exception | None = None


class _Abandoned(Exception):
    """Nobody waits for these bytes any more."""


class _Watched:
    """A stream that notes its progress, and stops when nobody waits for it any more."""

    def __init__(self, stream: Stream, attempt: Attempt) -> None:
        self._stream = stream
        self._attempt = attempt

    def read(self, size: int, /) -> bytes:
        """As the stream's."""
        # In small pieces: over a slow network each is progress.
        data = self._stream.read(min(size, _PIECE))
        if self._attempt.abandoned:
            raise _Abandoned
        self._attempt.moved = time.monotonic()
        return data


class Lane:
    """A source and its threads, which start when it is first asked."""

    def __init__(self, source: Source, report: Callable[[Outcome], None]) -> None:
        self.source = source
        self.silent: set[object] = set()
        """Rounds of which attempts were given up, and whose threads have not come back."""
        self._report = report
        self._queue: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self._threads = 0

    @property
    def is_stuck(self) -> bool:
        """Whether no thread is left that could ask."""
        return len(self.silent) >= _LANE_THREADS

    def submit(self, attempt: Attempt) -> None:
        """Have the source asked when a thread is free. Raises RuntimeError where no thread can be started."""
        try:
            while self._threads < _LANE_THREADS:
                threading.Thread(target=self._work, name=f"source-{self._threads}", daemon=True).start()
                self._threads += 1
        except RuntimeError:
            if not self._threads:
                raise
        self._queue.put(attempt)

    def close(self) -> None:
        """Have the threads end when they are free."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _work(self) -> None:
        # None is held here while the next one is waited for: it refers to all that its failure went through.
        while self._ask(self._queue.get()):
            pass

    def _ask(self, first: Attempt | None) -> bool:
        """Answer it, and what can be asked for with it; whether there will be more."""
        if first is None:
            return False
        attempts = [one for one in self._gather(first) if not one.abandoned]
        now, this_round = time.monotonic(), object()
        for attempt in attempts:
            attempt.round, attempt.moved = this_round, now
        for attempt, answer in zip(attempts, self._open(attempts), strict=True):
            attempt.moved = time.monotonic()
            try:
                self._report(Outcome(attempt, found=self._take(attempt, answer)))
            except Exception as error:  # noqa: BLE001 - the tower tells it to whoever waits
                self._report(Outcome(attempt, error=error))
        return True

    def _gather(self, first: Attempt) -> list[Attempt]:
        """What the source is asked for at a time: for a batch, all that waits."""
        attempts = [first]
        if isinstance(self.source, BatchSource):
            with suppress(queue.Empty):
                size = first.flight.digest.size
                while len(attempts) < self.source.most_together and size < self.source.most_bytes:
                    attempt = self._queue.get_nowait()
                    if attempt is None:
                        self._queue.put(None)
                        break
                    attempts.append(attempt)
                    size += attempt.flight.digest.size
        return attempts

    def _open(self, attempts: Sequence[Attempt]) -> Sequence[Supply | Exception | None]:
        digests = [attempt.flight.digest for attempt in attempts]
        try:
            if isinstance(self.source, BatchSource):
                return self.source.open_all(digests)
            return [self.source.open(digest) for digest in digests]
        except Exception as error:  # noqa: BLE001 - the tower tells it to whoever waits
            return [error] * len(digests)

    def _take(self, attempt: Attempt, answer: Supply | Exception | None) -> bool:
        """Take the blob in, if the source has it; it is not published yet."""
        if answer is None:
            return False
        if isinstance(answer, Exception):
            raise answer
        digest, supply = attempt.flight.digest, answer
        with closing(supply.stream) as stream:
            if attempt.abandoned:
                raise _Abandoned
            watched = _Watched(stream, attempt)
            attempt.ingest.add_stream(watched, digest.function, digest, executable=supply.executable)
        return True
