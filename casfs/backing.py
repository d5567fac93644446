"""Backing ids: which files the kernel may read by itself, registered once and counted.

The kernel demands that all passthrough opens of an inode use one id, and an id
may be closed only when no open uses it: closing right after the answer to OPEN
makes the open fail. So there is one id per content, shared by all inodes with
that content, with a count of its opens. An id nobody uses is kept for a while,
as registering costs a path lookup: headers are opened again and again.

A lock makes it safe from the loop and the pool; no call here waits for a disk.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from dataclasses import dataclass

from casfs.syscalls import BackingId, close_backing, register_backing

_IDLE = 16_384
"""Ids kept though unused. Each pins an open file in the kernel, and the space of its blob."""


@dataclass(slots=True)
class _Backing:
    key: bytes
    opens: int


class BackingRegistry:
    """The backing ids of one connection (`device`: a descriptor of /dev/fuse)."""

    def __init__(self, device: int, idle: int = _IDLE) -> None:
        self._device = device
        self._limit = idle
        self._lock = threading.Lock()
        self._ids: dict[bytes, BackingId] = {}
        self._backings: dict[BackingId, _Backing] = {}
        self._idle: OrderedDict[BackingId, None] = OrderedDict()
        self._refused: set[bytes] = set()
        self.registered = 0

    def find(self, key: bytes) -> BackingId | None:
        """The id of a content that is registered, counted as one more open; or None."""
        with self._lock:
            backing_id = self._ids.get(key)
            if backing_id is not None:
                self._count_open(backing_id)
            return backing_id

    def _count_open(self, backing_id: BackingId) -> None:
        backing = self._backings[backing_id]
        if not backing.opens:
            del self._idle[backing_id]
        backing.opens += 1

    def register(self, key: bytes, descriptor: int) -> BackingId | None:
        """Register a file for a content, counted as one open; None where the kernel can't pass it through.

        That answer holds for good: an inode must not be open in both modes.
        The descriptor may be closed afterwards.
        """
        with self._lock:
            backing_id = self._ids.get(key)
            if backing_id is not None:
                self._count_open(backing_id)
                return backing_id
            if key in self._refused:
                return None
            try:
                backing_id = register_backing(self._device, descriptor)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
                    raise
                # ELOOP: the file lies on a stack of file systems that is too deep already.
                self._refused.add(key)
                return None
            self.registered += 1
            self._ids[key] = backing_id
            self._backings[backing_id] = _Backing(key, 1)
            return backing_id

    def release(self, backing_id: BackingId) -> None:
        """One open of this id is over."""
        with self._lock:
            backing = self._backings.get(backing_id)
            if backing is None:
                return
            backing.opens -= 1
            if backing.opens:
                return
            self._idle[backing_id] = None
            if len(self._idle) > self._limit:
                self._close(self._idle.popitem(last=False)[0])

    def forget(self, key: bytes) -> None:
        """Close the id of a content, if nobody uses it: what it stands for has changed."""
        with self._lock:
            backing_id = self._ids.get(key)
            if backing_id is not None and backing_id in self._idle:
                del self._idle[backing_id]
                self._close(backing_id)

    def _close(self, backing_id: BackingId) -> None:
        backing = self._backings.pop(backing_id)
        del self._ids[backing.key]
        try:
            close_backing(self._device, backing_id)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.ENODEV, errno.EPERM):
                raise

    def statistics(self) -> dict[str, int]:
        """How many ids are in use, idle, and were ever registered."""
        with self._lock:
            idle = len(self._idle)
            return {"open": len(self._backings) - idle, "idle": idle, "registered": self.registered}
