"""Reading requests: poll for a bounded moment after the last one, then sleep.

Most of what an upcall costs is waking the daemon, and requests come in bursts.
A reader that asks again at once, instead of sleeping, answers a burst several
times faster; one that polls for nothing takes the core from its clients. So it
polls only while that has been paying: `_gain` follows, over the last requests,
how often the next one came within the window; where that is rare (a compiler
that thinks between two opens), or where there is only one core, it sleeps.
"""

from __future__ import annotations

import errno
import os
import select
import time

WINDOW = 100e-6
"""Seconds to poll after a request: longer than a client needs between two system calls, and a
fraction of what a compiler needs between two headers."""

_WEIGHT = 1 / 16
_WORTH = 0.5


class DeviceReader:
    """Reads whole requests from a descriptor of /dev/fuse, which it makes non-blocking."""

    def __init__(self, device: int, size: int, *, poll: bool = True, window: float = WINDOW) -> None:
        """`size` is the room for one request in bytes; without `poll` it always sleeps."""
        self._device = device
        self._size = size
        self._window = window if poll and len(os.sched_getaffinity(0)) > 1 else 0.0
        self._gain = 0.0
        self._polled = 0
        self._slept = 0
        os.set_blocking(device, False)
        self._ready = select.poll()
        self._ready.register(device, select.POLLIN)

    def read(self) -> bytes | None:
        """The next request, or None when the file system is unmounted (or the connection aborted)."""
        try:
            message = os.read(self._device, self._size)
            # It was there already: no waiting, so nothing to learn about waiting.
            return message
        except BlockingIOError:
            pass
        except OSError as error:
            if _is_end(error):
                return None
            if error.errno not in (errno.ENOENT, errno.EINTR):
                raise
        return self._wait()

    def _wait(self) -> bytes | None:
        began = time.perf_counter()
        polling = self._gain > _WORTH
        deadline = began + self._window
        while True:
            try:
                message = os.read(self._device, self._size)
            except BlockingIOError:
                if polling and time.perf_counter() < deadline:
                    continue
                polling = False
                self._ready.poll()
                continue
            except OSError as error:
                if _is_end(error):
                    return None
                if error.errno not in (errno.ENOENT, errno.EINTR):
                    raise
                continue
            if polling:
                self._polled += 1
            else:
                self._slept += 1
            if self._window:
                came_soon = time.perf_counter() - began < self._window
                self._gain += (came_soon - self._gain) * _WEIGHT
            return message

    def statistics(self) -> dict[str, int]:
        """How many requests were met by polling, and how many after a sleep."""
        return {"polled": self._polled, "slept": self._slept}


def _is_end(error: OSError) -> bool:
    """ENODEV: unmounted. ECONNABORTED: aborted through fusectl, or a forced unmount."""
    return error.errno in (errno.ENODEV, errno.ECONNABORTED)
