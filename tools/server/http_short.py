"""The short way of uploads over HTTP: a small blob whose PUT came whole, head and body, in one piece.

Nearly all uploads of a build look like that, and differ in hash, length and bytes alone. One regular expression
takes such a request apart, in place of a parser, and its answer is written when the blob is stored: no task, no
future, no timer a request. Whatever is different in the least goes the ordinary way, aiohttp's, which knows all
else: so the short way has no errors of its own.
"""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from functools import lru_cache
from typing import NamedTuple

_HEAD_BYTES_MOST = 4096
_REQUEST = re.compile(rb"PUT ((?:/[A-Za-z0-9._~-]{1,64}){0,8}/cas/[0-9a-f]{64}) HTTP/1\.1\r\n")
_FIELD = re.compile(rb"([A-Za-z-]{1,32}): ?([!-~](?:[ -~]*[!-~])?)")
_KNOWN = {
    b"host",
    b"user-agent",
    b"content-type",
    b"accept",
    b"accept-encoding",
    b"authorization",
    b"connection",
}
"""Fields that change nothing, or that are looked at: with any other a request is none for the short way."""
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?([0-9]{1,9})(?=\r\n|\Z)")
_ANY_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n")


class Fields(NamedTuple):
    """What a head says of its request beside its length: `host` and `authorization` as their fields have them."""

    host: str
    authorization: str | None


class WholePut(NamedTuple):
    """A PUT that came whole. `path` as it was sent, `head` and `body` all of its bytes."""

    path: str
    fields: Fields
    head: bytes
    body: bytes


def parse_whole_put(data: bytes, most: int) -> WholePut | None:
    """The request, if `data` is one for the short way, with at most so many bytes of body, and nothing else."""
    match = _REQUEST.match(data)
    if match is None:
        return None
    end = data.find(b"\r\n\r\n", match.end() - 2, _HEAD_BYTES_MOST)
    if end < match.end():
        return None
    start = match.end() - 2
    length = _LENGTH.search(data, start, end)
    if length is None:
        return None
    size = int(length[1])
    if size > most or len(data) != end + 4 + size:
        return None
    fields = _read_fields(data[start : length.start()] + data[length.end() : end])
    if fields is None:
        return None
    return WholePut(match[1].decode("ascii"), fields, data[: end + 4], data[end + 4 :])


@lru_cache(256)
def _read_fields(text: bytes) -> Fields | None:
    """All but the length's, each with a line's end before it; None if one isn't known, in a plain form, and there once.

    Remembered: a client's are the same with each request.
    """
    found: dict[bytes, bytes] = {}
    for line in text.split(b"\r\n")[1:]:
        match = _FIELD.fullmatch(line)
        if match is None:
            return None
        name = match[1].lower()
        if name not in _KNOWN or name in found:
            return None
        found[name] = match[2]
    if found.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    host, authorization = (
        value.decode("ascii") if (value := found.get(name)) is not None else None
        for name in (b"host", b"authorization")
    )
    # Whoever names no host is refused by the ordinary way, or isn't.
    return None if host is None else Fields(host, authorization)


def stored_answer(*, last: bool) -> bytes:
    """What says that a blob is stored; `last`: the connection ends with it."""
    return _stored_answer(int(time.time()), last)


@lru_cache(4)
def _stored_answer(second: int, last: bool) -> bytes:
    date = formatdate(second, usegmt=True)
    close = "Connection: close\r\n" if last else ""
    return f"HTTP/1.1 200 OK\r\nServer: casfs\r\nContent-Length: 0\r\nDate: {date}\r\n{close}\r\n".encode("ascii")


def count_left(left: int | None, data: bytes) -> int | None:
    """Bytes that the request which the ordinary way takes is still to bring after `data`; None where nobody knows.

    `left`: as it was before; 0: `data` begins a request. Only where a request ended with a piece can the next piece
    be looked at for the short way: aiohttp's parser doesn't say whether it has the beginning of another.
    """
    if left is None or 0 < left < len(data):
        return None
    if left:
        return left - len(data)
    end = data.find(b"\r\n\r\n")
    head = data[: end + 2].lower()
    lengths = _ANY_LENGTH.findall(head)
    if end < 0 or b"transfer-encoding" in head or len(lengths) != head.count(b"content-length"):
        return None
    # What is behind such heads isn't always a body.
    if head.startswith(b"connect") or b"\r\nupgrade" in head:
        return None
    here = len(data) - end - 4
    size = int(lengths[0]) if len(lengths) == 1 else 0
    return size - here if len(lengths) < 2 and here <= size else None
