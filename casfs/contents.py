"""Opening what a file's bytes are: a verified blob, or a file of the host that hasn't changed.

A `Gateway` says through which mounts the host is looked at. With passthrough
the kernel opens registered files again, with the flags of whoever opens them
through the mount; only what is registered from a read-only mount can't be
written then, so a session with passthrough uses `ReadOnlyGateway`.

Threads may share a `Contents`.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from concurrent.futures import Future
from typing import Protocol

from casfs.mountinfo import list_mounts, mount_above
from casfs.syscalls import clone_read_only, open_cached
from store.blobs import Blobs
from store.entries import FileEntry, ReferenceEntry, Stamp, printable
from store.errors import CorruptBlob, MissingBlob, StaleReference, StoreError
from store.hydration import Hydrator
from store.layout import Layout, blob_path

log = logging.getLogger("casfs")

_AT_FDCWD = -100
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_USED_MOST = 1 << 18
"""Of more blobs (about 30 MB) it isn't remembered that they were opened."""


class Gateway(Protocol):
    """Where blobs and host files are opened."""

    def blobs(self) -> int:
        """A descriptor of the blob directory."""
        ...

    def host(self, path: bytes, device: int) -> tuple[int, bytes]:
        """Where to open a host file: a directory's descriptor and a path from there; `device` is its volume."""
        ...

    def close(self) -> None:
        """Let go of all descriptors."""
        ...


class PlainGateway:
    """The host as this process sees it. For sessions that read blobs themselves."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def blobs(self) -> int:
        """The store's own descriptor."""
        return self._blobs.directory

    def host(self, path: bytes, device: int) -> tuple[int, bytes]:
        """The path as it is."""
        return _AT_FDCWD, path

    def close(self) -> None:
        """Nothing is held."""


class ReadOnlyGateway:
    """The host through read-only copies of its mounts, one a volume, made when first needed.

    They are attached nowhere, so nobody else sees them, and they end with
    this process. Needs CAP_SYS_ADMIN.
    """

    def __init__(self, layout: Layout) -> None:
        self._blobs = clone_read_only(str(layout.blobs))
        self._volumes: dict[int, tuple[int, bytes]] = {}
        self._lock = threading.Lock()

    def blobs(self) -> int:
        """The blob directory on a read-only mount."""
        return self._blobs

    def host(self, path: bytes, device: int) -> tuple[int, bytes]:
        """Below the copy of the volume.

        A path that leads to another volume now (something was mounted over
        it) isn't followed there: the copy doesn't contain other mounts.
        """
        root, prefix = self._volume(path, device)
        return root, path[len(prefix) :]

    def _volume(self, path: bytes, device: int) -> tuple[int, bytes]:
        with self._lock:
            known = self._volumes.get(device)
            if known is not None and path.startswith(known[1]):
                return known
            above = mount_above(path, list_mounts()).path
            descriptor = clone_read_only(above)
            if known is not None:
                os.close(known[0])
            self._volumes[device] = (descriptor, above.rstrip(b"/") + b"/")
            return self._volumes[device]

    def close(self) -> None:
        """Let go of the copies."""
        os.close(self._blobs)
        for descriptor, _ in self._volumes.values():
            os.close(descriptor)


