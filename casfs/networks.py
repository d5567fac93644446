"""Networks with nothing but a loopback device, each lent to one command at a time.

The kernel takes the better part of a millisecond to make one, and as long to
take it away. One that a command has sent anything in isn't lent again: a
connection that was closed keeps its port busy for a minute. All else of a
command's in there has gone with its processes.

For who has privilege over the network it came from: a thread goes into another one, starts a command, and goes back.
Threads may share a `Networks`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from casfs.syscalls import CLONE_NEWNET, enter_network, unshare

log = logging.getLogger("casfs")

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_REQUEST = struct.Struct("16sH14x")
_OURS = "/proc/thread-self/ns/net"
_COUNTERS = "/proc/thread-self/net/dev"


class Networks:
    """As many as commands run at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Under `_lock`:
        self._free: list[int] = []
        self._home = -1
        try:
            self._home = os.open(_OURS, os.O_RDONLY | os.O_CLOEXEC)
            # No change, but refused where there would be no way back.
            enter_network(self._home)
        except OSError as error:
            log.info("each sandbox makes its network by itself: %s", error)
            self.close()

    @contextmanager
    def enter(self) -> Iterator[bool]:
        """Have what this thread starts meanwhile, threads included, be in a network of its own; whether it is.

        All of it must have ended then. Raises OSError where there can't be one more.
        """
        if self._home < 0:
            yield False
            return
        with self._lock:
            network = self._free.pop() if self._free else -1
        try:
            if network < 0:
                network = _make()
            else:
                enter_network(network)
            yield True
            untouched = _is_untouched()
        except BaseException:
            untouched = False
            raise
        finally:
            enter_network(self._home)
            if network >= 0:
                self._keep(network, untouched)

    def _keep(self, network: int, untouched: bool) -> None:
        with self._lock:
            if untouched and self._home >= 0:
                self._free.append(network)
                return
        os.close(network)

    def close(self) -> None:
        """Let go of them; harmless when repeated. None may be lent."""
        with self._lock:
            for descriptor in (*self._free, self._home):
                if descriptor >= 0:
                    os.close(descriptor)
            self._free, self._home = [], -1


def _make() -> int:
    """Go into a new network; a descriptor of it. Raises OSError."""
    unshare(CLONE_NEWNET)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        name, flags = _REQUEST.unpack(fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _REQUEST.pack(b"lo", 0)))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _REQUEST.pack(name, flags | _IFF_UP))
    return os.open(_OURS, os.O_RDONLY | os.O_CLOEXEC)


def _is_untouched() -> bool:
    """Whether nothing was sent in this thread's network so far; false where that can't be known."""
    try:
        with open(_COUNTERS, "rb", buffering=0) as file:
            lines = file.read(4096).splitlines()[2:]
        # NAME: bytes packets …, of what was received; loopback receives all that it sends, and there is no other.
        return bool(lines) and all(int(line.partition(b":")[2].split()[1]) == 0 for line in lines)
    except (OSError, ValueError, IndexError):
        return False
