"""Which headers an HTTP/2 request may have (RFC 9113, section 8)."""

from __future__ import annotations

from functools import lru_cache

from tools.http2.hpack import Header

_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_OF_CONNECTIONS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


class Malformed(Exception):
    """A request that is none."""


def check_request(headers: list[Header]) -> int:
    """The bytes of its body, as the headers say, or -1. Raises Malformed."""
    pseudo: dict[bytes, bytes] = {}
    expected = -1
    regular = False
    for name, value in headers:
        if name[:1] == b":":
            if regular or name in pseudo or name not in _PSEUDO:
                raise Malformed
            pseudo[name] = value
            continue
        regular = True
        _check_regular(name, value)
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18:
                raise Malformed
            expected = int(value)
    if not (pseudo.get(b":method") and pseudo.get(b":scheme") and pseudo.get(b":path")):
        raise Malformed
    return expected


def check_trailers(headers: list[Header]) -> None:
    """What comes behind a body. Raises Malformed."""
    for name, value in headers:
        _check_regular(name, value)


def _check_regular(name: bytes, value: bytes) -> None:
    if not _is_name(name) or (name == b"te" and value != b"trailers"):
        raise Malformed


@lru_cache(1024)
def _is_name(name: bytes) -> bool:
    # A colon begins a pseudo-header, and anything unprintable or in capitals is no name.
    return (
        bool(name)
        and name not in _OF_CONNECTIONS
        and name == name.lower()
        and b":" not in name
        and min(name) > 0x20
        and max(name) < 0x7F
    )