class Contents:
    """Opens the contents of files of a tree.

    With a hydrator it can also have blobs fetched that are not there.
    """

    def __init__(self, blobs: Blobs, gateway: Gateway, hydrator: Hydrator | None = None) -> None:
        self._blobs = blobs
        self._gateway = gateway
        self._hydrator = hydrator
        # Adding to a set is atomic.
        self._used: set[bytes] = set()

    def open_now(self, entry: FileEntry | ReferenceEntry) -> int | None:
        """A descriptor to read from, or None where getting one could take long: `open` in another thread then.

        Raises what `open` raises, but for errors that only `open` can find.
        """
        try:
            if isinstance(entry, ReferenceEntry):
                directory, path = self._gateway.host(entry.path, entry.stamp.device)
                descriptor = open_cached(path, _FLAGS, directory)
            elif self._blobs.is_verified(entry.digest):
                descriptor = open_cached(blob_path(entry.digest), _FLAGS, self._gateway.blobs())
            else:
                return None
        except OSError:
            # EAGAIN: not in the kernel's caches. Anything else `open` will meet again, and explain.
            return None
        if not _is_unchanged(entry, os.fstat(descriptor)):
            os.close(descriptor)
            return None
        self._note_use(entry)
        return descriptor

    def open(self, entry: FileEntry | ReferenceEntry) -> int:
        """A descriptor to read the content from.

        May wait for a disk, and hashes a blob that isn't verified yet. Raises
        MissingBlob, CorruptBlob or StaleReference.
        """
        if isinstance(entry, FileEntry):
            descriptor = self._blobs.open(entry.digest, self._gateway.blobs())
            self._note_use(entry)
            return descriptor
        try:
            directory, path = self._gateway.host(entry.path, entry.stamp.device)
            descriptor = os.open(path, _FLAGS, dir_fd=directory)
        except (OSError, LookupError) as error:
            raise _stale(entry, getattr(error, "strerror", None) or "can't be opened") from error
        try:
            found = Stamp.of(os.fstat(descriptor))
            if found != entry.stamp:
                raise _stale(entry, _difference(entry.stamp, found))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def fetch(self, entry: FileEntry | ReferenceEntry, error: Exception) -> Future[None] | None:
        """After `open` failed with `error`: a future to wait for before another try, or None where that is no use.

        Returns at once. The future fails with what `open` raises.
        """
        if self._hydrator is None or not isinstance(entry, FileEntry):
            return None
        if isinstance(error, CorruptBlob):
            # Even if another copy is found: that a blob was damaged has to be known.
            log.error("%s", error)
        return self._hydrator.fetch(entry.digest) if isinstance(error, MissingBlob | CorruptBlob) else None

    def wait_open(self, entry: FileEntry | ReferenceEntry) -> int:
        """As `open`, having fetched what is missing, however long that takes."""
        try:
            return self.open(entry)
        except (MissingBlob, CorruptBlob) as error:
            fetching = self.fetch(entry, error)
            if fetching is None:
                raise
            try:
                fetching.result()
            except MissingBlob as nowhere:
                if isinstance(error, CorruptBlob):
                    raise error from nowhere
                raise
        return self.open(entry)

    def _note_use(self, entry: FileEntry | ReferenceEntry) -> None:
        if isinstance(entry, FileEntry) and len(self._used) < _USED_MOST:
            self._used.add(entry.digest.key)

    def check_reference(self, entry: ReferenceEntry) -> None:
        """Raise StaleReference unless the file is still what was recorded."""
        try:
            found = Stamp.of(os.stat(entry.path, follow_symlinks=False))
        except OSError as error:
            raise _stale(entry, error.strerror or "is gone") from error
        if found != entry.stamp:
            raise _stale(entry, _difference(entry.stamp, found))

    def close(self) -> None:
        """Let go of the gateway; blobs that were opened count as used until now. Needs the store still open."""
        self._gateway.close()
        used, self._used = self._used, set()
        if not used:
            return
        try:
            self._blobs.note_used(used)
        except StoreError as error:
            log.warning("can't note which blobs were used: %s", error)


def _is_unchanged(entry: FileEntry | ReferenceEntry, status: os.stat_result) -> bool:
    if isinstance(entry, ReferenceEntry):
        return Stamp.of(status) == entry.stamp
    return status.st_size == entry.digest.size


def _stale(entry: ReferenceEntry, why: str) -> StaleReference:
    return StaleReference(f"the file {printable(entry.path)} is not what the manifest recorded: {why}")


def _difference(recorded: Stamp, found: Stamp) -> str:
    changed = [name for name, old, new in zip(Stamp._fields, recorded, found, strict=True) if old != new]
    return f"its {', '.join(changed)} changed"


def explain(error: Exception, path: bytes) -> str:
    """The log line for an open that failed: which path of the mount, and why."""
    if isinstance(error, MissingBlob | CorruptBlob | StaleReference):
        return f"open {printable(path)}: {error}"
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return f"open {printable(path)}: {error} ({errno.errorcode.get(number, number)})"
