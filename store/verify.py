"""Verification: hash every blob again, put wrong ones aside, rebuild the index.

The directory is the truth: a row whose file is gone is dropped, a file without
a row gets one, and with `rebuild` the whole index is made anew from the files
in ``blobs/`` and ``manifests/``. Verifying may run while trees are mounted,
rebuilding may not: mounts look things up by the ids of interned directories.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from store.blobs import BlobRow, Blobs, count_removal, delete_rows, forget_total, is_known, protect, put_rows
from store.cold import ColdFile, ColdTier
from store.digest import Digest, DigestFunction
from store.errors import BadTree, CorruptBlob, NotFound, StoreUnusable
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
    cold: int = 0
    """Files of the cold tier whose content was right."""
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


class _Checked(NamedTuple):
    """A file that was looked at: its name and size, its state, and what its bytes are (None: it is no file)."""

    named: Digest
    status: os.stat_result | None
    found: Digest | None

    @property
    def is_right(self) -> bool:
        return self.found == self.named


class Verifier:
    """Verifies one store."""

    def __init__(
        self,
        index: Index,
        blobs: Blobs,
        cold: ColdTier,
        manifests: Manifests,
        leases: Leases,
        importer: Importer,
    ) -> None:
        self._index = index
        self._blobs = blobs
        self._cold = cold
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
                checked = [item for item in pool.map(self._check, batch) if item is not None]
                self._settle(checked, result)
                progress(len(checked), sum(item.named.size for item in checked))
            self._check_cold(pool, result, progress)
        self._drop_lost(result)
        self._check_manifests(result)
        return result

    def _files(self) -> Iterator[tuple[DigestFunction, bytes]]:
        for function, hash_, _ in self._blobs.files():
            yield function, hash_

    def _check(self, name: tuple[DigestFunction, bytes]) -> _Checked | None:
        """Hash a file; None where it is gone meanwhile."""
        named = Digest(*name, 0)
        try:
            descriptor = os.open(
                blob_path(named),
                os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK,
                dir_fd=self._blobs.directory,
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise StoreUnusable(f"can't read blob {named.function.label}:{named.hex}: {error.strerror}") from error
            return _Checked(named, None, None)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return _Checked(named, status, None)
            protect(descriptor, status)
            found = hash_descriptor(descriptor, named.function)
            with self._index.view() as view:
                known = is_known(view, found)
            if found.hash == named.hash and not known:
                self._blobs.make_durable(descriptor, found)
        finally:
            os.close(descriptor)
        return _Checked(Digest(*name, found.size), status, found)

    def _settle(self, checked: list[_Checked], result: Verified) -> None:
        right = [(item.found, item.status) for item in checked if item.found and item.status and item.is_right]
        now = int(time.time())

        def work(change: Change) -> int:
            adopted = 0
            for digest, status in right:
                if not is_known(change, digest) and self._blobs.is_same_file(digest, status):
                    row = BlobRow(digest.size, now, bool(status.st_mode & 0o100))
                    put_rows(change, [(digest.key, row)])
                    adopted += 1
            return adopted

        with self._blobs.publishing():
            result.adopted += self._index.update(work)
        for item in checked:
            if not item.is_right:
                self._blobs.quarantine(item.named, item.status)
                result.quarantined.append(str(item.named))
        result.blobs += len(right)
        result.bytes += sum(digest.size for digest, _ in right)

    def _check_cold(self, pool: ThreadPoolExecutor, result: Verified, progress: Progress) -> None:
        """Hash what the cold files hold, and put wrong ones aside."""
        files = self._cold.files()

        def look(file: ColdFile) -> bool | None:
            try:
                return self._cold.is_right(file.digest)
            except FileNotFoundError:
                return None  # brought back meanwhile

        while batch := list(islice(files, _BATCH)):
            for file, right in zip(batch, pool.map(look, batch), strict=True):
                if right:
                    result.cold += 1
                elif right is False and self._cold.quarantine_unless_right(file.digest):
                    result.quarantined.append(f"{file.digest.function.label}:{file.digest.hex} in the cold tier")
            progress(len(batch), sum(file.size for file in batch))

    def _drop_lost(self, result: Verified) -> None:
        with self._index.view() as view:
            keys = [key for key, _ in view.scan(Table.BLOBS)]
        # The empty blob is never lost: it is made again.
        lost = [key for key in keys if self._size_of(key) is None]

        def work(change: Change) -> None:
            delete_rows(change, lost)

        with self._blobs.removing():
            lost = [key for key in lost if self._size_of(key) is None]
            self._index.update(work)
        result.lost += [f"{DigestFunction(key[0]).label}:{key[1:].hex()}" for key in lost]

    def _size_of(self, key: bytes) -> int | None:
        return self._blobs.size_on_disk(DigestFunction(key[0]), key[1:])

    def _check_manifests(self, result: Verified) -> None:
        self._manifests.mirror_missing()
        known = {manifest.name: manifest for manifest in self._manifests.list()}
        for name, mirrored in self._manifests.mirrored():
            manifest = known.get(name) or mirrored
            if manifest is None:
                result.broken[name] = "its file in manifests/ can't be read"
                continue
            try:
                if name not in known:
                    self._importer.from_messages(manifest.root)
                    self._manifests.put(name, manifest.root, manifest.source, replace=True)
                missing = self._manifests.count_missing(manifest.root, name)
            except (BadTree, NotFound, CorruptBlob) as error:
                result.broken[name] = str(error)
                continue
            if missing:
                result.incomplete[name] = missing


def _clear(change: Change) -> None:
    for table in (Table.BLOBS, Table.STAMPS, Table.DIRECTORIES, Table.ENTRIES, Table.WAYPOINTS, Table.MANIFESTS):
        change.clear(table)
    forget_total(change)
    count_removal(change)
