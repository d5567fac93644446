"""Where to listen: ``HOST:PORT`` texts, and whether only this machine can reach such a place."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import NamedTuple

from store.errors import BadInput

_TEXT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\[\]]*):([0-9]{1,5})")


class Address(NamedTuple):
    """A place to listen at; port 0: any that is free."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``127.0.0.1:8980``, ``[::1]:8980`` or ``:8980`` (everywhere). Raises BadInput."""
        match = _TEXT.fullmatch(text)
        if match is None or int(match[2]) > 65535:
            raise BadInput(f"{text!r} is no place to listen at: write HOST:PORT, as in 127.0.0.1:8980 or [::1]:8980")
        return cls(match[1].strip("[]") or "::", int(match[2]))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_plain(address: Address, secure: str = "") -> None:
    """Raise BadInput for a place that other machines can reach: there all would be in plain text.

    `secure`: what else may be given than consent.
    """
    if not address.is_loopback:
        raise BadInput(
            f"{address} can be reached from other machines, in plain text: "
            f"give {secure}--insecure if the network is to be trusted"
        )


ACCEPTED_MOST = 64
"""Connections that are accepted between two looks at the other sockets."""


def listen(address: Address) -> socket.socket:
    """A socket that listens there beside those of other processes. Raises OSError."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    everywhere = address.host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((address.host, address.port), family=family, reuse_port=True, dualstack_ipv6=everywhere)


def keep_waiting(listening: socket.socket) -> None:
    """Have the kernel keep all connections that it may until they are accepted.

    asyncio has it keep only as many as it accepts at a time, and while it accepts
    thousands nobody else is answered.
    """
    listening.listen(socket.SOMAXCONN)


def reserve(address: Address) -> tuple[socket.socket, Address]:
    """Take the port without listening, so that several processes can share it; the address with the real port.

    Keep the socket open meanwhile. Raises BadInput where that can't be.
    """
    try:
        [family, kind, protocol, _, where] = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise BadInput(f"can't listen at {address}: {error.strerror}") from error
    taken = socket.socket(family, kind, protocol)
    try:
        # Without SO_REUSEPORT first: else another user's server there would silently share the port.
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(where)
    except OSError as error:
        taken.close()
        raise BadInput(f"can't listen at {address}: {error.strerror}") from error
    return taken, address._replace(port=taken.getsockname()[1])
