"""Bringing bytes into the store: written to ``tmp/<session>/``, hashed, and held for a publication.

What is hashed is what is published: bytes are hashed in memory and then
written, or hashed in ``tmp/`` after they were. `store.publication` has the
durability rule, and what a crash leaves.

Threads may share a session: `add_*` run in parallel, also with a `flush`, which
publishes what was added before it began; flushes take turns.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Protocol

from store import kernel
from store.blobs import MODE, Blobs, find_row
from store.digest import Digest, DigestFunction
from store.entries import Stamp, printable
from store.errors import BadInput, DigestMismatch, MissingBlob
from store.hashing import CHUNK, hash_descriptor
from store.index import Index, Table
from store.layout import Layout
from store.publication import Batch, Pending, Publisher, mode_of
from store.sessions import Session, translated
from store.stamps import find_stamp, is_settled
from store.writer import Anything, Claim, Exactly, Writer, discard, write_all

SMALL = 256 << 10
"""Files up to this size are read into memory, hashed and written; larger ones are cloned or copied first."""
_WORTH_CLONING = 16 << 10
"""Where cloning is known to work, it begins at this size: below, a copy of one's own costs less than sharing."""
_FLUSH_BLOBS = 4096
_FLUSH_BYTES = 1 << 30
_ROUNDS_MOST = 16
_WRITING = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Transfer(Enum):
    """How a host file's bytes get into the store."""

    AUTO = "auto"
    """Reflink where the file system can, else copy_file_range."""
    HARDLINK = "hardlink"
    """One more name for the same file, which becomes read-only; asked for, never chosen."""


class ReadableStream(Protocol):
    """The part of a binary file that adding one needs."""

    def read(self, size: int, /) -> bytes: ...


