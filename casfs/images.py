"""EROFS images of trees, kept in the store: the metadata layer of what is large and comes again.

An image is a blob like any other: verified, durable, collected when it was not
used for long, and made anew if it is gone or damaged, as the same tree always
makes the same bytes. The index remembers which blob is the image of which tree,
and that all blobs of the tree were here when nothing had been removed since:

    META  "layer " + family + subtree's digest key (+ hash of its path) → image's digest key, size, removals

An image is of a subtree at its place: the directories that lead there are in it, too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from casfs.erofs import write_image
from casfs.newmount import NO_DEV, NO_SUID, READ_ONLY, FileSystemContext
from casfs.overlay import Family, redirect_of
from casfs.planning import Subtree
from store.blobs import touch
from store.digest import KEY_BYTES, Digest, DigestFunction
from store.entries import DirectoryEntry
from store.errors import CorruptBlob, MissingBlob
from store.index import Change, Table, View
from store.repository import Store
from store.trees import Row, list_entries

NEVER_WHOLE = (1 << 64) - 1
"""Where `removals` never stands: blobs of the tree are missing."""

_TAIL = struct.Struct("<QQ")


class Image(NamedTuple):
    """The image of a tree; `removals` as it stood when the tree's blobs were last known to be all here."""

    digest: Digest
    removals: int


def find_image(view: View, subtree: Subtree, family: Family) -> Image | None:
    """What is remembered of a tree's image, which may be gone."""
    value = view.get(Table.META, _key(subtree, family))
    if value is None:
        return None
    size, counted = _TAIL.unpack_from(value, KEY_BYTES)
    return Image(Digest.from_key(value[:KEY_BYTES], size), counted)


def open_image(store: Store, subtree: Subtree, family: Family, counted: int) -> int:
    """A descriptor of the tree's image, made now if it isn't there; once, if two ask at a time.

    All blobs of the tree were here when `removals` stood at `counted`. Raises NoSpace, StoreUnusable.
    """
    with _alone(store, subtree):
        with store.index.view() as view:
            known = find_image(view, subtree, family)
        if known is not None:
            try:
                descriptor = store.blobs.open(known.digest)
            except (MissingBlob, CorruptBlob):
                pass
            else:
                _remember(store, subtree, family, Image(known.digest, counted))
                return descriptor
        digest = _build(store, subtree, family)
        _remember(store, subtree, family, Image(digest, counted))
        return store.blobs.open(digest)


def _build(store: Store, subtree: Subtree, family: Family) -> Digest:
    leading = subtree.path.split(b"/") if subtree.path else []

    def rows_of(number: int) -> list[Row]:
        if number < 0:  # the directories that lead to the subtree: -1 is the uppermost
            depth = -number
            below = subtree.id if depth == len(leading) else number - 1
            return [Row(0, DirectoryEntry(leading[depth - 1], subtree.digest), below)]
        # A view each: adding what is written needs the index too, and a thread has one view at a time.
        with store.index.view() as view:
            return list(list_entries(view, number))

    with store.ingest() as ingest:
        pieces = write_image(-1 if leading else subtree.id, rows_of, redirect_of, family)
        return ingest.add_stream(_Stream(pieces), DigestFunction.BLAKE3)


def _remember(store: Store, subtree: Subtree, family: Family, image: Image) -> None:
    """Note which blob it is, what was complete when, and that it is in use now."""
    value = image.digest.key + _TAIL.pack(image.digest.size, image.removals)

    def work(change: Change) -> None:
        change.put(Table.META, _key(subtree, family), value)
        touch(change, [image.digest.key], int(time.time()))

    store.index.update(work)


def mount_image(image: int) -> int:
    """An EROFS mount of an open image, attached nowhere. File-backed: Linux 6.12."""
    with FileSystemContext("erofs") as context:
        context.set_string("source", f"/proc/self/fd/{image}")
        return context.mount(READ_ONLY | NO_SUID | NO_DEV)


def _key(subtree: Subtree, family: Family) -> bytes:
    # A key has at most 511 bytes.
    place = hashlib.sha256(subtree.path).digest() if subtree.path else b""
    return b"layer " + family.name.encode() + b" " + subtree.digest.key + place


@contextmanager
def _alone(store: Store, subtree: Subtree) -> Iterator[None]:
    """One at a time for each subtree, in all processes; the lock goes with whoever is killed."""
    # Among the leases, since there a lock file that nobody holds is cleared away.
    path = store.layout.leases / f"image-{subtree.digest.hex}"
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Whoever was first, or a cleaner, may have removed the file that was waited for.
            if not _is_still(path, lock):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(lock)


def _is_still(path: os.PathLike[str], descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


class _Stream:
    """Pieces of bytes, as a file to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        taken = bytes(self._rest[:size])
        self._rest = self._rest[size:]
        return taken
