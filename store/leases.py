"""Leases: what must not be collected because something living uses it.

A lease is a file ``leases/<id>``: JSON {"kind", "roots": [digest, …], "holder", "since"}, and a line each for the
digests that were added later.
Whether the holder lives is not guessed from a process id (which means nothing
in another pid namespace): it holds a lock on the file, and the kernel lets go
of it when the last process with that descriptor is gone.

No row of the index: a lease is taken for each sandbox, and a commit would be a
sync of the disk. What makes it safe is the publication lock: a lease appears
while nothing is being removed, and whoever removes looks at the leases first.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from store.blobs import Blobs
from store.digest import Digest
from store.errors import BadDigest
from store.layout import Layout
from store.sessions import translated

MOUNT_PREFIX = "casfs:"
"""How the source of a mount that holds a lease begins."""


class LeaseInfo(NamedTuple):
    """A lease as others see it; `since` in seconds since the epoch."""

    id: str
    kind: str
    roots: tuple[Digest, ...]
    holder: str
    since: int


class Lease:
    """A lease that this process holds until `release` or its death. Survives a fork; a context manager."""

    def __init__(self, layout: Layout, blobs: Blobs, info: LeaseInfo, lock: int) -> None:
        self.info = info
        """As it was taken, without what was added."""
        self._layout = layout
        self._blobs = blobs
        self._path = layout.leases / info.id
        self._lock = lock

    def add(self, roots: Iterable[Digest]) -> None:
        """Pin more, from now on, for as long as the lease is held: a fraction of what another lease would cost.

        For one thread at a time.
        """
        lines = "".join(f"\n{digest}" for digest in roots).encode()
        with translated(self._layout, f"adding to the lease of {self.info.holder}"), self._blobs.publishing():
            size = os.lseek(self._lock, 0, os.SEEK_END)
            if os.write(self._lock, lines) != len(lines):
                os.ftruncate(self._lock, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def release(self) -> None:
        """Give the lease up."""
        self._path.unlink(missing_ok=True)
        os.close(self._lock)

    def leave_to_mount(self) -> None:
        """Let the mount hold the lease whose source is `mount_source` of it: it lives until that is unmounted.

        For mounts with no process behind. They are found in this process's
        namespace and in that of process 1.
        """
        os.close(self._lock)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def mount_source(lease: LeaseInfo) -> str:
    """What /proc/self/mountinfo shall show as the source of a mount that holds a lease."""
    return f"{MOUNT_PREFIX}{lease.id}"


def _is_mounted(lease_id: str) -> bool:
    source = f" {MOUNT_PREFIX}{lease_id} "
    for process in ("self", "1"):
        with suppress(OSError), open(f"/proc/{process}/mountinfo", errors="replace") as file:
            if source in file.read():
                return True
    return False


class Leases:
    """The leases of one store."""

    def __init__(self, layout: Layout, blobs: Blobs) -> None:
        self._layout = layout
        self._blobs = blobs

    def acquire(self, kind: str, roots: Iterable[Digest], holder: str) -> Lease:
        """Pin the trees below `roots`. `kind` and `holder` tell a person who does.

        Nothing they reach is removed from now on; what is gone already is not looked for.
        """
        pinned, since = tuple(roots), int(time.time())
        record = {"kind": kind, "roots": [str(digest) for digest in pinned], "holder": holder, "since": since}
        with translated(self._layout, f"taking a lease for {holder}"), self._blobs.publishing():
            lease_id, lock = self._make_locked()
            try:
                os.write(lock, json.dumps(record).encode())
            except BaseException:
                (self._layout.leases / lease_id).unlink(missing_ok=True)
                os.close(lock)
                raise
        return Lease(self._layout, self._blobs, LeaseInfo(lease_id, kind, pinned, holder, since), lock)

    def _make_locked(self) -> tuple[str, int]:
        while True:
            lease_id = os.urandom(8).hex()
            path = self._layout.leases / lease_id
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return lease_id, lock
            os.close(lock)  # a cleaner took the file before it was locked

    def clean(self) -> None:
        """Remove what those left behind who were killed."""
        for name in os.listdir(self._layout.leases):
            self._is_held(name)

    def living(self) -> list[LeaseInfo]:
        """The leases whose holders live; the others are cleared away."""
        return [lease for lease in self._all() if self._is_held(lease.id)]

    def roots(self) -> list[Digest]:
        """The roots of all leases, of living and dead holders. Binding while `Blobs.removing` is held."""
        return [root for lease in self._all() for root in lease.roots]

    def _all(self) -> Iterator[LeaseInfo]:
        for name in os.listdir(self._layout.leases):
            # What is no lease is the lock of something else, or not written yet.
            with suppress(OSError, ValueError, KeyError, TypeError, BadDigest):
                first, *added = (self._layout.leases / name).read_bytes().split(b"\n")
                record = json.loads(first)
                roots = tuple(map(Digest.parse, [*record["roots"], *(line.decode() for line in added)]))
                yield LeaseInfo(name, record["kind"], roots, record["holder"], record["since"])

    def _is_held(self, lease_id: str) -> bool:
        """Whether somebody living, or a mount, holds that lease; if not, it is cleared away."""
        path = self._layout.leases / lease_id
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # another user's, most likely: who can't tell lets it live
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_mounted(lease_id):
                return True
            with suppress(OSError):
                path.unlink()
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False
