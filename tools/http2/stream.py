"""One request and its answer, and what a connection asks of whoever answers it."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from tools.http2.hpack import Header

STREAM_WINDOW = 32 << 10
"""Bytes of a stream that come before it is waited for."""
TURN_WINDOW = 512 << 10
"""And of one that is being taken."""


class Stream:
    """One request and its answer, until both are over."""

    credit = 0
    """Bytes that were allowed again, and not yet told."""
    pending: deque[memoryview] | None = None
    """What waits for windows; None when nothing ever did."""
    waiting = 0
    """Bytes of it."""
    trailers: bytes | None = None
    """The block that ends the stream behind what is pending."""
    room = STREAM_WINDOW
    """Bytes that the peer may send."""
    receiving = True

    def __init__(self, stream_id: int, head: Any, window: int, expected: int) -> None:
        """`head`: what the handler made of the headers. `expected`: the bytes to come, or -1."""
        self.id = stream_id
        self.head = head
        self.window = window
        """Bytes that the peer takes."""
        self.expected = expected


class Handler(Protocol):
    """What a connection is for."""

    def interpret(self, headers: list[Header]) -> tuple[Any, int]:
        """What a request's headers mean, for `Stream.head`, and what `check_request` says of them.

        Of equal ones it isn't asked again. Raises Malformed, as that does, and nothing else.
        """
        ...

    def vary(self, known: tuple[Any, int], header: Header) -> tuple[Any, int] | None:
        """What headers mean that differ from known ones in this only; None: have it asked as if they were new."""
        ...

    def make(self, stream_id: int, head: Any, window: int, expected: int) -> Stream:
        """A stream, or one of a class derived of it."""
        ...

    def begin(self, stream: Any, ended: bool) -> None:
        """A request has begun; `ended`: that is all of it."""
        ...

    def data(self, stream: Any, data: bytes, ended: bool) -> None:
        """More of a request."""
        ...

    def broken(self, stream: Any) -> None:
        """A stream is over before it was answered to its end."""
        ...

    def drained(self, stream: Any) -> None:
        """What waited for the stream's window is out."""
        ...
