"""What a service manager is told: sd_notify(3), which is a datagram to a socket that it has named.

Only the process that it started tells it something: from others systemd takes
nothing, and logs that.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

READY = "READY=1"
STOPPING = "STOPPING=1"
_VARIABLE = "NOTIFY_SOCKET"
_SECONDS = 1.0


def notify(state: str) -> None:
    """Tell whoever started us, if they want to know."""
    address = os.environ.get(_VARIABLE, "")
    if address.startswith(("/", "@")):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            # One that takes nothing must not hold up who ends.
            channel.settimeout(_SECONDS)
            # "@" stands for the NUL of the abstract namespace.
            channel.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def reloading() -> str:
    """The state of one that reads its files again; `READY` has to follow."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def be_no_main_process() -> None:
    """From now on `notify` says nothing here: another process does."""
    os.environ.pop(_VARIABLE, None)
