"""Leases: what must not be collected because something living uses it.

    LEASES  id → JSON {"kind", "roots": [digest, …], "holder", "since"}

Whether the holder lives is not guessed from a process id (which means nothing
in another pid namespace): it holds a lock on ``leases/<id>``, and the kernel
lets go of it when the last process with that descriptor is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from store.digest import Digest
from store.index import Change, Index, Table, View
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

    def __init__(self, index: Index, layout: Layout, info: LeaseInfo, lock: int) -> None:
        self.info = info
        self._index = index
        self._path = layout.leases / info.id
        self._lock = lock

    def release(self) -> None:
        """Give the lease up."""
        self._index.update(lambda change: change.delete(Table.LEASES, self.info.id.encode()))
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

    def __init__(self, layout: Layout, index: Index) -> None:
        self._layout = layout
        self._index = index

    def acquire(self, kind: str, roots: Iterable[Digest], holder: str) -> Lease:
        """Pin the trees below `roots`. `kind` and `holder` tell a person who does."""
        with translated(self._layout, f"taking a lease for {holder}"):
            lease_id, lock = self._make_locked()
        info = LeaseInfo(lease_id, kind, tuple(roots), holder, int(time.time()))
        value = json.dumps(
            {"kind": kind, "roots": [str(d) for d in info.roots], "holder": holder, "since": info.since}
        ).encode()
        try:
            self._index.update(lambda change: change.put(Table.LEASES, info.id.encode(), value))
        except BaseException:
            (self._layout.leases / lease_id).unlink(missing_ok=True)
            os.close(lock)
            raise
        return Lease(self._index, self._layout, info, lock)

    def _make_locked(self) -> tuple[str, int]:
        while True:
            lease_id = secrets.token_hex(8)
            path = self._layout.leases / lease_id
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return lease_id, lock
            os.close(lock)  # a cleaner took the file before it was locked

    def clean(self) -> None:
        """Remove lock files that a kill left without a lease."""
        with self._index.view() as view:
            known = {lease.id for lease in _all(view)}
        for name in os.listdir(self._layout.leases):
            if name not in known:
                self._remove_unless_held(name)

    def _remove_unless_held(self, name: str) -> None:
        path = self._layout.leases / name
        with suppress(OSError):
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(lock)

    def living(self) -> list[LeaseInfo]:
        """The leases whose holders live; the others are cleared away."""
        with self._index.view() as view:
            leases = list(_all(view))
        dead = [lease for lease in leases if not self._is_held(lease.id)]
        if dead:

            def work(change: Change) -> None:
                for lease in dead:
                    change.delete(Table.LEASES, lease.id.encode())

            self._index.update(work)
            for lease in dead:
                (self._layout.leases / lease.id).unlink(missing_ok=True)
        return [lease for lease in leases if lease not in dead]

    def _is_held(self, lease_id: str) -> bool:
        try:
            lock = os.open(self._layout.leases / lease_id, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # another user's, most likely: who can't tell lets it live
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return _is_mounted(lease_id)


def _all(view: View) -> Iterable[LeaseInfo]:
    for key, value in view.scan(Table.LEASES):
        record = json.loads(value)
        roots = tuple(Digest.parse(text) for text in record["roots"])
        yield LeaseInfo(key.decode(), record["kind"], roots, record["holder"], record["since"])


def lease_roots(view: View) -> list[Digest]:
    """The roots of all leases, of living and dead holders."""
    return [root for lease in _all(view) for root in lease.roots]
