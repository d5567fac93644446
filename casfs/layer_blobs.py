"""The blobs that layers show: seen to before they are shown, and fetched where they are missing.

What has no row is hashed, what is missing is fetched when it is opened
(`casfs.blob_mount`), or now where there is no FUSE.

Threads may share one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from casfs.errors import MissingCapability
from casfs.metadata import Part
from store.digest import Digest, DigestFunction
from store.entries import FileEntry
from store.errors import MissingBlob
from store.repository import Store

if TYPE_CHECKING:
    from casfs.blob_mount import BlobMount

_SAMPLES = 16

Needed = tuple[bytes, Digest]
"""A path and the blob its file has."""


class LayerBlobs:
    """Of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        # Under the lock:
        self._fetching: dict[DigestFunction, BlobMount] = {}

    def prepare(self, parts: list[Part], function: DigestFunction) -> tuple[list[Needed], bool]:
        """See to the blobs of what is laid out: some that are here, and whether all are.

        Raises MissingBlob where one can't be had and nobody could fetch it later.
        """
        files = list(_files(parts))
        missing = set(self._store.blobs.prepare([digest for _, digest in files]))
        if missing:
            self._expect([needed for needed in files if needed[1] in missing], function)
            missing = {digest for digest in missing if not self._store.blobs.has(digest)}
        present = (needed for needed in files if needed[1] not in missing)
        return list(islice(present, _SAMPLES)), not missing

    def _expect(self, missing: list[Needed], function: DigestFunction) -> None:
        try:
            self._fetch_mount(function).expect(missing)
        except MissingCapability as error:
            # Nobody can fetch when they are opened, so it has to be now.
            from store.prefetch import prefetch

            failed = prefetch(self._store, [digest for _, digest in missing]).failed
            if failed:
                raise MissingBlob(f"{next(iter(failed.values()))}; {len(failed)} blobs in all ({error})") from error

    def _fetch_mount(self, function: DigestFunction) -> BlobMount:
        with self._lock:
            if function not in self._fetching:
                from casfs.blob_mount import BlobMount

                self._fetching[function] = BlobMount(self._store, function)
            return self._fetching[function]

    def fetching(self, function: DigestFunction, whole: bool) -> list[int]:
        """The data-only layers that come after the blob directory: none where all is here."""
        return [] if whole else [self._fetch_mount(function).layer]

    def upcalls(self) -> int:
        """Requests of the kernel answered so far, for blobs that were missing."""
        return sum(sum(mount.upcalls().values()) for mount in list(self._fetching.values()))

    def close(self) -> None:
        """Fetch nothing more."""
        for mount in self._fetching.values():
            mount.close()


def _files(parts: Iterable[Part]) -> Iterator[Needed]:
    """The files with contents that are laid out."""
    for path, rows in parts:
        for row in rows:
            entry = row.entry
            if isinstance(entry, FileEntry) and entry.digest.size:
                yield (path + b"/" + entry.name if path else entry.name), entry.digest
