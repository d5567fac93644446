"""Verification: hash every blob again, put wrong ones aside, rebuild the index.

The directory is the truth: a row whose file is gone is dropped, a file without
a row gets one, and with `rebuild` the whole index is made anew from the files
in ``blobs/`` and ``manifests/``. Verifying may run while trees are mounted,
rebuilding may not: mounts look things up by the ids of interned directories.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from store.blobs import BlobRow, Blobs, count_removal, pack_row
from store.digest import Digest, DigestFunction
from store.errors import BadTree, NotFound, StoreUnusable
from store.hashing import hash_descriptor
from store.importing import Importer
from store.index import Change, Index, Table
from store.layout import blob_path
from store.leases import Leases
from store.manifests import Manifests

_BATCH = 1024


@dataclass(slots=True)
class Verified:
    """What a verification found; digests as texts."""

    blobs: int = 0
    bytes: int = 0
    adopted: int = 0
    """Files that had no row."""
    quarantined: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Rows whose file was gone."""
    incomplete: dict[str, int] = field(default_factory=dict)
    """Manifests with missing blobs, and how many."""
    broken: dict[str, str] = field(default_factory=dict)
    """Manifests whose directories can't be read, and why."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.quarantined or self.lost or self.incomplete or self.broken)


Progress = Callable[[int, int], None]
"""Told how many blobs and bytes have just been hashed."""


class Verifier:
    """Verifies one store."""

    def __init__(self, index: Index, blobs: Blobs, manifests: Manifests, leases: Leases, importer: Importer) -> None:
        self._index = index
        self._blobs = blobs
        self._manifests = manifests
        self._leases = leases
        self._importer = importer

    def verify(self, *, rebuild: bool = False, progress: Progress = lambda blobs, size: None) -> Verified:
        """Check everything. With `rebuild` the index is emptied first; raises StoreUnusable while leases live."""
        result = Verified()
        if rebuild:
            if leases := self._leases.living():
                users = ", ".join(f"{lease.kind} {lease.holder}" for lease in leases)
                raise StoreUnusable(f"can't rebuild the index while it is in use by {users}: unmount first")
            self._index.update(_clear)
        with ThreadPoolExecutor(os.cpu_count() or 1, "verify") as pool:
            files = self._files()
            while batch := list(islice(files, _BATCH)):
                checked = list(pool.map(self._check, batch))
                self._settle(batch, checked, result)
                progress(len(batch), sum(digest.size for digest, _ in batch))
        self._drop_lost(result)
        self._check_manifests(result)
        return result

    def _files(self) -> Iterator[tuple[Digest, bool]]:
        for function, hash_, entry in self._blobs.files():
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield Digest(function, hash_, status.st_size), bool(status.st_mode & 0o100)

    def _check(self, item: tuple[Digest, bool]) -> Digest | None:
        """What the file's digest is, or None where it can't be read or is gone."""
        digest, _ = item
        try:
            descriptor = os.open(
                blob_path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._blobs.directory
            )
        except FileNotFoundError:
            return None
        try:
            found = hash_descriptor(descriptor, digest.function)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return found

    def _settle(self, batch: list[tuple[Digest, bool]], checked: list[Digest | None], result: Verified) -> None:
        right = [item for item, found in zip(batch, checked, strict=True) if found == item[0]]
        now = int(time.time())

        def work(change: Change) -> int:
            adopted = 0
            for digest, executable in right:
                if change.get(Table.BLOBS, digest.key) is None and self._blobs.has_file(digest):
                    change.put(Table.BLOBS, digest.key, pack_row(BlobRow(digest.size, now, executable)))
                    adopted += 1
            return adopted

        with self._blobs.publishing():
            result.adopted += self._index.update(work)
        for (digest, _), found in zip(batch, checked, strict=True):
            if found is not None and found != digest:
                self._blobs.quarantine(digest)
                result.quarantined.append(str(digest))
        result.blobs += len(right)
        result.bytes += sum(digest.size for digest, _ in right)

    def _drop_lost(self, result: Verified) -> None:
        with self._index.view() as view:
            keys = [key for key, _ in view.scan(Table.BLOBS)]
        lost = [key for key in keys if self._size_of(key) is None]

        def work(change: Change) -> None:
            for key in lost:
                change.delete(Table.BLOBS, key)
            if lost:
                count_removal(change)

        with self._blobs.removing():
            lost = [key for key in lost if self._size_of(key) is None]
            self._index.update(work)
        result.lost += [f"{DigestFunction(key[0]).label}:{key[1:].hex()}" for key in lost]

    def _size_of(self, key: bytes) -> int | None:
        return self._blobs.size_on_disk(DigestFunction(key[0]), key[1:])

    def _check_manifests(self, result: Verified) -> None:
        known = {manifest.name for manifest in self._manifests.list()}
        for manifest in self._manifests.mirrored():
            try:
                if manifest.name not in known:
                    self._importer.from_messages(manifest.root)
                    self._manifests.put(manifest.name, manifest.root, manifest.source, replace=True)
                missing = self._manifests.count_missing(manifest.root, manifest.name)
            except (BadTree, NotFound) as error:
                result.broken[manifest.name] = str(error)
                continue
            if missing:
                result.incomplete[manifest.name] = missing


def _clear(change: Change) -> None:
    for table in (Table.BLOBS, Table.STAMPS, Table.DIRECTORIES, Table.ENTRIES, Table.WAYPOINTS, Table.MANIFESTS):
        change.clear(table)
    count_removal(change)
