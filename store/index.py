"""The LMDB environment: transactions over named tables of bytes, and nothing else.

The only module that imports `lmdb`. What the rows mean is said by the modules
that own a table (`store.blobs`, `store.trees`, `store.manifests`).

Threading and processes. Any number of readers in any number of processes; a
reader never waits for a writer. Writers take turns: threads by `_writing`,
processes by an flock on `write.lock` (LMDB's own mutex would be waited for
while holding the interpreter lock). The map grows when a write finds it full:
LMDB allows that only while this process has no transaction open, so `_Gate`
lets views in together and a growth alone. A thread has one view or one update
at a time: a second one inside the first would wait for a growth that waits for
the first, so it is refused at once, whether anything grows or not.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar, cast

import lmdb

from store.errors import NewerFormat, NoSpace, StoreUnusable

T = TypeVar("T")

FORMAT = 1
"""Raised whenever an older casfs could misread what is written."""

_FIRST_MAP = 1 << 30
_MAX_READERS = 1024
_GATE_SECONDS = 0.0005
"""Between two looks whether all views have ended: the map grows about once in the life of a store."""
_PATIENCE_SECONDS = 0.05


class Table(Enum):
    """The named databases; the value is the name in the file."""

    META = b"meta"
    BLOBS = b"blobs"
    STAMPS = b"stamps"
    DIRECTORIES = b"directories"
    ENTRIES = b"entries"
    WAYPOINTS = b"waypoints"
    MANIFESTS = b"manifests"

    # That of Enum is a call into Python, for each probe.
    __hash__ = object.__hash__


class _Gate:
    """Views and updates pass together; a growth waits until they have left and holds new ones back.

    Passing takes no lock, as every lookup does it: a set's add and discard are
    atomic. Who enters is seen by `alone` or sees that it is closed, as each
    writes before it reads.
    """

    __slots__ = ("_closed", "_growing", "_inside")

    def __init__(self) -> None:
        self._inside: set[int | None] = set()
        self._closed = False
        self._growing = threading.Lock()

    def enter(self) -> int:
        """Be counted, when no growth is on; returns what `leave` wants. RuntimeError if this thread is inside."""
        thread = threading.get_ident()
        if thread in self._inside:
            raise RuntimeError("this thread has the index open already: end that view or update first")
        self._inside.add(thread)
        while self._closed:
            self._inside.discard(thread)
            with self._growing:
                self._inside.add(thread)
        return thread

    def leave(self, thread: int) -> None:
        """What `thread` began has ended; another thread may say so."""
        self._inside.discard(thread)

    @contextmanager
    def alone(self, thread: int | None = None, patience: float = math.inf) -> Iterator[bool]:
        """Nobody enters, and nobody is inside but perhaps `thread`; False if that took over `patience` seconds."""
        allowed = {thread}
        deadline = time.monotonic() + patience
        with self._growing:
            self._closed = True
            try:
                while others := self._inside - allowed:
                    if time.monotonic() >= deadline:
                        break
                    time.sleep(_GATE_SECONDS)
                yield not others
            finally:
                self._closed = False


class View:
    """A consistent read of the index. Use it in one thread, and briefly: it pins old pages."""

    # The casts below: transactions are opened without `buffers`, so LMDB hands out bytes.

    __slots__ = ("_dbs", "_thread", "_txn")

    def __init__(self, txn: lmdb.Transaction, dbs: dict[Table, lmdb._Database], thread: int) -> None:
        self._txn = txn
        self._dbs = dbs
        self._thread = thread

    def get(self, table: Table, key: bytes) -> bytes | None:
        """The value under `key`, or None."""
        return cast("bytes | None", self._txn.get(key, db=self._dbs[table]))

    def scan(self, table: Table, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """The rows from `start` (or `prefix`) on in key order, as long as their keys begin with `prefix`."""
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            if not cursor.set_range(start or prefix):
                return
            for key, value in cast(Iterator[tuple[bytes, bytes]], cursor.iternext()):
                if not key.startswith(prefix):
                    return
                yield key, value

    def last_at_or_before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        """The row with the greatest key that is not above `key`, or None."""
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            if cursor.set_range(key):
                if cursor.key() == key:
                    return cast(tuple[bytes, bytes], cursor.item())
                if not cursor.prev():
                    return None
            elif not cursor.last():
                return None
            return cast(tuple[bytes, bytes], cursor.item())

    def count(self, table: Table) -> int:
        """How many rows a table has."""
        entries: int = self._txn.stat(db=self._dbs[table])["entries"]
        return entries


class Change(View):
    """A write in progress: what it reads includes what it wrote."""

    __slots__ = ()

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Store a row, replacing what was under the key."""
        self._txn.put(key, value, db=self._dbs[table])

    def delete(self, table: Table, key: bytes) -> bool:
        """Remove a row; says whether it was there."""
        return self._txn.delete(key, db=self._dbs[table])

    def append(self, table: Table, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Store rows whose keys rise and lie above every key of the table: four times as fast as `put`."""
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            cursor.putmulti(rows, append=True)

    def clear(self, table: Table) -> None:
        """Remove every row of a table."""
        self._txn.drop(self._dbs[table], delete=False)


class Index:
    """The open index of one store. Open it after a fork, never before."""

    def __init__(self, directory: Path) -> None:
        """Open or create the index in `directory`, which exists.

        Raises NewerFormat, or StoreUnusable where the directory can't be
        written, NoSpace where its disk is full.
        """
        self._directory = directory
        self._gate = _Gate()
        self._writing = threading.Lock()
        try:
            self._write_lock = os.open(directory / "write.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self._raise_unusable(error)
        try:
            _reserve_reader_table(directory / "lock.mdb")
            size = max(_FIRST_MAP, 2 * _size_of(directory / "data.mdb"))
            self._env = lmdb.open(
                str(directory),
                map_size=size,
                max_dbs=len(Table),
                max_readers=_MAX_READERS,
                readahead=False,
                # What a commit wrote is synced before it counts, that it counts only by `update`, where it has to be.
                metasync=False,
            )
        except (OSError, lmdb.Error) as error:
            os.close(self._write_lock)
            self._raise_unusable(error)
        try:
            # Slots of readers that were killed would keep old pages alive for ever.
            self._env.reader_check()
            self._open_tables()
        except lmdb.Error as error:
            self.close()
            self._raise_unusable(error)
        except BaseException:
            self.close()
            raise

    def _open_tables(self) -> None:
        with self._exclusive():
            try:
                self._env.begin().abort()
            except lmdb.MapResizedError:
                # Another process made it larger since its size was looked at; none does while we write.
                self._env.set_mapsize(0)
            try:
                meta = self._env.open_db(Table.META.value, create=False)
            except lmdb.NotFoundError:
                meta = self._env.open_db(Table.META.value)
            with self._env.begin(db=meta) as txn:
                found = int(txn.get(b"format") or 0)
            # Before anything is changed: a newer format may have other tables.
            if found > FORMAT:
                raise NewerFormat(
                    f"the index in {self._directory} has format {found}, this casfs knows {FORMAT}: use the newer casfs"
                )
            self._dbs = {table: self._env.open_db(table.value) for table in Table}
            if not found:
                with self._env.begin(write=True, db=meta) as txn:
                    txn.put(b"format", str(FORMAT).encode())

    def _raise_unusable(self, error: OSError | lmdb.Error) -> NoReturn:
        """Map what the disk or LMDB says to the store's own errors."""
        if _is_full(error):
            raise NoSpace(f"can't write the index in {self._directory}: the disk is full") from error
        what = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, _DAMAGES):
            raise StoreUnusable(
                f"the index in {self._directory} is damaged ({what}): move that directory's files away "
                "and run 'casfs verify', which makes a new one from the blobs and manifests"
            ) from error
        if isinstance(error, lmdb.ReadersFullError):
            raise StoreUnusable(f"over {_MAX_READERS} readers use the index in {self._directory} at once") from error
        raise StoreUnusable(f"can't use the index in {self._directory}: {what}") from error

    def view(self) -> _Viewing:
        """``with index.view() as view:`` — a consistent read."""
        return _Viewing(self)

    def update(self, work: Callable[[Change], T], *, lasting: bool = True) -> T:
        """Run `work` in one transaction and commit it, durably if it is to be `lasting`.

        Else a crash of the machine may undo it, as a whole, if it was the last
        one; it costs one sync in place of two. `work` is run again from the start when the map was full and has been
        grown: it must have no effect but through the `Change` it is given.
        """
        with self._exclusive():
            while True:
                thread = self._gate.enter()
                txn = None
                try:
                    txn = self._env.begin(write=True)
                    result = work(Change(txn, self._dbs, thread))
                    txn.commit()
                    if lasting:
                        self._env.sync(True)
                    return result
                except lmdb.MapFullError:
                    self._give_up(txn, thread, 2 * self._env.info()["map_size"])
                except lmdb.MapResizedError:
                    self._give_up(txn, thread, 0)
                except BaseException as error:
                    self._give_up(txn, thread, None)
                    if isinstance(error, lmdb.Error):
                        self._raise_unusable(error)
                    raise
                finally:
                    self._gate.leave(thread)

    def _give_up(self, txn: lmdb.Transaction | None, thread: int, grown: int | None) -> None:
        """Abort a write; with `grown` take that many bytes for the map (0: what another process made it).

        With no view open beside it, also for the abort: py-lmdb makes it wait
        for a moment in which no other thread calls LMDB, and with busy readers
        there is none.
        """
        with self._gate.alone(thread):
            if txn is not None:
                with suppress(lmdb.Error):  # a commit that failed has ended it
                    txn.abort()
            if grown is not None:
                # What killed readers pin can't be used again: perhaps it is only that.
                self._env.reader_check()
                self._env.set_mapsize(grown)

    def _begin(self) -> View:
        while True:
            thread = self._gate.enter()
            try:
                return View(self._env.begin(), self._dbs, thread)
            except lmdb.MapResizedError:
                self._gate.leave(thread)
            except BaseException as error:
                self._gate.leave(thread)
                if isinstance(error, lmdb.Error):
                    self._raise_unusable(error)
                raise
            # Another process made the map larger: take over its size. Not patiently: an update
            # that has begun may be waiting for us to end this, see `_give_up`.
            with self._gate.alone(patience=_PATIENCE_SECONDS) as alone:
                if alone:
                    self._env.set_mapsize(0)

    def _end(self, view: View) -> None:
        view._txn.abort()
        self._gate.leave(view._thread)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._writing:
            fcntl.flock(self._write_lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._write_lock, fcntl.LOCK_UN)

    def statistics(self) -> dict[str, int]:
        """Rows per table, and the bytes the index takes on disk."""
        with self.view() as view:
            rows = {table.value.decode(): view.count(table) for table in Table}
        return {**rows, "bytes": _size_of(self._directory / "data.mdb")}

    def close(self) -> None:
        """Close the environment; views and changes must have ended."""
        self._env.close()
        if self._write_lock >= 0:
            os.close(self._write_lock)
            self._write_lock = -1


class _Viewing:
    """The context manager behind `Index.view`: a class, as a generator costs twice as much per lookup."""

    __slots__ = ("_index", "_view")

    def __init__(self, index: Index) -> None:
        self._index = index

    def __enter__(self) -> View:
        self._view = self._index._begin()
        return self._view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._index._end(self._view)


_DAMAGES = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.PanicError, lmdb.VersionMismatchError)


def _is_full(error: OSError | lmdb.Error) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # LMDB has a class for the first; what a quota says it only puts into the text.
    return isinstance(error, lmdb.DiskError) or "quota exceeded" in str(error)


def _reserve_reader_table(path: Path) -> None:
    """Give the lock file its blocks before LMDB maps it.

    LMDB makes it sparse and writes it through the map: on a full disk that is
    a SIGBUS, and not an error. Never touch the file once it is open in this
    process: closing any descriptor of it drops LMDB's record locks.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return
    try:
        # 64 bytes a reader and a header of at most two pages; LMDB takes the size it finds.
        os.posix_fallocate(descriptor, 0, (_MAX_READERS + 128) * 64)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
