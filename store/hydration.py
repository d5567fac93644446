"""Hydration: fetching a blob that is not in ``blobs/`` from the first source that has it.

`Hydrator.fetch` returns a future at once; nobody has to wait in a thread of
his own. Fetching a blob that is being fetched gives the same future
(single-flight); two processes that fetch the same blob both publish it, which
does no harm.

The parts:

- A *flight* is a blob on its way, with the future and what the sources said so far.
- A *lane* is a source with a few threads of its own: they ask it and take its
  bytes in, verified while they come (`store.ingest`). A source that hangs
  holds its lane's threads and nobody else's.
- The *tower* is one thread that decides everything: which source is next, when
  to publish (all that has arrived meanwhile together, as syncing is what
  costs), and who has been silent too long.

A fetch that made no progress for `timeout` seconds is given up: the next
source is tried, in the end the future fails. While all threads of a lane are
silent, its source is passed over. Nothing is remembered of a failure: the
next fetch tries again.

What is read and written by several threads: `_flights`, under `_lock`; an
attempt's `moved`, a plain number that its lane writes and the tower reads.
Everything else belongs to the tower. All threads are daemons: a hanging one
must not keep the process from ending.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial

from store.blobs import Blobs
from store.digest import Digest
from store.errors import CorruptBlob, DigestMismatch, MissingBlob, NoSpace, StoreError
from store.ingest import Ingest
from store.sources import Source, Stream

log = logging.getLogger("casfs")
# A mount logs to the store's log. In a command nobody listens: what failed is in the errors that it gets.
log.addHandler(logging.NullHandler())

DEFAULT_TIMEOUT = 30.0
_LANE_THREADS = 4
_LOOKS_PER_TIMEOUT = 10
_PIECE = 256 << 10


@dataclass(eq=False, slots=True)
class _Flight:
    """A blob on its way."""

    digest: Digest
    future: Future[None] = field(default_factory=Future)
    next_source: int = 0
    complaints: list[str] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Attempt:
    """One question to one source. `moved`: when it last made progress, 0 until its turn has come."""

    flight: _Flight
    lane: _Lane
    ingest: Ingest
    moved: float = 0.0
    abandoned: bool = False
    silent: bool = False
    """It was given up while a thread of its lane was at it, which counts as silent until it comes back."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How an attempt ended: `found`, or `error`, or neither where the source hasn't the blob."""

    attempt: _Attempt
    found: bool = False
    error: Exception | None = None


class _Abandoned(Exception):
    """Nobody waits for these bytes any more."""


class _Watched:
    """A stream that notes its progress, and stops when nobody waits for it any more."""

    def __init__(self, stream: Stream, attempt: _Attempt) -> None:
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


class _Lane:
    """A source and its threads, which start when it is first asked."""

    def __init__(self, source: Source, report: Callable[[_Outcome], None]) -> None:
        self.source = source
        self.silent = 0
        """Threads whose attempts were given up and that have not come back."""
        self._report = report
        self._queue: queue.SimpleQueue[_Attempt | None] = queue.SimpleQueue()
        self._started = False

    @property
    def is_stuck(self) -> bool:
        """Whether no thread is left that could ask."""
        return self.silent >= _LANE_THREADS

    def submit(self, attempt: _Attempt) -> None:
        """Have the source asked when a thread is free."""
        if not self._started:
            self._started = True
            for number in range(_LANE_THREADS):
                threading.Thread(target=self._work, name=f"source-{number}", daemon=True).start()
        self._queue.put(attempt)

    def close(self) -> None:
        """Have the threads end when they are free."""
        if self._started:
            for _ in range(_LANE_THREADS):
                self._queue.put(None)

    def _work(self) -> None:
        while (attempt := self._queue.get()) is not None:
            if attempt.abandoned:
                continue
            attempt.moved = time.monotonic()
            try:
                self._report(_Outcome(attempt, found=self._ask(attempt)))
            except Exception as error:  # noqa: BLE001 - the tower tells it to whoever waits
                self._report(_Outcome(attempt, error=error))

    def _ask(self, attempt: _Attempt) -> bool:
        """Take the blob in, if the source has it; it is not published yet."""
        digest = attempt.flight.digest
        supply = self.source.open(digest)
        if supply is None:
            return False
        with closing(supply.stream) as stream:
            if attempt.abandoned:
                raise _Abandoned
            watched = _Watched(stream, attempt)
            attempt.ingest.add_stream(watched, digest.function, digest, executable=supply.executable)
        return True


