"""Publishing what lies in ``tmp/``: made durable, named, remembered. The only code that gives blobs their names.

The durability rule (ARCHITECTURE.md has the argument):

    1. The bytes are written to ``tmp/<session>/`` and hashed (`store.ingest`).
    2. They are made durable (fsync each, or one syncfs for a large batch).
    3. Each file is renamed to its final name. From here on it is published.
    4. The names are made durable (fsync of the directories, or syncfs).
    5. One index transaction gives every blob its row; a crash of the machine may undo it.

A crash before 3 leaves litter in ``tmp/``, which the next start of any casfs
removes, as the session's lock is free then. A crash between 3 and 5, or that undoes 5, leaves
whole files without rows, which are hashed at their first use. Where an error
(a full disk) ends it between 3 and 5, the files are taken back.

One publication of a session at a time; those of several sessions run side by side.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from store import kernel
from store.blobs import MODE, MODE_EXECUTABLE, BlobRow, Blobs, pack_row, put_rows, touch, unpack_row
from store.digest import Digest
from store.entries import Stamp
from store.errors import StoreError
from store.index import Change, Index, Table
from store.layout import Layout, blob_path
from store.stamps import put_stamps
from store.writer import discard

_SYNCFS_FROM = 16
"""From this many new blobs on one syncfs is cheaper than an fsync each (ARCHITECTURE.md has the numbers)."""


class Pending(NamedTuple):
    """A file in the session's directory that is to become a blob."""

    digest: Digest
    path: str
    executable: bool
    mode: int = 0
    """That of its file, where it is known."""


class Batch(NamedTuple):
    """What is published together: files in tmp by key, blobs that were there already, digests of host files."""

    pending: dict[bytes, Pending]
    seen: dict[bytes, Callable[[], Digest]]
    made_executable: set[bytes]
    stamps: list[tuple[Stamp, Digest]]


class Published(NamedTuple):
    """What is new in the store, and the keys of what was seen there and is gone."""

    fresh: Sequence[Pending]
    absent: Sequence[bytes]


def mode_of(executable: bool) -> int:
    """The mode of a blob's file."""
    return MODE_EXECUTABLE if executable else MODE


class Publisher:
    """Publishes batches out of one session's directory."""

    def __init__(self, layout: Layout, index: Index, blobs: Blobs, directory: str) -> None:
        self._layout = layout
        self._index = index
        self._blobs = blobs
        self._directory = directory

    def publish(self, batch: Batch) -> Published:
        """Returns when all of it is durable. Raises OSError or StoreError; nothing of the batch is then promised."""
        if not (batch.pending or batch.seen or batch.stamps):
            return Published((), ())
        many = len(batch.pending) >= _SYNCFS_FROM
        for item in batch.pending.values():
            _make_ready(item, sync=not many)
        if many:
            kernel.syncfs(self._blobs.directory)
        fresh: dict[bytes, Pending] = {}
        try:
            # Nothing is collected while this is held: what has its row now keeps it.
            with self._blobs.publishing():
                fresh = self._without_row(batch.pending)
                self._name(fresh, many)
                absent = self._remember(batch, fresh)
        except BaseException:
            self._take_back(fresh)
            raise
        for key in batch.pending.keys() - fresh.keys():
            discard(batch.pending[key].path)
        return Published(list(fresh.values()), absent)

    def _without_row(self, pending: dict[bytes, Pending]) -> dict[bytes, Pending]:
        """What nobody else was first with: a file that is there stays, as mounts may have it open."""
        with self._index.view() as view:
            return {
                key: item
                for key, item in pending.items()
                if view.get(Table.BLOBS, key) is None or not self._blobs.has_file(item.digest)
            }

    def _name(self, fresh: dict[bytes, Pending], many: bool) -> None:
        """Give durable files their final names, durably."""
        if not fresh:
            return
        directories: set[Path] = set()
        # Both names relative: what the kernel walks of an absolute one costs a third of the call.
        start = len(self._directory) + 1
        with kernel.opened_directory(self._directory) as source:
            for item in fresh.values():
                name, target = item.path[start:], blob_path(item.digest)
                try:
                    os.rename(name, target, src_dir_fd=source, dst_dir_fd=self._blobs.directory)
                except FileNotFoundError:
                    shard = (self._layout.blobs / target).parent
                    shard.mkdir(parents=True, exist_ok=True)
                    directories.update(shard.parents)  # the names of new directories have to last too
                    os.rename(name, target, src_dir_fd=source, dst_dir_fd=self._blobs.directory)
                if not many:
                    directories.add((self._layout.blobs / target).parent)
        if many:
            kernel.syncfs(self._blobs.directory)
        else:
            for directory in directories.difference(self._layout.root.parents):
                kernel.fsync_path(directory)

    def _remember(self, batch: Batch, fresh: dict[bytes, Pending]) -> list[bytes]:
        """Give what was published its rows; returns the keys of what was seen and is gone."""
        now = int(time.time())
        made_executable = batch.made_executable | {key for key, item in batch.pending.items() if item.executable}
        made_executable -= fresh.keys()
        for key in made_executable:
            self._make_executable(key)

        def work(change: Change) -> list[bytes]:
            put_rows(change, [(key, BlobRow(item.digest.size, now, item.executable)) for key, item in fresh.items()])
            touch(change, batch.pending.keys() - fresh.keys(), now)
            absent = touch(change, [key for key in batch.seen if key not in batch.pending], now)
            for key in made_executable:
                if (value := change.get(Table.BLOBS, key)) is not None:
                    change.put(Table.BLOBS, key, pack_row(unpack_row(value)._replace(executable=True)))
            put_stamps(change, batch.stamps)
            return absent

        # Undone by a crash of the machine, it would cost a hash: files and their names are durable.
        return self._index.update(work, lasting=False)

    def _take_back(self, fresh: dict[bytes, Pending]) -> None:
        """After a failure: what got its name and no row goes away again, to leave a full disk as it was."""
        # Whatever fails here leaves whole files without rows, which do no harm.
        with suppress(OSError, StoreError), self._blobs.removing():
            for item in self._without_row(fresh).values():
                if not os.path.lexists(item.path):
                    discard(str(self._layout.blobs / blob_path(item.digest)))

    def _make_executable(self, key: bytes) -> None:
        """A blob that was only data is a program too now: a hard-link checkout needs the bits."""
        path = blob_path(Digest.from_key(key, 0))
        try:
            os.chmod(path, MODE_EXECUTABLE, dir_fd=self._blobs.directory)
        except FileNotFoundError:
            return  # lost behind our back; `Blobs.open` says so when it is needed


def _make_ready(item: Pending, *, sync: bool) -> None:
    """The last that is done to a file before its publication: its mode, and making it durable."""
    mode = mode_of(item.executable)
    if item.mode != mode:
        os.chmod(item.path, mode)
    if sync:
        kernel.fsync_path(item.path)
