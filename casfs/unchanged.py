"""Inputs that an action left as they were: what the upper layer of its sandbox has nothing of is the tree's own.

Their digests are known, so they needn't be read to be outputs. One thread.
"""

from __future__ import annotations

import os

from store.digest import Digest
from store.entries import FileEntry
from store.repository import Store
from store.trees import find_path, get_directory

_ELSEWHERE = (".overlay.opaque", ".overlay.redirect")
"""How names of xattrs end by which overlayfs notes that what is below a directory isn't at the same path."""


class Unchanged:
    """The inputs below one upper layer."""

    def __init__(self, store: Store, upper: bytes, inputs: Digest) -> None:
        self._store = store
        self._upper = upper
        self._inputs = inputs
        self._merged: dict[bytes, bool] = {b"": True}
        """Of directories, whether what is in them comes from the same path of the tree, if not from the upper layer."""

    def find(self, path: bytes) -> FileEntry | None:
        """The input that is shown at a path where the upper layer has nothing; None where that may be another."""
        if not self._is_merged(path.rpartition(b"/")[0]):
            return None
        with self._store.index.view() as view:
            row = find_path(view, get_directory(view, self._inputs).id, path)
        return row.entry if row is not None and isinstance(row.entry, FileEntry) else None

    def _is_merged(self, directory: bytes) -> bool:
        if (known := self._merged.get(directory)) is not None:
            return known
        merged, above = True, b""
        for name in directory.split(b"/"):
            above = above + b"/" + name if above else name
            if above not in self._merged:
                self._merged[above] = merged and self._merges(above)
            merged = self._merged[above]
        return merged

    def _merges(self, directory: bytes) -> bool:
        try:
            names = os.listxattr(os.path.join(self._upper, directory), follow_symlinks=False)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return not any(name.endswith(_ELSEWHERE) for name in names)
