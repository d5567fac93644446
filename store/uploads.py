"""Blobs from many clients at once: streamed to disk, published in groups.

A blob that was acknowledged is durable, and that costs syncs. So whoever has
finished a blob waits for the *committer*, one thread that publishes all that
was finished meanwhile at once: while it syncs one group, the next one gathers.
One client alone waits for its own sync and for nothing else. Where one group
can't be published, only those hear of it that wait for it.

    upload = uploads.begin(digest)      space is reserved; NoSpace if there is none
    upload = uploads.begin_hashed(hash) where neither function nor size are known: space as it grows
    upload.write(data)                  hashed, written; in pieces of any size
    upload.finish()                     durable when it returns; DigestMismatch if it isn't what was said

Two uploads of one blob both run, as neither can know whether the other's
client will get to its end; one of them is published.

Blobs that are in memory are stored many at a time (`add_all`), elsewhere if there is somebody who does it.

Threads may share `Uploads`; an `Upload` is used by one at a time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from store.digest import Digest
from store.errors import NoSpace, StoreError, StoreUnusable
from store.ingest import Ingest
from store.publication import Pending
from store.quota import Reservation, Space
from store.writer import Claim, Exactly, Hashed, discard

STORING_MOST = 2
"""Batches that are stored at a time: one is written while the other is synced. More would fight for the interpreter,
which each call into the kernel lets go of."""
_GROUP_MOST = 512
"""Blobs that are published at a time."""


StoreElsewhere = Callable[[Sequence[tuple[Digest, bytes]]], Sequence["StoreError | None"] | None]
"""Stores a batch as `Ingest.store_all` does; None where it can't any more, and it has to be stored here."""


class _Waiting(NamedTuple):
    """A file that is to be published, and who waits for that."""

    written: Pending
    done: Future[None]


class Upload:
    """A blob on its way in. Ends with `finish` or `discard`."""

    def __init__(self, uploads: Uploads, claim: Claim, reservation: Reservation) -> None:
        self._uploads = uploads
        self._written: list[Pending] = []
        self._writer = uploads.session().begin(claim, hold=self._written.append)
        self._reservation = reservation

    @property
    def size(self) -> int:
        """Bytes taken so far."""
        return self._writer.size

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes. Raises DigestMismatch where there are too many, NoSpace; then discard it."""
        self._writer.write(data)

    def finish(self) -> Digest:
        """That was all; returns when the blob is durable. Raises DigestMismatch, NoSpace; nothing is kept then."""
        with self._reservation:
            digest = self._writer.finish()
            self._uploads.publish(self._written.pop())
        self._uploads.added([digest])
        return digest

    def discard(self) -> None:
        """Forget what was taken; harmless when repeated."""
        self._writer.discard()
        self._reservation.release()


class _Growing(Upload):
    """One of which nobody said how large it gets."""

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes, when there is room for them."""
        self._reservation.cover(self._writer.size + len(data))
        super().write(data)


