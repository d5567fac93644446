"""Demotion: moving blobs that were not used for long to the cold tier.

What may move: a blob that was last used before a given age, that no living
lease reaches, that is no Directory message (those are small, and the index is
rebuilt from them) and that has one name only (a hard-linked checkout keeps the
bytes anyway). Manifests don't hold a blob back: that is the point.

A lease does, though opening a blob again would bring it back: a mount's files
should not get slow while somebody works with them, the kernel engine's data
layer has no way to fetch, and a backing id would keep the space of the removed
file, so nothing would be gained.

In this order, for a batch at a time; a kill between any two steps loses nothing:

    1. Compress into ``tmp/``, hashing what is read: a wrong blob goes into quarantine instead.
    2. Make the compressed files durable.
    3. Under the publication lock: rename them into ``cold/``, make the names durable,
       delete the rows (looking again who uses the blobs), remove the hot files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from store import kernel
from store.blobs import MODE, MODE_EXECUTABLE, BlobRow, Blobs, delete_rows, unpack_row
from store.cold import ColdTier
from store.digest import Digest
from store.gc import Marked
from store.hashing import CHUNK, hasher_for
from store.index import Change, Index, Table
from store.layout import Layout, blob_path
from store.leases import Leases
from store.sessions import Session, spared_since, translated

DEFAULT_LEVEL = 3
_BATCH_BLOBS = 256
_BATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Demoted:
    """What moved to the cold tier, and what that takes there; sizes in bytes."""

    blobs: int = 0
    bytes: int = 0
    cold_bytes: int = 0
    superfluous: int = 0
    """Cold files removed because their blobs were in ``blobs/``, too."""


class _Candidate(NamedTuple):
    key: bytes
    row: BlobRow

    @property
    def digest(self) -> Digest:
        return Digest.from_key(self.key, self.row.size)


class _Compressed(NamedTuple):
    candidate: _Candidate
    path: str
    size: int
    examined: os.stat_result


class Demoter:
    """Moves blobs of one store to its cold tier."""

    def __init__(self, layout: Layout, index: Index, blobs: Blobs, leases: Leases, cold: ColdTier) -> None:
        self._layout = layout
        self._index = index
        self._blobs = blobs
        self._leases = leases
        self._cold = cold

    def demote(
        self,
        age: int,
        *,
        level: int = DEFAULT_LEVEL,
        dry_run: bool = False,
        progress: Callable[[int, int], None] = lambda blobs, size: None,
    ) -> Demoted:
        """Move what was not used for `age` seconds, compressed with zstd's `level`.

        `progress` is told the blobs and bytes of each batch. Raises NoSpace
        and StoreUnusable; what was moved before stays moved.
        """
        superfluous = 0 if dry_run else self._cold.remove_superfluous([file.digest for file in self._cold.files()])
        # One more than the age says, as use is remembered in whole seconds: an age of 0 means everything.
        now = int(time.time())
        cutoff = min(now - age + 1, spared_since(self._layout, now))
        candidates = self._find(cutoff)
        if dry_run:
            return Demoted(len(candidates), sum(candidate.row.size for candidate in candidates))
        blobs = size = cold_bytes = 0
        for batch in _batches(candidates):
            moved = self._move(batch, cutoff, level)
            blobs += len(moved)
            size += sum(item.candidate.row.size for item in moved)
            cold_bytes += sum(item.size for item in moved)
            progress(len(batch), sum(candidate.row.size for candidate in batch))
        return Demoted(blobs, size, cold_bytes, superfluous)

    def _find(self, cutoff: int) -> list[_Candidate]:
        """What may move as far as can be said now, least recently used first."""
        self._leases.living()  # clears away those of the dead
        marked = Marked(lambda view: self._leases.roots())
        with self._index.view() as view:
            marked.add_roots(view)
            found = []
            for key, value in view.scan(Table.BLOBS):
                row = unpack_row(value)
                may_move = row.size and row.used < cutoff and key not in marked.keys
                if may_move and view.get(Table.DIRECTORIES, key) is None:
                    found.append(_Candidate(key, row))
        touched = [(max(candidate.row.used, self._touched_at(candidate)), candidate) for candidate in found]
        return [
            candidate._replace(row=candidate.row._replace(used=used))
            for used, candidate in sorted(touched, key=lambda pair: (pair[0], pair[1].key))
            if used < cutoff
        ]

    def _touched_at(self, candidate: _Candidate) -> int:
        """When others say that the blob was used (Bazel touches its mtime); never before now for what stays anyway."""
        try:
            status = os.stat(blob_path(candidate.digest), dir_fd=self._blobs.directory, follow_symlinks=False)
        except OSError:
            return 1 << 62
        return 1 << 62 if status.st_nlink > 1 else int(status.st_mtime)

    def _move(self, batch: list[_Candidate], cutoff: int, level: int) -> list[_Compressed]:
        session = Session(self._layout)
        try:
            with translated(self._layout, "moving blobs to the cold tier"):
                with ThreadPoolExecutor(os.cpu_count() or 1, "compress") as pool:
                    results = pool.map(
                        lambda numbered: self._compress(numbered[1], f"{session.directory}/{numbered[0]}", level),
                        enumerate(batch),
                    )
                    compressed = [item for item in results if item is not None]
                kernel.syncfs(self._blobs.directory)
                with self._blobs.removing():
                    return self._replace(compressed, cutoff)
        finally:
            session.close()

    def _compress(self, candidate: _Candidate, path: str, level: int) -> _Compressed | None:
        """The blob as a zstd file at `path`; None where it is gone, or was wrong and is in quarantine now."""
        import zstandard

        digest = candidate.digest
        try:
            source = os.open(
                blob_path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._blobs.directory
            )
        except FileNotFoundError:
            return None
        with open(source, "rb", buffering=0) as file, open(path, "wb") as out:
            examined = os.fstat(source)
            hasher, read = hasher_for(digest.function, digest.size), 0
            compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
            if examined.st_size == digest.size:
                frame = compressor.compressobj(size=digest.size)
                while chunk := file.read(CHUNK):
                    hasher.update(chunk)
                    read += len(chunk)
                    if read > digest.size:
                        break  # zstd refuses more than was announced
                    out.write(frame.compress(chunk))
                if read == digest.size:
                    out.write(frame.flush())
            out.flush()
            size = os.fstat(out.fileno()).st_size
        if read != digest.size or hasher.digest() != digest.hash:
            self._blobs.quarantine(digest, examined)
            return None
        os.chmod(path, MODE_EXECUTABLE if candidate.row.executable else MODE)
        os.utime(path, (candidate.row.used, candidate.row.used))
        return _Compressed(candidate, path, size, examined)

    def _replace(self, compressed: list[_Compressed], cutoff: int) -> list[_Compressed]:
        """Put cold files in the place of hot ones. The publication lock is held."""
        present = [item for item in compressed if self._blobs.is_same_file(item.candidate.digest, item.examined)]
        self._cold.publish([(item.candidate.digest, item.path) for item in present])
        marked = Marked(lambda view: self._leases.roots())

        def work(change: Change) -> list[_Compressed]:
            # What was mounted or used since the first look counts too.
            marked.add_roots(change)
            gone = []
            for item in present:
                value = change.get(Table.BLOBS, item.candidate.key)
                if value is None or unpack_row(value).used >= cutoff or item.candidate.key in marked.keys:
                    continue
                gone.append(item)
            delete_rows(change, [item.candidate.key for item in gone])
            return gone

        gone = self._index.update(work)
        for item in gone:
            with suppress(FileNotFoundError):
                os.unlink(blob_path(item.candidate.digest), dir_fd=self._blobs.directory)
        for item in set(present).difference(gone):
            self._cold.path(item.candidate.digest).unlink(missing_ok=True)
        return gone


def _batches(candidates: list[_Candidate]) -> Iterator[list[_Candidate]]:
    batch: list[_Candidate] = []
    size = 0
    for candidate in candidates:
        batch.append(candidate)
        size += candidate.row.size
        if len(batch) >= _BATCH_BLOBS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
