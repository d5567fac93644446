"""Collection: which blobs may go, in which order, and taking them away.

Works while trees are mounted and while others add. Never removed: what a
manifest or a living lease reaches, what was used within the grace period, and
what was used since the oldest living ingest session began (that session may be
about to name it). Of the rest the least recently used go first. "Used" is the
later of the index's time and the file's mtime, which Bazel touches on a hit.
Files without a row (Bazel's, or left by a crash) count and go like the others,
and so do those of the cold tier, with the bytes they take there, and the
results of the action cache. Who finds a result touches it before the blobs it
names, so that the result goes first and never promises what is gone.

**Clocks go wrong.** What was used in the future was used before the clock was
set back, or by a machine whose clock is ahead; how long ago, nobody knows. It
counts as used now, and that is written down, so that its age begins to run: it
is neither taken for old nor kept until the clock has caught up.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from store.action_cache import ActionCache
from store.blobs import Blobs, count_removal, delete_rows, pack_row, unpack_row
from store.cold import ColdTier
from store.digest import Digest
from store.entries import DirectoryEntry, FileEntry
from store.index import Change, Index, Table, View
from store.layout import Layout, blob_path
from store.leases import Leases
from store.manifests import manifest_roots
from store.sessions import SKEW_SECONDS, spared_since
from store.stamps import forget_stamps
from store.trees import find_directory, forget_directories, walk_directories
from store.unfinished import remove_unfinished

GRACE_SECONDS = 3600
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did; sizes in bytes of file contents. Results of actions count as blobs here."""

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


_UNINDEXED = b"bytes without rows"


def unindexed_bytes(index: Index) -> int:
    """What had no row at the last collection: results of actions, files that Bazel wrote, the cold tier."""
    with index.view() as view:
        return int(view.get(Table.META, _UNINDEXED) or 0)


