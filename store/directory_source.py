"""A directory as a source: another store with its cold tier, or a Bazel disk cache.

Only read, never changed, and perhaps on a slow or network file system: every
call here may take as long as that takes. Threads may share one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from store.cold import open_cold
from store.digest import Digest
from store.errors import StoreUnusable
from store.layout import Layout, blob_path
from store.sources import Supply

_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class DirectorySource:
    """Another store, its cold tier included, or a Bazel disk cache; only read, perhaps over a network."""

    def __init__(self, directory: Path) -> None:
        self.label = str(directory)
        self._root = directory

    def open(self, digest: Digest) -> Supply | None:
        """Looked for anew each time: the directory may be mounted, changed or gone at any moment."""
        layout = Layout(self._root)
        is_store = layout.marker.exists()
        base = layout.blobs if is_store else self._root
        try:
            descriptor = os.open(base / blob_path(digest), _READING)
        except FileNotFoundError:
            if not base.is_dir():
                raise StoreUnusable("it is not there") from None
            return open_cold(layout.cold, digest) if is_store else None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != digest.size:
            os.close(descriptor)
            return None
        return Supply(open(descriptor, "rb", buffering=0), bool(status.st_mode & 0o100))

    def accepted(self, digests: Sequence[Digest]) -> None:
        """Nothing is changed there."""

    def rejected(self, digest: Digest) -> None:
        """Nothing is changed there; the log names it."""
