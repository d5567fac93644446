"""Reading requests: poll for a bounded moment after the last one, then sleep.

Most of what an upcall costs is waking the daemon, and requests come in bursts.
A reader that asks again at once, instead of sleeping, answers a burst several
times faster; one that polls for nothing takes the core from its clients. So it
polls only while that has been paying: `_gain` follows, over the last requests,
how often the next one came within the window; where that is rare (a compiler
that thinks between two opens), or where there is only one core, it sleeps.

Sleeping is a blocking read and not poll(2) and then a read: one system call a
request instead of three. So the descriptor changes between blocking (always,
when `read` returns from a sleep) and non-blocking (as long as polling pays).

For one thread. Others may write to the descriptor meanwhile.
"""

from __future__ import annotations

import errno
import os
import time

WINDOW = 100e-6
"""Seconds to poll after a request: longer than a client needs between two system calls, and a
fraction of what a compiler needs between two headers."""

_WEIGHT = 1 / 16
_WORTH = 0.5


class DeviceReader:
    """Reads whole requests from a descriptor of /dev/fuse."""

    def __init__(self, device: int, size: int, *, poll: bool = True, window: float = WINDOW) -> None:
        """`size` is the room for one request in bytes; without `poll` it always sleeps."""
        self._device = device
        self._size = size
        self._window = window if poll and len(os.sched_getaffinity(0)) > 1 else 0.0
        self._gain = 0.0
        self._blocking = True
        self._polled = 0
        self._slept = 0
        os.set_blocking(device, True)

    def read(self) -> bytes | None:
        """The next request, or None when the file system is unmounted (or the connection aborted)."""
        while True:
            try:
                if not self._window:
                    return os.read(self._device, self._size)
                began = time.perf_counter()
                message = self._poll(began) if self._gain > _WORTH else None
                if message is None:
                    message = self._sleep()
                came_soon = time.perf_counter() - began < self._window
                self._gain += (came_soon - self._gain) * _WEIGHT
                return message
            except OSError as error:
                # ENODEV: unmounted. ECONNABORTED: aborted through fusectl, or a forced unmount.
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return None
                # ENOENT: the request was interrupted before it could be read.
                if error.errno != errno.ENOENT:
                    raise

    def _poll(self, began: float) -> bytes | None:
        """A request that comes within the window; None if none does."""
        if self._blocking:
            os.set_blocking(self._device, False)
            self._blocking = False
        while True:
            try:
                message = os.read(self._device, self._size)
            except BlockingIOError:
                if time.perf_counter() - began >= self._window:
                    return None
            else:
                self._polled += 1
                return message

    def _sleep(self) -> bytes:
        if not self._blocking:
            os.set_blocking(self._device, True)
            self._blocking = True
        message = os.read(self._device, self._size)
        self._slept += 1
        return message

    def statistics(self) -> dict[str, int]:
        """How many requests were met by polling, and how many after a sleep."""
        return {"polled": self._polled, "slept": self._slept}
