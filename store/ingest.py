"""Bringing bytes into the store: hash, make durable, publish, remember.

The durability rule (ARCHITECTURE.md has the argument):

    1. The bytes are written to ``tmp/<session>/`` and hashed there, or hashed
       in memory and then written: what is hashed is what is published.
    2. They are made durable (fsync each, or one syncfs for a large batch).
    3. Each file is renamed to its final name. From here on it is published.
    4. The names are made durable (fsync of the directories, or syncfs).
    5. One index transaction gives every blob its row.

A crash before 3 leaves litter in ``tmp/``, which the next start of any casfs
removes, as the session's lock is free then. A crash between 3 and 5 leaves
whole files without rows, which are hashed at their first use. Where an error
(a full disk) ends it between 3 and 5, the files are taken back.

Threads may share a session: `add_*` run in parallel, also with a `flush`, which
publishes what was added before it began; flushes take turns.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

from store import kernel
from store.blobs import MODE, MODE_EXECUTABLE, BlobRow, Blobs, find_row, pack_row, touch, unpack_row
from store.digest import Digest, DigestFunction
from store.entries import Stamp, printable
from store.errors import BadInput, DigestMismatch, MissingBlob, StoreError
from store.hashing import CHUNK, hash_descriptor, hasher_for
from store.index import Change, Index, Table
from store.layout import Layout, blob_path
from store.sessions import Session, translated
from store.stamps import find_stamp, is_settled, put_stamps

SMALL = 256 << 10
"""Files up to this size are read into memory, hashed and written; larger ones are cloned or copied first."""
_WORTH_CLONING = 16 << 10
"""Where cloning is known to work, it begins at this size: below, a copy of one's own costs less than sharing."""
_SYNCFS_FROM = 16
"""From this many new blobs on one syncfs is cheaper than an fsync each (ARCHITECTURE.md has the numbers)."""
_FLUSH_BLOBS = 4096
_FLUSH_BYTES = 1 << 30


class Transfer(Enum):
    """How a host file's bytes get into the store."""

    AUTO = "auto"
    """Reflink where the file system can, else copy_file_range."""
    HARDLINK = "hardlink"
    """One more name for the same file, which becomes read-only; asked for, never chosen."""


class ReadableStream(Protocol):
    """The part of a binary file that adding one needs."""

    def read(self, size: int, /) -> bytes: ...


class _Pending(NamedTuple):
    digest: Digest
    path: str
    executable: bool


class _Batch(NamedTuple):
    """What a flush works on: files in tmp by key, blobs that were there already, digests of host files."""

    pending: dict[bytes, _Pending]
    seen: dict[bytes, Callable[[], Digest]]
    made_executable: set[bytes]
    stamps: list[tuple[Stamp, Digest]]