class Ingest:
    """One session of adding blobs. A context manager: leaving it normally flushes, with an error discards.

    What `add_*` return is a promise until `flush` returns.
    """

    def __init__(self, layout: Layout, index: Index, blobs: Blobs, *, spares: bool = True) -> None:
        """`spares`: while this session lives, collections spare what was used since it began; see `Session`."""
        self._index = index
        self._blobs = blobs
        self._layout = layout
        self._session = Session(layout, spares=spares)
        self._directory = str(self._session.directory)
        self._publisher = Publisher(layout, index, blobs, self._directory)
        self._flushing = threading.Lock()
        self._lock = threading.Lock()
        # Under `_lock`:
        self._serial = 0
        self._batch = Batch({}, {}, set(), [])
        self._pending_bytes = 0
        self._clones: dict[int, bool] = {}
        self.new_blobs = 0
        self.new_bytes = 0

    def __enter__(self) -> Ingest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self.close()

    def close(self) -> None:
        """Discard what was not flushed."""
        self._session.close()

    def add_bytes(
        self, data: bytes, function: DigestFunction, expected: Digest | None = None, *, executable: bool = False
    ) -> Digest:
        """Add a blob that is in memory. Raises DigestMismatch if it isn't `expected`; nothing is kept then."""
        digest = function.of(data)
        if expected is not None and digest != expected:
            raise _mismatch(expected, digest)
        if not self._note_seen(digest, lambda: self.add_bytes(data, function, executable=executable), executable):
            self._write(digest, data, executable)
        return digest

    def store_all(self, blobs: Sequence[tuple[Digest, bytes]]) -> list[DigestMismatch | None]:
        """Add blobs that are in memory and publish them, none executable; says of each whether it is what it was said.

        Those that are right are durable when it returns. Raises NoSpace or StoreUnusable; none is then promised.
        """
        results: list[DigestMismatch | None] = []
        right: dict[bytes, tuple[Digest, bytes]] = {}
        for digest, data in blobs:
            found = digest.function.of(data)
            results.append(_mismatch(digest, found) if found != digest else None)
            if found == digest:
                right[digest.key] = digest, data
        with self._index.view() as view:
            rows = {key for key in right if view.get(Table.BLOBS, key) is not None}
        # A row whose file somebody deleted is no reason to throw the bytes away.
        known = {key for key in rows if self._blobs.has_file(right[key][0])}
        pending = self._write_all([blob for key, blob in right.items() if key not in known])
        self.publish(pending, {key: right[key] for key in known})
        return results

    def publish(self, pending: Sequence[Pending], known: Mapping[bytes, tuple[Digest, bytes]] | None = None) -> None:
        """Publish these files of the session, durably, and nothing else: whoever waits for other files isn't concerned.

        `known`: blobs that have a row, by their keys; they count as used, and are written where they are gone.
        Raises NoSpace or StoreUnusable; the files are removed then.
        """
        known = known or {}
        seen: dict[bytes, Callable[[], Digest]] = dict.fromkeys(known, _nothing)
        # More than one round only when a collection removed a blob between its being seen and being touched.
        for _ in range(_ROUNDS_MOST):
            files = {item.digest.key: item for item in pending}
            try:
                for item in pending:
                    if files[item.digest.key] is not item:
                        discard(item.path)
                with self._flushing, translated(self._layout, "publishing blobs"):
                    absent = self._publish(Batch(files, seen, set(), []))
            except BaseException:
                for item in pending:
                    discard(item.path)
                raise
            if not absent:
                return
            pending, seen = self._write_all([known[key] for key in absent]), {}
        raise MissingBlob("blobs keep vanishing while they are added: is something deleting them?")

    def add_stream(
        self,
        stream: ReadableStream,
        function: DigestFunction,
        expected: Digest | None = None,
        *,
        executable: bool = False,
    ) -> Digest:
        """Add what a stream has until its end; it is written to disk as it comes.

        Raises DigestMismatch if it isn't `expected`; nothing is kept then.
        """
        writer = self.begin(Anything(function) if expected is None else Exactly(expected), executable=executable)
        try:
            while chunk := stream.read(CHUNK):
                writer.write(chunk)
        except BaseException:
            writer.discard()
            raise
        return writer.finish()

    def begin(self, claim: Claim, *, executable: bool = False, hold: Callable[[Pending], None] | None = None) -> Writer:
        """Begin a blob whose bytes come piece by piece; it counts once its writer was finished.

        `hold` is then given the file, to be published by `publish`; else it is the next flush's.
        """
        hold = hold or self._hold
        return Writer(
            self._layout, self._new_path(), claim, lambda digest, path: hold(Pending(digest, path, executable))
        )

    def add_file(
        self,
        path: str | bytes | Path,
        function: DigestFunction,
        *,
        transfer: Transfer = Transfer.AUTO,
        expected: Digest | None = None,
    ) -> Digest:
        """Add a regular file of the host, as it is now.

        An unchanged file (same device, inode, size, mtime and ctime as when it
        was last added) is not read again. Raises DigestMismatch if the content
        is not `expected`, BadInput for what is no regular file, OSError if it
        can't be read.
        """
        # Not blocking: what was a file a moment ago may be a FIFO now.
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode):
                raise BadInput(f"{printable(os.fsencode(path))} is not a regular file")
            executable = bool(status.st_mode & 0o100)
            stamp = Stamp.of(status)
            settled = transfer is Transfer.AUTO and is_settled(stamp)

            def again() -> Digest:
                return self.add_file(path, function, transfer=transfer, expected=expected)

            with self._index.view() as view:
                digest = find_stamp(view, stamp, function)
            if digest is not None and self._note_seen(digest, again, executable):
                _check(digest, expected, path)
                return digest
            if transfer is Transfer.AUTO and stamp.size <= (
                _WORTH_CLONING if self._clones.get(stamp.device) else SMALL
            ):
                data = _read_all(source, stamp.size)
                digest = function.of(data)
                _check(digest, expected, path)
                if not self._note_seen(digest, again, executable):
                    self._write(digest, data, executable)
            else:
                digest = self._transfer(source, path, function, transfer, executable, expected)
            if settled and Stamp.of(os.fstat(source)) == stamp:
                with self._lock:
                    self._batch.stamps.append((stamp, digest))
            return digest
        finally:
            os.close(source)

    def add_known(self, digest: Digest, again: Callable[[], Digest], *, executable: bool = False) -> bool:
        """Count a blob that is here as added, without having its bytes; False where it isn't here.

        `again` adds it with them, if a collection takes it before the flush.
        """
        return self._note_seen(digest, again, executable)

    def _note_seen(self, digest: Digest, again: Callable[[], Digest], executable: bool) -> bool:
        """Whether the blob is in the store or on its way; remembers to touch it at the flush."""
        key = digest.key
        with self._lock:
            item = self._batch.pending.get(key)
            if item is not None:
                if executable and not item.executable:
                    self._batch.pending[key] = item._replace(executable=True)
                return True
        with self._index.view() as view:
            row = find_row(view, digest)
        # A row whose file somebody deleted is no reason to throw the bytes away.
        if row is None or not self._blobs.has_file(digest):
            return False
        with self._lock:
            self._batch.seen[key] = again
            if executable and not row.executable:
                self._batch.made_executable.add(key)
        return True

    def _new_path(self) -> str:
        with self._lock:
            self._serial += 1
            return f"{self._directory}/{self._serial}"

    def _write(self, digest: Digest, data: bytes, executable: bool) -> None:
        path = self._new_path()
        with translated(self._layout, "writing a blob"):
            descriptor = os.open(path, _WRITING, mode_of(executable))
            try:
                write_all(descriptor, data)
                # Not what was asked for, where the umask takes some of it.
                mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            except BaseException:
                discard(path)
                raise
            finally:
                os.close(descriptor)
        self._hold(Pending(digest, path, executable, mode))

    def _write_all(self, blobs: Sequence[tuple[Digest, bytes]]) -> list[Pending]:
        """Write many blobs, none executable, with three calls each, by names relative to the session's directory.

        After a failure none of them is there.
        """
        if not blobs:
            return []
        with self._lock:
            first, self._serial = self._serial + 1, self._serial + len(blobs)
        written: list[Pending] = []
        with translated(self._layout, "writing blobs"), kernel.opened_directory(self._directory) as directory:
            mode = 0
            try:
                for number, (digest, data) in enumerate(blobs, first):
                    written.append(Pending(digest, f"{self._directory}/{number}", executable=False, mode=mode))
                    descriptor = os.open(str(number), _WRITING, MODE, dir_fd=directory)
                    try:
                        write_all(descriptor, data)
                        if not mode:
                            # One umask for all.
                            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
                            written[-1] = written[-1]._replace(mode=mode)
                    finally:
                        os.close(descriptor)
            except BaseException:
                for item in written:
                    discard(item.path)
                raise
        return written

    def _transfer(
        self,
        source: int,
        name: str | bytes | Path,
        function: DigestFunction,
        transfer: Transfer,
        executable: bool,
        expected: Digest | None,
    ) -> Digest:
        """Clone, copy or link into tmp, and hash what arrived there."""
        path = self._new_path()
        try:
            if transfer is Transfer.HARDLINK:
                target = _link(source, name, path)
            else:
                with translated(self._layout, f"adding {printable(os.fsencode(name))}"):
                    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                    self._fill(source, target)
            try:
                digest = hash_descriptor(target, function)
            finally:
                os.close(target)
            _check(digest, expected, name)
        except BaseException:
            discard(path)
            raise
        self._hold(Pending(digest, path, executable))
        return digest

    def _fill(self, source: int, target: int) -> None:
        """Clone or copy; remembers whether files of that device can be cloned. Closes `target` if it fails."""
        try:
            device = os.fstat(source).st_dev
            cloned = self._clones.get(device, True) and kernel.try_clone(source, target)
            self._clones[device] = cloned
            if not cloned:
                kernel.copy(source, target)
        except BaseException:
            os.close(target)
            raise

    def _hold(self, pending: Pending) -> None:
        key = pending.digest.key
        with self._lock:
            other = self._batch.pending.get(key)
            if other is None:
                self._batch.pending[key] = pending
                self._pending_bytes += pending.digest.size
                return
            if pending.executable:
                self._batch.pending[key] = other._replace(executable=True)
        discard(pending.path)

    @property
    def is_full(self) -> bool:
        """Whether enough is pending for a flush to be worth its price."""
        return len(self._batch.pending) + len(self._batch.seen) >= _FLUSH_BLOBS or self._pending_bytes >= _FLUSH_BYTES

    def flush(self) -> None:
        """Publish what was added, durably.

        Raises NoSpace or StoreUnusable; nothing of the batch is then promised.
        """
        # More than one round only when a collection removed a blob between its being seen and being touched.
        for _ in range(_ROUNDS_MOST):
            with self._flushing, translated(self._layout, "publishing blobs"):
                vanished = self._flush_once()
            if not vanished:
                return
            for again in vanished:
                again()
        raise MissingBlob("blobs keep vanishing while they are added: is something deleting them?")

    def _flush_once(self) -> list[Callable[[], Digest]]:
        with self._lock:
            batch, self._batch, self._pending_bytes = self._batch, Batch({}, {}, set(), []), 0
        return [batch.seen[key] for key in self._publish(batch)]

    def _publish(self, batch: Batch) -> Sequence[bytes]:
        """The keys of what was seen and is gone. One at a time."""
        published = self._publisher.publish(batch)
        with self._lock:
            self.new_blobs += len(published.fresh)
            self.new_bytes += sum(item.digest.size for item in published.fresh)
        return published.absent


