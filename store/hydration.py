"""Hydration: fetching a blob that is not in ``blobs/`` from the first source that has it.

`Hydrator.fetch` returns a future at once; nobody has to wait in a thread of
his own. Fetching a blob that is being fetched gives the same future
(single-flight); two processes that fetch the same blob both publish it, which
does no harm.

The parts:

- A *flight* is a blob on its way, with the future and what the sources said so far.
- A *lane* (`store.lanes`) is a source with a few threads of its own: they ask it and take its
  bytes in, verified while they come (`store.ingest`). A source that hangs
  holds its lane's threads and nobody else's. A `BatchSource` is asked for all
  that waits for a free thread at that moment: nobody waits for others to come.
- The *tower* is one thread that decides everything: which source is next, when
  to publish (all that has arrived meanwhile together, as syncing is what
  costs), and who has been silent too long.

A fetch that made no progress for `timeout` seconds is given up: the next
source is tried, in the end the future fails. While all threads of a lane are
silent, its source is passed over. Nothing is remembered of a failure: the
next fetch tries again.

What is read and written by several threads: `_flights` and `_noting`, under `_lock`; an
attempt's `moved`, a plain number that its lane writes and the tower reads.
Everything else belongs to the tower. All threads are daemons: a hanging one
must not keep the process from ending.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial

from store.blobs import Blobs
from store.digest import Digest
from store.errors import CorruptBlob, DigestMismatch, MissingBlob, NoSpace, StoreError
from store.ingest import Ingest
from store.lanes import Attempt, Flight, Lane, Outcome
from store.sources import DEFAULT_TIMEOUT, Source

log = logging.getLogger("casfs")
# A mount logs to the store's log. In a command nobody listens: what failed is in the errors that it gets.
log.addHandler(logging.NullHandler())

_LOOKS_PER_TIMEOUT = 10


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
        self._events: queue.SimpleQueue[Flight | Outcome | None] = queue.SimpleQueue()
        self._lanes = [Lane(source, self._events.put) for source in sources]
        self._lock = threading.Lock()
        # Under `_lock`:
        self._flights: dict[Digest, Flight] = {}
        self._tower: threading.Thread | None = None
        self._closed = False
        self._busy = 0.0
        self._busy_since: float | None = None
        self._noting: list[set[Digest]] = []
        # The tower's:
        self._active: set[Attempt] = set()
        self._ingest: Ingest | None = None
        self._fetched_blobs = 0
        self._fetched_bytes = 0
        self._failed = 0

    def fetch(self, digest: Digest, *, ahead: bool = False) -> Future[None]:
        """Begin to bring a blob in, or join who does; not to be cancelled. `ahead`: nobody has opened it.

        The future ends when the blob can be opened. It fails with MissingBlob,
        which says what each source answered, with NoSpace or StoreUnusable.
        """
        with self._lock:
            if not ahead:
                for noted in self._noting:
                    noted.add(digest)
            flight = self._flights.get(digest)
            if flight is not None:
                return flight.future
            flight = Flight(digest)
            if self._closed:
                flight.future.set_exception(MissingBlob(f"no blob {digest}: the store is being closed"))
                return flight.future
            if self._tower is None:
                tower = threading.Thread(target=self._run, name="hydrate", daemon=True)
                tower.start()
                self._tower = tower
            self._flights[digest] = flight
            if self._busy_since is None:
                self._busy_since = time.monotonic()
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

    @contextmanager
    def noting(self) -> Iterator[set[Digest]]:
        """Gets the blobs that were opened meanwhile, by anybody, and had to be fetched."""
        noted: set[Digest] = set()
        with self._lock:
            self._noting.append(noted)
        try:
            yield noted
        finally:
            with self._lock:
                self._noting = [other for other in self._noting if other is not noted]

    def busy_seconds(self) -> float:
        """For how long, in all, something was on its way."""
        with self._lock:
            since = self._busy_since
            return self._busy + (0.0 if since is None else time.monotonic() - since)

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
        # Here no flight is held while the next one is waited for: it refers to all that its failure went through.
        while self._handle(self._wait_events()):
            pass
        self._end()

    def _handle(self, events: Sequence[Flight | Outcome | None]) -> bool:
        """Go on with what these are of; whether there will be more."""
        arrived = []
        for event in events:
            if isinstance(event, Flight):
                self._advance(event)
            elif event is not None and self._judge(event):
                arrived.append(event.attempt)
        if arrived:
            self._publish(arrived)
        self._give_up_silent()
        self._close_ingest_when_idle()
        return None not in events

    def _wait_events(self) -> list[Flight | Outcome | None]:
        """What has happened since the last call, at least one event unless it is time to look who is silent."""
        events = []
        with suppress(queue.Empty):
            events.append(self._events.get(timeout=self._timeout / _LOOKS_PER_TIMEOUT if self._active else None))
            while True:
                events.append(self._events.get_nowait())
        return events

    def _advance(self, flight: Flight) -> None:
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
            attempt = Attempt(flight, lane, self._ingest)
            self._active.add(attempt)
            try:
                lane.submit(attempt)
            except RuntimeError as error:
                self._active.discard(attempt)
                flight.complaints.append(f"{lane.source.label}: {error}")
                continue
            return
        said = f" ({'; '.join(flight.complaints)})" if flight.complaints else ""
        self._fail(flight, MissingBlob(f"no blob {flight.digest} in the store, nor in any of its sources{said}"))

    def _judge(self, outcome: Outcome) -> bool:
        """Whether an attempt has brought its blob; if not, see to what comes next."""
        attempt, error = outcome.attempt, outcome.error
        flight, source = attempt.flight, attempt.lane.source
        if attempt.abandoned:
            attempt.lane.silent.discard(attempt.round)
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

    def _publish(self, arrived: list[Attempt]) -> None:
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
            attempt.lane.silent.add(attempt.round)
        stuck = {id(attempt.lane) for attempt in silent if attempt.lane.is_stuck}
        # With a lane that is stuck, those that wait for their turn there would wait for ever.
        silent += [attempt for attempt in self._active if not attempt.moved and id(attempt.lane) in stuck]
        for attempt in silent:
            self._active.discard(attempt)
            attempt.abandoned = True
            attempt.flight.complaints.append(f"{attempt.lane.source.label}: no answer in {self._timeout:g} s")
            self._advance(attempt.flight)

    def _finish(self, flight: Flight) -> None:
        self._forget(flight)
        flight.future.set_result(None)

    def _fail(self, flight: Flight, error: Exception) -> None:
        self._failed += 1
        self._forget(flight)
        flight.future.set_exception(error)

    def _forget(self, flight: Flight) -> None:
        """Before its future ends: who fetches from now on begins anew."""
        with self._lock:
            self._flights.pop(flight.digest, None)
            if not self._flights and self._busy_since is not None:
                self._busy += time.monotonic() - self._busy_since
                self._busy_since = None

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
