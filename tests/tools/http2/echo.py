"""A handler that answers each request, when all of it has come, with its own body."""

from __future__ import annotations

from typing import Any

from tools.http2.connection import Connection
from tools.http2.headers import check_request
from tools.http2.hpack import Header, encode
from tools.http2.stream import Stream

HEADERS = encode([(b":status", b"200"), (b"content-type", b"text/plain")])
TRAILERS = encode([(b"x-over", b"yes")])


class Request(Stream):
    """One with its body."""

    __slots__ = ("body",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.body = bytearray()


class Echo:
    """A connection's end with this handler. `woken` counts how often it had something to send again."""

    def __init__(self, streams_most: int = 100, header_bytes: int = 16 << 10, *, allows: bool = True) -> None:
        self.woken = 0
        self.connection = Connection(self, streams_most, header_bytes, self._wake)
        self.interpreted = 0
        self.broken_ones: list[int] = []
        self.drained_ones: list[int] = []
        self._allows = allows

    def _wake(self) -> None:
        self.woken += 1

    def output(self) -> bytes:
        """What it wants to send now."""
        return b"".join(self.connection.out.take())

    # As its handler.

    def interpret(self, headers: list[Header]) -> tuple[dict[bytes, bytes], int]:
        self.interpreted += 1
        return dict(headers), check_request(headers)

    def vary(self, known: tuple[dict[bytes, bytes], int], header: Header) -> tuple[dict[bytes, bytes], int] | None:
        name, value = header
        return ({**known[0], name: value}, known[1]) if name == b"grpc-timeout" else None

    def make(self, stream_id: int, head: Any, window: int, expected: int) -> Request:
        return Request(stream_id, head, window, expected)

    def begin(self, request: Request, ended: bool) -> None:
        if ended:
            self.answer(request)

    def data(self, request: Request, data: bytes, ended: bool) -> None:
        request.body += data
        if self._allows:
            self.connection.allow(request, len(data))
        if ended:
            self.answer(request)

    def broken(self, request: Request) -> None:
        self.broken_ones.append(request.id)

    def drained(self, request: Request) -> None:
        self.drained_ones.append(request.id)

    def answer(self, request: Request) -> None:
        """With its own body."""
        self.connection.out.answer(request, HEADERS, bytes(request.body), TRAILERS)