class Collector:
    """Collects in one store."""

    def __init__(
        self, layout: Layout, index: Index, blobs: Blobs, leases: Leases, cold: ColdTier, actions: ActionCache
    ) -> None:
        self._actions = actions
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
        now = int(time.time())
        if not dry_run:
            remove_unfinished(self._layout, now)
        files = self._list()
        total = sum(file.size for file in files)
        self._note_unindexed(files)
        if total <= high:
            return Collected(len(files), total, 0, 0, 0)
        # Blobs used at this second or later stay.
        cutoff = min(now - grace, spared_since(self._layout, now))
        ahead = [file for file in files if file.used > now + SKEW_SECONDS]
        marked = self._mark()
        held = sum(file.size for file in files if file.is_held(marked))
        heap = [file for file in files if not file.is_held(marked) and file.used < cutoff and file.size]
        heapq.heapify(heap)
        removed: set[_Candidate] = set()
        removed_bytes = 0
        while heap and total - removed_bytes > low:
            batch, spared = self._next_batch(heap, total - removed_bytes - low, cutoff)
            ahead += [candidate for candidate in spared if candidate.used > now + SKEW_SECONDS]
            gone = batch if dry_run else self._remove(batch, marked, cutoff)
            removed.update(gone)
            size = sum(candidate.size for candidate in gone)
            removed_bytes += size
            progress(size)
        if ahead and not dry_run:
            self._set_back(ahead, now)
        if removed and not dry_run:
            self._note_unindexed([file for file in files if file not in removed])
            self._forget({candidate.key for candidate in removed if candidate.kind is _Kind.HOT}, marked)
        return Collected(len(files), total, len(removed), removed_bytes, held)

    def _list(self) -> list[_Candidate]:
        """Every file of a blob: what the index remembers of it or would, and those of the cold tier."""
        with self._index.view() as view:
            rows = [(key, unpack_row(value)) for key, value in view.scan(Table.BLOBS)]
        found = {key: _Candidate(row.used, _Kind.HOT, key, row.size) for key, row in rows}
        for function, hash_, entry in self._blobs.files():
            key = Digest(function, hash_, 0).key
            if key not in found:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found[key] = _Candidate(int(status.st_mtime), _Kind.HOT, key, status.st_size)
        cold = [_Candidate(file.used, _Kind.COLD, file.digest.key, file.size) for file in self._cold.files()]
        results = [_Candidate(file.used, _Kind.RESULT, file.key, file.size) for file in self._actions.files()]
        return [*results, *found.values(), *cold]

    def _note_unindexed(self, files: list[_Candidate]) -> None:
        """Have the index remember how many bytes have no row: see `unindexed_bytes`."""
        with self._index.view() as view:
            size = sum(
                file.size for file in files if file.kind is not _Kind.HOT or view.get(Table.BLOBS, file.key) is None
            )
            before = view.get(Table.META, _UNINDEXED)
        if before is None or int(before) != size:
            self._index.update(lambda change: change.put(Table.META, _UNINDEXED, str(size).encode()))

    def _set_back(self, ahead: list[_Candidate], now: int) -> None:
        """Have these count as used now, and not in the future."""

        def work(change: Change) -> None:
            for candidate in ahead:
                value = change.get(Table.BLOBS, candidate.key) if candidate.kind is _Kind.HOT else None
                if value is not None:
                    change.put(Table.BLOBS, candidate.key, pack_row(unpack_row(value)._replace(used=now)))

        self._index.update(work)
        for candidate in ahead:
            # Another user's file, perhaps, which only they may set back.
            with suppress(OSError):
                self._set_time(candidate, now)

    def _set_time(self, candidate: _Candidate, now: int) -> None:
        match candidate.kind:
            case _Kind.RESULT:
                self._actions.touch(candidate.key, now)
            case _Kind.HOT:
                path = blob_path(Digest.from_key(candidate.key, 0))
                os.utime(path, (now, now), dir_fd=self._blobs.directory)
            case _Kind.COLD:
                os.utime(self._cold.path(Digest.from_key(candidate.key, 0)), (now, now))

    def _mark(self) -> Marked:
        self._leases.living()  # clears away those of the dead
        marked = Marked(self._kept_roots)
        with self._index.view() as view:
            marked.add_roots(view)
        return marked

    def _kept_roots(self, view: View) -> list[Digest]:
        return [*manifest_roots(view), *self._leases.roots()]

    def _next_batch(
        self, heap: list[_Candidate], excess: int, cutoff: int
    ) -> tuple[list[_Candidate], list[_Candidate]]:
        """The least recently used candidates, enough for `excess` bytes but not too many at once.

        Only now are files looked at: one that was touched since its row was
        written goes back into the heap where it belongs. The second list is of
        those that were touched too late to go at all.
        """
        batch: list[_Candidate] = []
        spared: list[_Candidate] = []
        while heap and len(batch) < _BATCH and excess > 0:
            candidate = heapq.heappop(heap)
            touched = self._touched_at(candidate)
            if touched > candidate.used:
                if touched < cutoff:
                    heapq.heappush(heap, candidate._replace(used=touched))
                else:
                    spared.append(candidate._replace(used=touched))
                continue
            batch.append(candidate)
            excess -= candidate.size
        return batch, spared

    def _touched_at(self, candidate: _Candidate) -> int:
        """The time of the file; what the index says is in the candidate."""
        try:
            match candidate.kind:
                case _Kind.RESULT:
                    return self._actions.used(candidate.key)
                case _Kind.HOT:
                    path = blob_path(Digest.from_key(candidate.key, 0))
                    return int(os.stat(path, dir_fd=self._blobs.directory).st_mtime)
                case _Kind.COLD:
                    return 0
        except FileNotFoundError:
            return 0

    def _remove(self, batch: list[_Candidate], marked: Marked, cutoff: int) -> list[_Candidate]:
        """Remove those of the batch that still may go: rows first, then files.

        A crash between the two leaves files without rows, which are whole.
        """

        def may_go(change: Change, candidate: _Candidate) -> bool:
            if candidate.is_held(marked) or self._touched_at(candidate) >= cutoff:
                return False
            value = change.get(Table.BLOBS, candidate.key) if candidate.kind is _Kind.HOT else None
            return value is None or unpack_row(value).used < cutoff

        def work(change: Change) -> list[_Candidate]:
            # What was mounted or named since the marking counts too.
            marked.add_roots(change)
            gone = [candidate for candidate in batch if may_go(change, candidate)]
            delete_rows(change, [candidate.key for candidate in gone if candidate.kind is _Kind.HOT])
            if gone:
                count_removal(change)
            return gone

        with self._blobs.removing():
            gone = self._index.update(work)
            for candidate in gone:
                with suppress(FileNotFoundError):
                    self._unlink(candidate)
        return gone

    def _unlink(self, candidate: _Candidate) -> None:
        digest = Digest.from_key(candidate.key, 0)
        match candidate.kind:
            case _Kind.RESULT:
                self._actions.remove(candidate.key)
            case _Kind.HOT:
                os.unlink(blob_path(digest), dir_fd=self._blobs.directory)
            case _Kind.COLD:
                self._cold.path(digest).unlink()

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

        with self._blobs.removing():
            self._index.update(work)


class _Kind(IntEnum):
    """What a file is; of equally old ones, the first goes first."""

    RESULT = 0
    HOT = 1
    COLD = 2


class _Candidate(NamedTuple):
    """A file that may go; sorts by when it was last used."""

    used: int
    kind: _Kind
    key: bytes
    size: int

    def is_held(self, marked: Marked) -> bool:
        """Whether a root reaches it. The key of a result is no blob's."""
        return self.kind is not _Kind.RESULT and self.key in marked.keys


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
