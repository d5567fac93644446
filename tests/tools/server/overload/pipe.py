"""A connection's kernel: bounded buffers between a client's end and a server's protocol, under any clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

_ROOM = 128 << 10
"""Bytes that are on their way to the server: sent, and not read by it."""
_CLIENT_HIGH = 64 << 10
"""With more unsent a client's transport isn't writable (Netty's mark)."""


class End(Protocol):
    """A client's end."""

    def received(self, data: bytes) -> None:
        """The server has sent something."""
        ...

    def writable(self) -> None:
        """What was to be sent is, mostly."""
        ...

    def lost(self) -> None:
        """It is over."""
        ...


class Pipe(asyncio.Transport):
    """As a transport, the server's side of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.BufferedProtocol, end: End) -> None:
        super().__init__({"peername": ("192.0.2.1", 1)})
        self._loop = loop
        self._protocol = protocol
        self._end = end
        self._unsent = bytearray()
        self._coming = bytearray()
        self._back: list[bytes] = []
        self._back_bytes = 0
        self._high = 1 << 20
        self._reading = True
        self._listening = True
        self._paused = False
        self._soon: set[Callable[[], None]] = set()
        self._finished = False
        self._closing = False
        self.over = False
        protocol.connection_made(self)

    # The client's side.

    def send(self, data: bytes) -> None:
        """Without waiting; `is_writable` says whether it would be kinder to."""
        self._unsent += data
        self._fill()

    @property
    def is_writable(self) -> bool:
        """There is little that was to be sent and isn't."""
        return len(self._unsent) < _CLIENT_HIGH

    def listen(self, listening: bool) -> None:
        """Whether the client reads."""
        self._listening = listening
        if listening:
            self._call_soon(self._hand_back)

    def finish(self) -> None:
        """The client closes: what it sent still comes."""
        self._finished = True
        self._call_soon(self._deliver)

    def break_off(self) -> None:
        """The client is gone, and what it sent with it."""
        self._lose()

    def _fill(self) -> None:
        room = _ROOM - len(self._coming)
        if self._unsent and room > 0:
            was_writable = self.is_writable
            self._coming += self._unsent[:room]
            del self._unsent[:room]
            if self.is_writable and not was_writable:
                self._call_soon(self._end.writable)
        if self._coming and self._reading:
            self._call_soon(self._deliver)

    def _deliver(self) -> None:
        """One read, as a loop does for each socket that is ready."""
        if self.over or not self._reading:
            return
        if self._coming:
            buffer = memoryview(self._protocol.get_buffer(-1))
            size = min(len(buffer), len(self._coming))
            buffer[:size] = self._coming[:size]
            del self._coming[:size]
            self._protocol.buffer_updated(size)
            self._fill()
        if self._finished and not self._coming and not self.over:
            self._protocol.eof_received()
            self.close()

    def _hand_back(self) -> None:
        if self.over or not self._listening:
            return
        data = b"".join(self._back)
        self._back, self._back_bytes = [], 0
        if self._paused:
            self._paused = False
            self._protocol.resume_writing()
        if data:
            self._end.received(data)
        if self._closing and not self._back:
            self._lose()

    def _lose(self) -> None:
        if not self.over:
            self.over = True
            self._end.lost()
            self._loop.call_soon(self._protocol.connection_lost, None)

    def _call_soon(self, call: Callable[[], None]) -> None:
        """Once an iteration."""
        if call not in self._soon:
            self._soon.add(call)
            self._loop.call_soon(self._call, call)

    def _call(self, call: Callable[[], None]) -> None:
        self._soon.discard(call)
        if not self.over:
            call()

    # The server's side.

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high or self._high

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        if self._coming or self._finished:
            self._call_soon(self._deliver)

    def is_closing(self) -> bool:
        return self._closing or self.over

    def write(self, data: Any) -> None:
        self.writelines([data])

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self._back.append(bytes(data))
            self._back_bytes += len(data)
        if self._back_bytes > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()
        self._call_soon(self._hand_back)

    def close(self) -> None:
        self._closing = True
        self._call_soon(self._hand_back)

    def abort(self) -> None:
        self._call_soon(self._lose)
