"""Collection: which blobs may go, in which order, and taking them away.

Works while trees are mounted and while others add. Never removed: what a
manifest or a living lease reaches, what was used within the grace period, and
what was used since the oldest living ingest session began (that session may be
about to name it). Of the rest the least recently used go first. "Used" is the
later of the index's time and the file's mtime, which Bazel touches on a hit.
Files without a row (Bazel's, or left by a crash) count and go like the others,
and so do those of the cold tier, with the bytes they take there.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from store.blobs import Blobs, count_removal, unpack_row
from store.cold import ColdTier
from store.digest import Digest
from store.entries import DirectoryEntry, FileEntry
from store.index import Change, Index, Table, View
from store.layout import Layout, blob_path
from store.leases import Leases, lease_roots
from store.manifests import manifest_roots
from store.sessions import living_sessions
from store.stamps import forget_stamps
from store.trees import find_directory, forget_directories, walk_directories

GRACE_SECONDS = 3600
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did; sizes in bytes of file contents."""

    blobs_before: int
    bytes_before: int
    removed_blobs: int
    removed_bytes: int
    pinned_bytes: int
    """What manifests and leases hold; a limit below this can't be reached."""

    @property
    def bytes_after(self) -> int:
        """What the store has now."""
        return self.bytes_before - self.removed_bytes


def kept_roots(view: View) -> list[Digest]:
    """What a collection spares: the roots of all manifests and leases."""
    return [*manifest_roots(view), *lease_roots(view)]


