"""Manifests: names for roots.

    MANIFESTS  name → JSON {"root", "created", "source", "missing", "removals"}

Each is also a small file in ``STORE/manifests/``, written before the row is,
so that an index that has to be rebuilt loses no name.

`missing` is how many of the tree's blobs were not in the store when that was
last counted; it holds as long as the index has seen no removal since.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from store import kernel
from store.blobs import Blobs, is_known, removals
from store.cold import ColdTier
from store.digest import Digest
from store.entries import FileEntry
from store.errors import AlreadyExists, BadInput, BadName, MissingManifest, StoreError
from store.index import Change, Index, Table, View
from store.layout import Layout
from store.sessions import Session, translated
from store.trees import Directory, get_directory, walk_directories

_NAME = re.compile(r"[A-Za-z0-9_+@][A-Za-z0-9._+@-]{0,199}")

LOOK_AT_MOST = 20_000
"""Up to so many nodes a tree's blobs are looked for on disk before a mount; above, the index's word is taken."""


class Manifest(NamedTuple):
    """A named root; `created` in seconds since the epoch, `source` says where it came from."""

    name: str
    root: Digest
    created: int
    source: str
    missing: int
    removals: int


def check_manifest_name(name: str) -> None:
    """Raise BadName unless `name` can be a manifest's."""
    if not _NAME.fullmatch(name):
        raise BadName(
            f"{name!r} can't be a manifest's name: up to 200 letters, digits and . _ + @ -, "
            "beginning with none of . and -"
        )


def _pack(manifest: Manifest) -> bytes:
    record = manifest._asdict()
    del record["name"]
    record["root"] = str(manifest.root)
    return json.dumps(record).encode()


def _unpack(name: str, value: bytes) -> Manifest:
    record = json.loads(value)
    record["root"] = Digest.parse(record["root"])
    return Manifest(name, **record)


class Manifests:
    """The named roots of one store."""

    def __init__(self, layout: Layout, index: Index, blobs: Blobs, cold: ColdTier) -> None:
        self._layout = layout
        self._index = index
        self._blobs = blobs
        self._cold = cold

    def find(self, name: str) -> Manifest | None:
        """The manifest of that name, or None."""
        with self._index.view() as view:
            value = view.get(Table.MANIFESTS, name.encode()) if _NAME.fullmatch(name) else None
        return None if value is None else _unpack(name, value)

    def get(self, name: str) -> Manifest:
        """The manifest of that name. Raises MissingManifest, naming what is similar."""
        manifest = self.find(name)
        if manifest is None:
            known = [m.name for m in self.list()]
            import difflib

            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; 'casfs manifest list' shows those there are"
            raise MissingManifest(f"there is no manifest {name!r}{hint}")
        return manifest

    def list(self) -> list[Manifest]:
        """All manifests, by name."""
        with self._index.view() as view:
            return [_unpack(key.decode(), value) for key, value in view.scan(Table.MANIFESTS)]

    def put(self, name: str, root: Digest, source: str, *, replace: bool) -> Manifest:
        """Name a root that is interned. Raises BadName, AlreadyExists, MissingTree."""
        check_manifest_name(name)
        with self._index.view() as view:
            before = removals(view)
            directory = get_directory(view, root)
        manifest = Manifest(name, root, int(time.time()), source, self._count_missing(directory, look=False), before)

        def work(change: Change) -> None:
            if not replace and change.get(Table.MANIFESTS, name.encode()) is not None:
                raise AlreadyExists(f"there is a manifest {name!r} already; --replace replaces it")
            self._mirror(manifest)
            change.put(Table.MANIFESTS, name.encode(), _pack(manifest))

        try:
            self._index.update(work)
        except StoreError:
            self._mirror_again(name)
            raise
        return manifest

    def _mirror(self, manifest: Manifest) -> None:
        """Write the manifest's file, which appears at once and durably."""
        with translated(self._layout, f"writing manifest {manifest.name!r}"):
            session = Session(self._layout)
            try:
                partial = session.directory / "manifest"
                partial.write_bytes(_pack(manifest))
                kernel.fsync_path(partial)
                os.replace(partial, self._path(manifest.name))
                kernel.fsync_path(self._layout.manifests)
            finally:
                session.close()

    def _mirror_again(self, name: str) -> None:
        """After a change that failed: the file says again what the index says."""
        with suppress(OSError, StoreError):
            manifest = self.find(name)
            if manifest is None:
                self._path(name).unlink(missing_ok=True)
            else:
                self._mirror(manifest)

    def _path(self, name: str) -> Path:
        return self._layout.manifests / f"{name}.json"

    def remove(self, name: str) -> Manifest:
        """Forget a name; its blobs stay until they are collected. Raises MissingManifest."""
        manifest = self.get(name)

        def work(change: Change) -> None:
            change.delete(Table.MANIFESTS, name.encode())
            # First the file: the other way round a kill would leave a name that comes back when the index is rebuilt.
            self._path(name).unlink(missing_ok=True)

        try:
            self._index.update(work)
        except StoreError:
            self._mirror_again(name)
            raise
        return manifest

    def mirrored(self) -> Iterator[tuple[str, Manifest | None]]:
        """What the files say, by name, for rebuilding the index; None for one that can't be read."""
        for path in sorted(self._layout.manifests.glob("*.json")):
            name = path.name.removesuffix(".json")
            try:
                check_manifest_name(name)
                yield name, _unpack(name, path.read_bytes())
            except (OSError, ValueError, TypeError, KeyError, BadInput):
                yield name, None

    def mirror_missing(self) -> None:
        """Write the files of those that have none."""
        for manifest in self.list():
            if not self._path(manifest.name).exists():
                self._mirror(manifest)

    def count_missing(self, root: Digest, name: str | None = None) -> int:
        """How many of a tree's blobs are not in the store, nor in its cold tier.

        Small trees are looked up on disk; for large ones the count kept with
        the manifest holds until blobs were removed. Raises MissingTree
        for a root that is not interned.
        """
        with self._index.view() as view:
            directory = get_directory(view, root)
            now = removals(view)
        if directory.nodes <= LOOK_AT_MOST:
            return self._count_missing(directory, look=True)
        manifest = self.find(name) if name else None
        if manifest is not None and manifest.root == root and manifest.removals == now and not manifest.missing:
            return 0
        missing = self._count_missing(directory, look=False)
        if manifest is not None and manifest.root == root:
            updated = manifest._replace(missing=missing, removals=now)
            self._index.update(lambda change: change.put(Table.MANIFESTS, updated.name.encode(), _pack(updated)))
        return missing

    def _count_missing(self, directory: Directory, *, look: bool) -> int:
        missing = 0
        with self._index.view() as view:
            for digest in tree_blobs(view, directory):
                if (look or not is_known(view, digest)) and not self._blobs.has_file(digest):
                    missing += not self._cold.has(digest)
        return missing


def tree_blobs(view: View, directory: Directory) -> Iterator[Digest]:
    """The digests of all files of a tree, each once."""
    seen: set[bytes] = set()
    for _, rows in walk_directories(view, directory.id, set()):
        for row in rows:
            entry = row.entry
            if isinstance(entry, FileEntry) and entry.digest.hash not in seen:
                seen.add(entry.digest.hash)
                yield entry.digest


def manifest_roots(view: View) -> list[Digest]:
    """The roots of all manifests."""
    return [_unpack(key.decode(), value).root for key, value in view.scan(Table.MANIFESTS)]