class Ingest:
    """One session of adding blobs. A context manager: leaving it normally flushes, with an error discards.

    What `add_*` return is a promise until `flush` returns.
    """

    def __init__(self, layout: Layout, index: Index, blobs: Blobs) -> None:
        self._index = index
        self._blobs = blobs
        self._layout = layout
        self._session = Session(layout)
        self._directory = str(self._session.directory)
        self._flushing = threading.Lock()
        self._lock = threading.Lock()
        # Under `_lock`:
        self._serial = 0
        self._batch = _Batch({}, {}, set(), [])
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

    def add_bytes(self, data: bytes, function: DigestFunction, *, executable: bool = False) -> Digest:
        """Add a blob that is in memory."""
        digest = function.of(data)
        if not self._note_seen(digest, lambda: self.add_bytes(data, function, executable=executable), executable):
            self._write(digest, data, executable)
        return digest

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
        path = self._new_path()
        hasher = hasher_for(function, expected.size if expected else CHUNK)
        size = 0
        try:
            with translated(self._layout, "adding a stream"):
                out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                while chunk := stream.read(CHUNK):
                    hasher.update(chunk)
                    with translated(self._layout, "adding a stream"):
                        _write_all(out, chunk)
                    size += len(chunk)
            finally:
                os.close(out)
            digest = Digest(function, hasher.digest(), size)
            if expected is not None and digest != expected:
                raise DigestMismatch(f"the bytes offered as {expected} are {digest}; nothing was stored")
        except BaseException:
            _discard(path)
            raise
        self._hold(_Pending(digest, path, executable))
        return digest

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
        with translated(self._layout, f"writing blob {digest}"):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                _write_all(descriptor, data)
            except BaseException:
                _discard(path)
                raise
            finally:
                os.close(descriptor)
        self._hold(_Pending(digest, path, executable))

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
            _discard(path)
            raise
        self._hold(_Pending(digest, path, executable))
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

    def _hold(self, pending: _Pending) -> None:
        key = pending.digest.key
        with self._lock:
            other = self._batch.pending.get(key)
            if other is None:
                self._batch.pending[key] = pending
                self._pending_bytes += pending.digest.size
                return
            if pending.executable:
                self._batch.pending[key] = other._replace(executable=True)
        _discard(pending.path)

    @property
    def is_full(self) -> bool:
        """Whether enough is pending for a flush to be worth its price."""
        return len(self._batch.pending) + len(self._batch.seen) >= _FLUSH_BLOBS or self._pending_bytes >= _FLUSH_BYTES

    def flush(self) -> None:
        """Publish what was added, durably.

        Raises NoSpace or StoreUnusable; nothing of the batch is then promised.
        """
        # More than one round only when a collection removed a blob between its being seen and being touched.
        for _ in range(16):
            with self._flushing, translated(self._layout, "publishing blobs"):
                vanished = self._flush_once()
            if not vanished:
                return
            for again in vanished:
                again()
        raise MissingBlob("blobs keep vanishing while they are added: is something deleting them?")

    def _flush_once(self) -> list[Callable[[], Digest]]:
        with self._lock:
            batch, self._batch, self._pending_bytes = self._batch, _Batch({}, {}, set(), []), 0
        if not (batch.pending or batch.seen or batch.stamps):
            return []
        fresh = self._without_row(batch)
        many = len(fresh) >= _SYNCFS_FROM
        for item in fresh:
            _make_ready(item, sync=not many)
        if many:
            kernel.syncfs(self._blobs.directory)
        ready = {item.path for item in fresh}
        try:
            # Nothing is collected while this is held: what has its row now keeps it.
            with self._blobs.publishing():
                fresh = self._without_row(batch)
                for item in fresh:
                    if item.path not in ready:
                        _make_ready(item, sync=True)
                self._publish(fresh, many)
                absent = self._remember(batch, fresh)
        except BaseException:
            self._take_back(fresh)
            raise
        for path in {item.path for item in batch.pending.values()} - {item.path for item in fresh}:
            _discard(path)
        with self._lock:
            self.new_blobs += len(fresh)
            self.new_bytes += sum(item.digest.size for item in fresh)
        return [batch.seen[key] for key in absent]

    def _without_row(self, batch: _Batch) -> list[_Pending]:
        """What nobody else was first with: a file that is there stays, as mounts may have it open."""
        with self._index.view() as view:
            return [
                item
                for item in batch.pending.values()
                if find_row(view, item.digest) is None or not self._blobs.has_file(item.digest)
            ]

    def _publish(self, fresh: list[_Pending], many: bool) -> None:
        """Give durable files their final names, durably."""
        directories: set[Path] = set()
        for item in fresh:
            target = self._layout.blobs / blob_path(item.digest)
            try:
                os.rename(item.path, target)
            except FileNotFoundError:
                target.parent.mkdir(parents=True, exist_ok=True)
                directories.update(target.parents[1:])  # the names of new directories have to last too
                os.rename(item.path, target)
            directories.add(target.parent)
        if many:
            kernel.syncfs(self._blobs.directory)
        else:
            for directory in directories.difference(self._layout.root.parents):
                kernel.fsync_path(directory)

    def _remember(self, batch: _Batch, fresh: list[_Pending]) -> list[bytes]:
        """Give what was published its rows; returns the keys of what was seen and is gone."""
        now = int(time.time())
        made_executable = batch.made_executable | {key for key, item in batch.pending.items() if item.executable}
        made_executable -= {item.digest.key for item in fresh}
        for key in made_executable:
            self._make_executable(key)

        def work(change: Change) -> list[bytes]:
            for digest, _, executable in fresh:
                change.put(Table.BLOBS, digest.key, pack_row(BlobRow(digest.size, now, executable)))
            touch(change, batch.pending, now)
            absent = touch(change, [key for key in batch.seen if key not in batch.pending], now)
            for key in made_executable:
                if (value := change.get(Table.BLOBS, key)) is not None:
                    change.put(Table.BLOBS, key, pack_row(unpack_row(value)._replace(executable=True)))
            put_stamps(change, batch.stamps)
            return absent

        return self._index.update(work)

    def _take_back(self, fresh: list[_Pending]) -> None:
        """After a failure: what got its name and no row goes away again, to leave a full disk as it was."""
        # Whatever fails here leaves whole files without rows, which do no harm.
        with suppress(OSError, StoreError), self._blobs.removing():
            for item in self._without_row(_Batch({item.digest.key: item for item in fresh}, {}, set(), [])):
                if not os.path.lexists(item.path):
                    _discard(str(self._layout.blobs / blob_path(item.digest)))

    def _make_executable(self, key: bytes) -> None:
        """A blob that was only data is a program too now: a hard-link checkout needs the bits."""
        path = blob_path(Digest.from_key(key, 0))
        try:
            os.chmod(path, MODE_EXECUTABLE, dir_fd=self._blobs.directory)
        except FileNotFoundError:
            return  # lost behind our back; `Blobs.open` says so when it is needed


def _make_ready(item: _Pending, *, sync: bool) -> None:
    """The last that is done to a file before its publication: its mode, and making it durable."""
    os.chmod(item.path, MODE_EXECUTABLE if item.executable else MODE)
    if sync:
        kernel.fsync_path(item.path)


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


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _discard(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