def _nothing() -> Digest:
    raise AssertionError("what is known is written by who knows its bytes")


def _mismatch(expected: Digest, found: Digest) -> DigestMismatch:
    return DigestMismatch(f"the bytes offered as {expected} are {found}; nothing was stored")


def _link(source: int, name: str | bytes | Path, path: str) -> int:
    """Give the open file `source` one more name, and make it read-only; returns a descriptor to read it."""
    try:
        os.link(name, path, follow_symlinks=False)
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # By chmod and not at the publication: whose file it is is the user's matter, not the store's.
        os.chmod(path, MODE)
    except OSError as error:
        why = "it is on another file system" if error.errno == errno.EXDEV else error.strerror
        raise BadInput(
            f"can't hard-link {printable(os.fsencode(name))} into the store: {why}; without hard links it is copied"
        ) from error
    if not os.path.samestat(os.fstat(source), os.fstat(target)):
        os.close(target)
        raise BadInput(f"{printable(os.fsencode(name))} was replaced while it was added; try again")
    return target


def _check(digest: Digest, expected: Digest | None, name: str | bytes | Path) -> None:
    if expected is not None and digest != expected:
        raise DigestMismatch(f"{printable(os.fsencode(name))} is {digest}, not {expected}; nothing was stored")


def _read_all(descriptor: int, size: int) -> bytes:
    """The whole content; `size` is what it probably is. A byte more is asked for, to see the end at once."""
    data = os.read(descriptor, size + 1)
    if len(data) == size:
        return data
    parts = [data]
    while parts[-1]:
        parts.append(os.read(descriptor, CHUNK))
    return b"".join(parts)
