"""The LMDB environment: transactions over named tables of bytes, and nothing else.

The only module that imports `lmdb`. What the rows mean is said by the modules
that own a table (`store.blobs`, `store.trees`, `store.manifests`, `store.leases`).

Threading and processes. Any number of readers in any number of processes; a
reader never waits for a writer. Writers take turns: threads by `_writing`,
processes by an flock on `write.lock` (LMDB's own mutex would be waited for
while holding the interpreter lock). The map grows when a write finds it full:
LMDB allows that only while this process has no transaction open, so `_Gate`
lets views in together and a growth alone.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import lmdb

from store.errors import NewerFormat, NoSpace, StoreUnusable

T = TypeVar("T")

FORMAT = 1
"""Raised whenever an older casfs could misread what is written."""

_FIRST_MAP = 1 << 30
_MAX_READERS = 1024
_GATE_SECONDS = 0.0005
"""Between two looks whether all views have ended: the map grows about once in the life of a store."""


class Table(Enum):
    """The named databases; the value is the name in the file."""

    META = b"meta"
    BLOBS = b"blobs"
    STAMPS = b"stamps"
    DIRECTORIES = b"directories"
    ENTRIES = b"entries"
    WAYPOINTS = b"waypoints"
    MANIFESTS = b"manifests"
    LEASES = b"leases"


class _Gate:
    """Views pass together; a growth waits until they have left and holds new ones back.

    Passing takes no lock, as every lookup does it: a list's append and pop are
    atomic. Who enters is seen by `alone` or sees that it is closed, as each
    writes before it reads.
    """

    __slots__ = ("_closed", "_growing", "_inside")

    def __init__(self) -> None:
        self._inside: list[None] = []
        self._closed = False
        self._growing = threading.Lock()

    def enter(self) -> None:
        self._inside.append(None)
        while self._closed:
            self._inside.pop()
            with self._growing:
                self._inside.append(None)

    def leave(self) -> None:
        self._inside.pop()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._growing:
            self._closed = True
            try:
                while self._inside:
                    time.sleep(_GATE_SECONDS)
                yield
            finally:
                self._closed = False


class View:
    """A consistent read of the index. Use it in one thread, and briefly: it pins old pages."""

    __slots__ = ("_dbs", "_txn")

    def __init__(self, txn: lmdb.Transaction, dbs: dict[Table, lmdb._Database]) -> None:
        self._txn = txn
        self._dbs = dbs

    def get(self, table: Table, key: bytes) -> bytes | None:
        """The value under `key`, or None."""
        value = self._txn.get(key, db=self._dbs[table])
        return None if value is None else bytes(value)

    def scan(self, table: Table, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """The rows from `start` (or `prefix`) on in key order, as long as their keys begin with `prefix`."""
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            if not cursor.set_range(start or prefix):
                return
            for key, value in cursor.iternext():
                if not key.startswith(prefix):
                    return
                yield key, value

    def last_at_or_before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        """The row with the greatest key that is not above `key`, or None."""
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            if cursor.set_range(key):
                if cursor.key() == key:
                    return cursor.item()
                if not cursor.prev():
                    return None
            elif not cursor.last():
                return None
            return cursor.item()

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

        Raises NewerFormat, or StoreUnusable where the directory can't be written.
        """
        self._directory = directory
        self._gate = _Gate()
        self._writing = threading.Lock()
        try:
            self._write_lock = os.open(directory / "write.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = max(_FIRST_MAP, 2 * _size_of(directory / "data.mdb"))
            self._env = lmdb.open(
                str(directory), map_size=size, max_dbs=len(Table), max_readers=_MAX_READERS, readahead=False
            )
        except (OSError, lmdb.Error) as error:
            raise StoreUnusable(f"can't open the index in {directory}: {error}") from error
        # Slots of readers that were killed would keep old pages alive for ever.
        self._env.reader_check()
        try:
            self._dbs = {table: self._env.open_db(table.value, create=False) for table in Table}
        except lmdb.NotFoundError:
            with self._exclusive():
                self._dbs = {table: self._env.open_db(table.value) for table in Table}
                with self._env.begin(write=True, db=self._dbs[Table.META]) as txn:
                    txn.put(b"format", str(FORMAT).encode(), overwrite=False)
        with self.view() as view:
            found = int(view.get(Table.META, b"format") or FORMAT)
        if found > FORMAT:
            self.close()
            raise NewerFormat(
                f"the index in {directory} has format {found}, this casfs knows {FORMAT}: use the newer casfs"
            )

    def view(self) -> _Viewing:
        """``with index.view() as view:`` — a consistent read."""
        return _Viewing(self)

    def update(self, work: Callable[[Change], T]) -> T:
        """Run `work` in one transaction and commit it durably.

        `work` is run again from the start when the map was full and has been
        grown: it must have no effect but through the `Change` it is given.
        """
        with self._exclusive():
            while True:
                self._gate.enter()
                try:
                    with self._env.begin(write=True) as txn:
                        return work(Change(txn, self._dbs))
                except (lmdb.MapFullError, lmdb.MapResizedError) as error:
                    grown = 2 * self._env.info()["map_size"] if isinstance(error, lmdb.MapFullError) else 0
                except lmdb.DiskError as error:
                    raise NoSpace(f"can't write the index in {self._directory}: {error}") from error
                except lmdb.Error as error:
                    if "No space" in str(error):
                        raise NoSpace(f"can't write the index in {self._directory}: the disk is full") from error
                    raise
                finally:
                    self._gate.leave()
                with self._gate.alone():
                    self._env.set_mapsize(grown)

    def _begin(self) -> View:
        while True:
            self._gate.enter()
            try:
                return View(self._env.begin(), self._dbs)
            except lmdb.MapResizedError:
                self._gate.leave()
            except BaseException:
                self._gate.leave()
                raise
            # Another process made the map larger: take over its size.
            with self._gate.alone():
                self._env.set_mapsize(0)

    def _end(self, view: View) -> None:
        view._txn.abort()
        self._gate.leave()

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


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
