"""Reading requests: poll for a bounded moment after the last one, then sleep.

Most of what an upcall costs is waking the daemon, and requests come in bursts.
A reader that asks again at once, instead of sleeping, answers a burst several
times faster, if a core is free for it; if none is, it takes one from its
clients, and the scheduler would have woken a sleeper on the client's core at
once. Which of the two it is can't be known, but measured: the time from an
answer to the next request, in both ways. So within a burst the reader goes the
better way, and now and then the other one. Outside of bursts (a compiler that
thinks between two opens), and where there is only one core, it sleeps.

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
_IN_BURST = 0.5
"""A burst is on while at least this part of the last requests came within the window."""
_WORTH = 0.8
"""Polling costs processor time: it must shorten the wait to this."""
_PERIOD, _TRIAL = 128, 8
"""In a burst, so many requests of each period are met in the way that is thought worse."""


class DeviceReader:
    """Reads whole requests from a descriptor of /dev/fuse."""

    def __init__(self, device: int, size: int, *, poll: bool = True, window: float = WINDOW) -> None:
        """`size` is the room for one request in bytes; without `poll` it always sleeps."""
        self._device = device
        self._size = size
        self._window = window if poll and len(os.sched_getaffinity(0)) > 1 else 0.0
        self._blocking = True
        self._soon = 0.0
        # Means of the last waits in seconds. Polling has to be tried before anything is known of it.
        self._wait_polling = 0.0
        self._wait_sleeping = window
        self._turn = 0
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
                polling = self._soon > _IN_BURST and self._choose()
                message = self._poll(began) if polling else None
                if message is None:
                    message = self._sleep()
                self._learn(polling, time.perf_counter() - began)
                return message
            except OSError as error:
                # ENODEV: unmounted. ECONNABORTED: aborted through fusectl, or a forced unmount.
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return None
                # ENOENT: the request was interrupted before it could be read.
                if error.errno != errno.ENOENT:
                    raise

    def _choose(self) -> bool:
        """Whether to poll for the next request of a burst."""
        self._turn = (self._turn + 1) % _PERIOD
        better = self._wait_polling < _WORTH * self._wait_sleeping
        return better if self._turn >= _TRIAL else not better

    def _learn(self, polling: bool, wait: float) -> None:
        self._soon += ((wait < self._window) - self._soon) * _WEIGHT
        # A client that does something else for a while says nothing about the way it was waited for.
        wait = min(wait, 2 * self._window)
        if polling:
            self._wait_polling += (wait - self._wait_polling) * _WEIGHT
        else:
            self._wait_sleeping += (wait - self._wait_sleeping) * _WEIGHT

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