class Collector:
    """Collects in one store."""

    def __init__(self, layout: Layout, index: Index, blobs: Blobs, leases: Leases, cold: ColdTier) -> None:
        self._layout = layout
        self._index = index
        self._blobs = blobs
        self._leases = leases
        self._cold = cold

    def collect(
        self,
        high: int,
        low: int,
        *,
        grace: int = GRACE_SECONDS,
        dry_run: bool = False,
        progress: Callable[[int], None] = lambda size: None,
    ) -> Collected:
        """Bring the store from above `high` bytes to at most `low`, as far as what may go allows.

        `grace` is in seconds. `progress` is told the bytes of each batch removed.
        """
        files = self._list()
        total = sum(file.size for file in files)
        if total <= high:
            return Collected(len(files), total, 0, 0, 0)
        cutoff = self._cutoff(grace)
        marked = self._mark()
        held = sum(file.size for file in files if file.key in marked.keys)
        heap = [file for file in files if file.key not in marked.keys and file.used < cutoff and file.size]
        heapq.heapify(heap)
        removed: set[_Candidate] = set()
        removed_bytes = 0
        while heap and total - removed_bytes > low:
            batch = self._next_batch(heap, total - removed_bytes - low, cutoff)
            gone = batch if dry_run else self._remove(batch, marked, cutoff)
            removed.update(gone)
            size = sum(candidate.size for candidate in gone)
            removed_bytes += size
            progress(size)
        if removed and not dry_run:
            self._forget({candidate.key for candidate in removed if not candidate.cold}, marked)
        return Collected(len(files), total, len(removed), removed_bytes, held)

    def _list(self) -> list[_Candidate]:
        """Every file of a blob: what the index remembers of it or would, and those of the cold tier."""
        with self._index.view() as view:
            rows = [(key, unpack_row(value)) for key, value in view.scan(Table.BLOBS)]
        found = {key: _Candidate(row.used, key, row.size) for key, row in rows}
        for function, hash_, entry in self._blobs.files():
            key = Digest(function, hash_, 0).key
            if key not in found:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found[key] = _Candidate(int(status.st_mtime), key, status.st_size)
        cold = [_Candidate(file.used, file.digest.key, file.size, cold=True) for file in self._cold.files()]
        return [*found.values(), *cold]

    def _cutoff(self, grace: int) -> int:
        """Blobs used at this second or later stay."""
        began = [nanoseconds // 1_000_000_000 for nanoseconds in living_sessions(self._layout, clean=True)]
        return min([int(time.time()) - grace, *began])

    def _mark(self) -> Marked:
        self._leases.living()  # clears away those of the dead
        marked = Marked(kept_roots)
        with self._index.view() as view:
            marked.add_roots(view)
        return marked

    def _next_batch(self, heap: list[_Candidate], excess: int, cutoff: int) -> list[_Candidate]:
        """The least recently used candidates, enough for `excess` bytes but not too many at once.

        Only now are files looked at: one that was touched since its row was
        written goes back into the heap where it belongs.
        """
        batch: list[_Candidate] = []
        while heap and len(batch) < _BATCH and excess > 0:
            candidate = heapq.heappop(heap)
            touched = 0 if candidate.cold else self._touched_at(candidate.key)
            if touched > candidate.used:
                if touched < cutoff:
                    heapq.heappush(heap, candidate._replace(used=touched))
                continue
            batch.append(candidate)
            excess -= candidate.size
        return batch

    def _touched_at(self, key: bytes) -> int:
        try:
            return int(os.stat(blob_path(Digest.from_key(key, 0)), dir_fd=self._blobs.directory).st_mtime)
        except FileNotFoundError:
            return 0

    def _remove(self, batch: list[_Candidate], marked: Marked, cutoff: int) -> list[_Candidate]:
        """Remove those of the batch that still may go: rows first, then files.

        A crash between the two leaves files without rows, which are whole.
        """

        def work(change: Change) -> list[_Candidate]:
            # What was mounted or named since the marking counts too.
            marked.add_roots(change)
            gone = []
            for candidate in batch:
                if candidate.cold:
                    if candidate.key not in marked.keys:
                        gone.append(candidate)
                    continue
                value = change.get(Table.BLOBS, candidate.key)
                used = self._touched_at(candidate.key) if value is None else unpack_row(value).used
                if candidate.key in marked.keys or used >= cutoff:
                    continue
                change.delete(Table.BLOBS, candidate.key)
                gone.append(candidate)
            if gone:
                count_removal(change)
            return gone

        with self._blobs.removing():
            gone = self._index.update(work)
            for candidate in gone:
                digest = Digest.from_key(candidate.key, 0)
                with suppress(FileNotFoundError):
                    if candidate.cold:
                        self._cold.path(digest).unlink()
                    else:
                        os.unlink(blob_path(digest), dir_fd=self._blobs.directory)
        return gone

    def _forget(self, removed: set[bytes], marked: Marked) -> None:
        """Drop what the index knows of blobs that are gone: interned directories, stamps."""

        def work(change: Change) -> None:
            marked.add_roots(change)
            doomed = {
                key
                for key, _ in change.scan(Table.DIRECTORIES)
                if key not in marked.keys and change.get(Table.BLOBS, key) is None
            }
            if doomed:
                forget_directories(change, doomed)
            forget_stamps(change, removed)

        self._index.update(work)


class _Candidate(NamedTuple):
    """A file that may go; sorts by when its blob was last used."""

    used: int
    key: bytes
    size: int
    cold: bool = False


class Marked:
    """The keys of all blobs that some roots reach, Directory messages included; grows, never shrinks."""

    def __init__(self, find_roots: Callable[[View], list[Digest]]) -> None:
        self._find_roots = find_roots
        self._roots: set[bytes] = set()
        self._directories: set[int] = set()
        self.keys: set[bytes] = set()

    def add_roots(self, view: View) -> None:
        """Mark what the roots of this moment reach and was not marked yet."""
        for root in self._find_roots(view):
            if root.key not in self._roots:
                self._roots.add(root.key)
                self._mark(view, root)

    def _mark(self, view: View, root: Digest) -> None:
        self.keys.add(root.key)
        directory = find_directory(view, root)
        if directory is None:
            return
        for _, rows in walk_directories(view, directory.id, self._directories):
            self.keys.update(row.entry.digest.key for row in rows if isinstance(row.entry, FileEntry | DirectoryEntry))