class Uploads:
    """The way in for many at once, into one store."""

    def __init__(
        self,
        make_ingest: Callable[[], Ingest],
        space: Space,
        added: Callable[[Sequence[Digest]], None] = lambda digests: None,
        store_elsewhere: StoreElsewhere | None = None,
    ) -> None:
        """`added` is told which blobs have become durable, by the thread that brought them.

        `store_elsewhere`: who stores batches, if that isn't to be done here.
        """
        self.added = added
        self._make_ingest = make_ingest
        self._space = space
        self._store_elsewhere = store_elsewhere
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._storing = threading.Semaphore(STORING_MOST)
        self._lock = threading.Lock()
        # Under `_lock`:
        self._ingest: Ingest | None = None
        self._batch_ingests: list[Ingest] = []
        """Sessions in which no batch is being stored."""
        self._committer: threading.Thread | None = None
        self._closed = False

    def begin(self, digest: Digest) -> Upload:
        """Begin a blob. Waits while room is made for it; raises NoSpace where that doesn't help."""
        return self._begin(Upload, Exactly(digest), digest.size)

    def begin_hashed(self, hash_: bytes, size: int = 0) -> Upload:
        """Begin a blob with that hash, by whichever function; `size`: as far as it is known.

        Its writes wait for room where there are more bytes than that.
        """
        return self._begin(_Growing, Hashed(hash_, size), size)

    def _begin(self, kind: type[Upload], claim: Claim, size: int) -> Upload:
        reservation = self._space.reserve(size)
        try:
            return kind(self, claim, reservation)
        except BaseException:
            reservation.release()
            raise

    def add_all(self, blobs: Sequence[tuple[Digest, bytes]]) -> list[StoreError | None]:
        """Add blobs that are in memory; says of each why it was refused, or None: it is durable."""
        with ExitStack() as stack:
            results = self._reserve_all([len(data) for _, data in blobs], stack)
            if None not in results:
                return results
            try:
                roomy = [number for number, refused in enumerate(results) if refused is None]
                stored = self._store_batch([blobs[n] for n in roomy])
                for number, refused in zip(roomy, stored, strict=True):
                    results[number] = refused
            except StoreError as error:
                results = [result or error for result in results]
        self.added([digest for (digest, _), result in zip(blobs, results, strict=True) if result is None])
        return results

    def _store_batch(self, blobs: Sequence[tuple[Digest, bytes]]) -> Sequence[StoreError | None]:
        with self._storing:
            with self._lock:
                self._check_open()
            stored = None if self._store_elsewhere is None else self._store_elsewhere(blobs)
            if stored is not None:
                return stored
            with self._batch_session() as session:
                return session.store_all(blobs)

    def _reserve_all(self, sizes: Sequence[int], stack: ExitStack, *, may_wait: bool = True) -> list[StoreError | None]:
        """Reserve space until the stack unwinds: for all at once, or else for each that there is room for.

        A collection is waited for once: what it didn't make room for another one wouldn't, either, and others wait.
        """
        try:
            stack.enter_context(self._space.reserve(sum(sizes), may_wait=may_wait))
            return [None] * len(sizes)
        except NoSpace as error:
            if len(sizes) == 1:
                return [error]
        return [refused for size in sizes for refused in self._reserve_all([size], stack, may_wait=False)]

    def publish(self, written: Pending) -> None:
        """Returns when what a writer has finished is durable. Raises NoSpace or StoreUnusable."""
        waiting = _Waiting(written, Future())
        with self._lock:
            if self._closed:
                discard(written.path)
                raise StoreUnusable("the store is being closed")
            if self._committer is None:
                committer = threading.Thread(target=self._run, name="commit", daemon=True)
                committer.start()
                self._committer = committer
            self._waiting.put(waiting)
        waiting.done.result()

    def session(self) -> Ingest:
        """Where blobs are written before they are published. Raises StoreUnusable when the store is being closed."""
        with self._lock:
            self._check_open()
            if self._ingest is None:
                self._ingest = self._make_ingest()
            return self._ingest

    @contextmanager
    def _batch_session(self) -> Iterator[Ingest]:
        """A session for one batch at a time. Raises StoreUnusable when the store is being closed.

        Batches that are stored side by side have one each: a session publishes one after the other, and
        threads that make and rename files in one directory spin on its lock.
        """
        with self._lock:
            self._check_open()
            if not self._batch_ingests:
                self._batch_ingests.append(self._make_ingest())
            session = self._batch_ingests.pop()
        try:
            yield session
        finally:
            with self._lock:
                if self._closed:
                    session.close()
                else:
                    self._batch_ingests.append(session)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnusable("the store is being closed")

    def _run(self) -> None:
        while True:
            group = [self._waiting.get()]
            while not self._waiting.empty() and len(group) < _GROUP_MOST:
                group.append(self._waiting.get())
            waiting = [item for item in group if item is not None]
            if waiting:
                self._commit(waiting)
            if len(waiting) < len(group):
                return

    def _commit(self, group: Sequence[_Waiting]) -> None:
        try:
            with self._lock:
                ingest = self._ingest
            if ingest is not None:
                ingest.publish([item.written for item in group])
        except Exception as error:  # noqa: BLE001 - told to whoever waits
            for item in group:
                item.done.set_exception(error)
        else:
            for item in group:
                item.done.set_result(None)

    def close(self) -> None:
        """Publish what waits, discard what isn't finished; harmless when repeated."""
        with self._lock:
            self._closed = True
            committer, self._committer = self._committer, None
        if committer is not None:
            self._waiting.put(None)
            committer.join()
        with self._lock:
            ingest, self._ingest = self._ingest, None
            sessions, self._batch_ingests = self._batch_ingests, []
        if ingest is not None:
            sessions.append(ingest)
        for session in sessions:
            session.close()