class Hydrator:
    """Fetches blobs for one store. Make it after a fork; `close` it."""

    def __init__(
        self,
        blobs: Blobs,
        make_ingest: Callable[[], Ingest],
        sources: Sequence[Source],
        *,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        """The sources are asked in this order. `timeout` is in seconds."""
        self._blobs = blobs
        self._make_ingest = make_ingest
        self._timeout = timeout
        self._events: queue.SimpleQueue[_Flight | _Outcome | None] = queue.SimpleQueue()
        self._lanes = [_Lane(source, self._events.put) for source in sources]
        self._lock = threading.Lock()
        # Under `_lock`:
        self._flights: dict[Digest, _Flight] = {}
        self._tower: threading.Thread | None = None
        self._closed = False
        # The tower's:
        self._active: set[_Attempt] = set()
        self._ingest: Ingest | None = None
        self._fetched_blobs = 0
        self._fetched_bytes = 0
        self._failed = 0

    def fetch(self, digest: Digest) -> Future[None]:
        """Begin to bring a blob in, or join who does; not to be cancelled.

        The future ends when the blob can be opened. It fails with MissingBlob,
        which says what each source answered, with NoSpace or StoreUnusable.
        """
        with self._lock:
            flight = self._flights.get(digest)
            if flight is not None:
                return flight.future
            flight = _Flight(digest)
            if self._closed:
                flight.future.set_exception(MissingBlob(f"no blob {digest}: the store is being closed"))
                return flight.future
            self._flights[digest] = flight
            if self._tower is None:
                self._tower = threading.Thread(target=self._run, name="hydrate", daemon=True)
                self._tower.start()
        self._events.put(flight)
        return flight.future

    def statistics(self) -> dict[str, int]:
        """What was fetched since the start, how often no source could help, and what is on its way."""
        return {
            "fetched_blobs": self._fetched_blobs,
            "fetched_bytes": self._fetched_bytes,
            "failed_fetches": self._failed,
            "fetching": len(self._flights),
        }

    def close(self) -> None:
        """Fail what is on its way and end the threads, but for those that hang; harmless when repeated."""
        with self._lock:
            self._closed = True
            tower = self._tower
        if tower is not None:
            self._events.put(None)
            tower.join(self._timeout)

    # The tower's thread.

    def _run(self) -> None:
        while True:
            events = self._wait_events()
            arrived = []
            for event in events:
                if isinstance(event, _Flight):
                    self._advance(event)
                elif event is not None and self._judge(event):
                    arrived.append(event.attempt)
            if arrived:
                self._publish(arrived)
            self._give_up_silent()
            self._close_ingest_when_idle()
            if None in events:
                self._end()
                return

    def _wait_events(self) -> list[_Flight | _Outcome | None]:
        """What has happened since the last call, at least one event unless it is time to look who is silent."""
        events = []
        with suppress(queue.Empty):
            events.append(self._events.get(timeout=self._timeout / _LOOKS_PER_TIMEOUT if self._active else None))
            while True:
                events.append(self._events.get_nowait())
        return events

    def _advance(self, flight: _Flight) -> None:
        """Ask the next source, or give up."""
        if self._blobs.has_file(flight.digest):
            # Somebody was faster, and perhaps took the cold file away.
            self._finish(flight)
            return
        while flight.next_source < len(self._lanes):
            lane = self._lanes[flight.next_source]
            flight.next_source += 1
            if lane.is_stuck:
                flight.complaints.append(f"{lane.source.label}: doesn't answer")
                continue
            try:
                if self._ingest is None:
                    self._ingest = self._make_ingest()
            except (StoreError, OSError) as error:
                self._fail(flight, error)
                return
            attempt = _Attempt(flight, lane, self._ingest)
            self._active.add(attempt)
            lane.submit(attempt)
            return
        said = f" ({'; '.join(flight.complaints)})" if flight.complaints else ""
        self._fail(flight, MissingBlob(f"no blob {flight.digest} in the store, nor in any of its sources{said}"))

    def _judge(self, outcome: _Outcome) -> bool:
        """Whether an attempt has brought its blob; if not, see to what comes next."""
        attempt, error = outcome.attempt, outcome.error
        flight, source = attempt.flight, attempt.lane.source
        if attempt.abandoned:
            attempt.lane.silent -= attempt.silent
            return False
        if outcome.found:
            return True
        self._active.discard(attempt)
        if isinstance(error, DigestMismatch | CorruptBlob):
            log.error("%s has wrong bytes for blob %s: %s", source.label, flight.digest, error)
            flight.complaints.append(f"{source.label}: its copy is damaged")
            self._tell(source.label, partial(source.rejected, flight.digest))
        elif isinstance(error, NoSpace):
            self._fail(flight, error)
            return False
        elif error is not None:
            log.warning("%s failed for blob %s: %s", source.label, flight.digest, error)
            flight.complaints.append(f"{source.label}: {error}")
        self._advance(flight)
        return False

    def _publish(self, arrived: list[_Attempt]) -> None:
        self._active.difference_update(arrived)
        try:
            # Not `self._ingest`, which is the same: what has arrived was active until now.
            arrived[0].ingest.flush()
        except Exception as error:  # noqa: BLE001 - told to whoever waits
            for attempt in arrived:
                self._fail(attempt.flight, error)
            return
        for lane in self._lanes:
            digests = [attempt.flight.digest for attempt in arrived if attempt.lane is lane]
            if digests:
                self._tell(lane.source.label, partial(lane.source.accepted, digests))
        self._close_ingest_when_idle()
        for attempt in arrived:
            self._fetched_blobs += 1
            self._fetched_bytes += attempt.flight.digest.size
            self._finish(attempt.flight)

    def _close_ingest_when_idle(self) -> None:
        """Collections spare what was used since the oldest ingest began: it must not live for ever."""
        if not self._active and self._ingest is not None:
            self._ingest.close()
            self._ingest = None

    @staticmethod
    def _tell(label: str, call: Callable[[], None]) -> None:
        """Tell a source something; whether that works matters to nobody who waits."""
        try:
            call()
        except (StoreError, OSError) as error:
            log.warning("%s: %s", label, error)

    def _give_up_silent(self) -> None:
        limit = time.monotonic() - self._timeout
        silent = [attempt for attempt in self._active if 0 < attempt.moved < limit]
        for attempt in silent:
            attempt.lane.silent += 1
            attempt.silent = True
        stuck = {id(attempt.lane) for attempt in silent if attempt.lane.is_stuck}
        # With a lane that is stuck, those that wait for their turn there would wait for ever.
        silent += [attempt for attempt in self._active if not attempt.moved and id(attempt.lane) in stuck]
        for attempt in silent:
            self._active.discard(attempt)
            attempt.abandoned = True
            attempt.flight.complaints.append(f"{attempt.lane.source.label}: no answer in {self._timeout:g} s")
            self._advance(attempt.flight)

    def _finish(self, flight: _Flight) -> None:
        self._forget(flight)
        flight.future.set_result(None)

    def _fail(self, flight: _Flight, error: Exception) -> None:
        self._failed += 1
        self._forget(flight)
        flight.future.set_exception(error)

    def _forget(self, flight: _Flight) -> None:
        """Before its future ends: who fetches from now on begins anew."""
        with self._lock:
            self._flights.pop(flight.digest, None)

    def _end(self) -> None:
        for attempt in self._active:
            attempt.abandoned = True
        with self._lock:
            flights = list(self._flights.values())
        for flight in flights:
            self._fail(flight, MissingBlob(f"no blob {flight.digest}: the store is being closed"))
        for lane in self._lanes:
            lane.close()
        if self._ingest is not None:
            self._ingest.close()
            self._ingest = None
