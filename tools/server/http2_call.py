"""One gRPC call, as its connection and its endpoint know it: its messages as they come, and what it waits for."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Collection
from struct import Struct
from typing import Protocol

from store.digest import Digest
from tools.http2.connection import Connection
from tools.http2.stream import STREAM_WINDOW, TURN_WINDOW, Stream
from tools.server.calls import Answer
from tools.server.errors import Exhausted, InvalidArgument
from tools.server.http2_heads import HEADERS, Head, Routes

PREFIX = Struct(">BI")
"""Before each message: whether it is compressed, and its bytes."""
_PREFIX_BYTES = 5


class Owner(Protocol):
    """The connection that a call belongs to."""

    routes: Routes
    client: str
    number: int
    loop: asyncio.AbstractEventLoop
    now: float
    paused: asyncio.Event | None
    connection: Connection

    def send(self) -> object: ...
    def answer(self, call: GrpcCall, answer: Answer) -> bool: ...
    def fail(self, call: GrpcCall, error: Exception) -> bool: ...
    def await_client(self, change: int) -> None: ...
    def ask_for(self, call: GrpcCall, size: int) -> None: ...
    def have_come(self, call: GrpcCall, size: int) -> None: ...


class GrpcCall(Stream):
    """A stream, as endpoints know it."""

    # Most of this no call that is answered at once ever needs, so it is written down once, not for each.
    answering = False
    size = 0
    """Bytes that have come of its messages, and weren't taken yet."""
    is_asking = False
    """More of it will be allowed when there is room for it."""
    started = False
    """It is begun, or waits to be."""
    message: bytes | None = None
    """The only one, while it waits."""
    held = 0
    """Bytes that count as waiting."""
    task: asyncio.Task[None] | None = None
    deadline: asyncio.TimerHandle | None = None
    heard = 0.0
    """When its client last made progress, as far as the call waits for that: for all of the only message, or for
    the end of the answer to be taken."""
    left = 0
    """Bytes of that end, when it was looked at last."""
    blobs: Collection[Digest] = ()
    """What has to be in the store before it is answered."""
    _ended = False
    _waiter: asyncio.Future[None] | None = None
    _start = 0
    """Where the next message begins in the first part."""
    _advanced = 0
    """Bytes of it that were allowed before they came."""

    head: Head

    def __init__(self, stream_id: int, head: Head, window: int, expected: int, owner: Owner) -> None:
        super().__init__(stream_id, head, window, expected)
        self._owner = owner
        self._parts: list[bytes] = []
        """Of what has come."""
        self.since = self.moved = owner.now
        """When it began, and when it last went a step on."""

    @property
    def _message_most(self) -> int:
        return self._owner.routes.limits.message_bytes

    # For endpoints.

    @property
    def authorization(self) -> str | None:
        return self.head.authorization

    @property
    def client(self) -> str:
        return self._owner.client

    @property
    def connection(self) -> int:
        return self._owner.number

    def answer(self, message: Answer) -> bool:
        """Answer what was to be answered later; whether somebody still waits for it."""
        return self._owner.answer(self, message)

    def fail(self, error: Exception) -> bool:
        """Tell the client what went wrong; whether somebody still waits for it."""
        return self._owner.fail(self, error)

    def note_blobs(self, blobs: Collection[Digest]) -> None:
        """It will be answered when these are in the store."""
        self.blobs = blobs

    def widen(self) -> None:
        """It has its turn: more of it may be on its way here at a time."""
        if self.receiving:
            self._owner.connection.allow(self, TURN_WINDOW - STREAM_WINDOW, least=0)

    async def write(self, message: bytes) -> None:
        """Returns when the windows have taken all of it, and the socket wants more."""
        out = self._owner.connection.out
        if not self.answering:
            self.answering = True
            out.send_headers(self, HEADERS)
        out.send_data(self, PREFIX.pack(0, len(message)), message)
        # Not soon but now, so that it is known whether the socket takes more: a blob that is in memory is read to its
        # end without a pause.
        self._owner.send()
        while self.pending:
            await self._wait()
        if self._owner.paused is not None:
            await self._owner.paused.wait()

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The client's messages, as they come."""
        return self

    async def __anext__(self) -> bytes:
        while True:
            message = self.take()
            if message is not None:
                return message
            if self._ended:
                if self.size:
                    raise InvalidArgument("the stream ended in the middle of a message")
                raise StopAsyncIteration
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = waiter = self._owner.loop.create_future()
        self._owner.await_client(1)
        try:
            await waiter
        finally:
            self._waiter = None
            self._owner.await_client(-1)

    # For the connection's calls.

    @property
    def waits(self) -> bool:
        """For what its client sends or takes."""
        return self._waiter is not None

    def wake(self) -> None:
        """What it waited for may be there."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def add(self, data: bytes, ended: bool) -> None:
        """More of the request."""
        if data:
            self._parts.append(data)
            self.size += len(data)
        self._ended = ended

    def look(self) -> int:
        """The bytes of the next message with its prefix, if all of it is there, or 0. Raises Exhausted."""
        if self.size < _PREFIX_BYTES:
            return 0
        if len(self._parts[0]) - self._start < _PREFIX_BYTES:
            self._join()
        _, length = PREFIX.unpack_from(self._parts[0], self._start)
        most = self._message_most
        if length > most:
            raise Exhausted(f"a message of {length} bytes: at most {most} may be")
        whole = _PREFIX_BYTES + length
        if self.size < whole:
            # A message may be larger than what may come before it is taken.
            lacking = whole - self.size - self.room
            if lacking > 0 and self.receiving and not self.is_asking:
                more = max(lacking - self.credit, 0)
                if more:
                    self.is_asking = True
                    self._owner.ask_for(self, more)
                else:
                    self._owner.connection.allow(self, 0, least=0)
            return 0
        return int(whole)

    def advance(self, size: int) -> None:
        """Allow so many bytes of the next message, for which there is room."""
        self.is_asking = False
        self._advanced += size
        self._owner.connection.allow(self, size, least=0)

    def have_come(self) -> None:
        """What was allowed before it came is here, or won't come any more."""
        if self._advanced or self.is_asking:
            self._owner.have_come(self, self._advanced)
            self._advanced = 0
            self.is_asking = False

    def take(self) -> bytes | None:
        """The next message, if all of it is there. Raises what is wrong with it."""
        whole = self.look()
        if not whole:
            return None
        start, end = self._start, self._start + whole
        if len(self._parts[0]) < end:
            self._join()
            start, end = 0, whole
        data = self._parts[0]
        # Behind what was taken, not cut off: many small messages in one part would be copied as often.
        self._start = end
        if end == len(data):
            del self._parts[0]
            self._start = 0
        self.size -= whole
        # What was taken may come again: a client sends on while this message is worked on.
        if self.receiving:
            self._owner.connection.allow(self, whole - self._advanced)
        self.have_come()
        message = data[start + _PREFIX_BYTES : end]
        return self._expand(message) if data[start] else message

    def _join(self) -> None:
        self._parts[:] = [b"".join(self._parts)[self._start :]]
        self._start = 0

    def take_only(self, data: bytes, ended: bool) -> bytes | None:
        """More of the request; returns its only message, once that is sure.

        Raises InvalidArgument where there is another, or none.
        """
        size = len(data) - _PREFIX_BYTES
        if ended and not self.size and 0 <= size <= self._message_most and data[:_PREFIX_BYTES] == PREFIX.pack(0, size):
            # Most often it comes in one frame.
            self._ended = True
            return data[_PREFIX_BYTES:]
        self.add(data, ended)
        if not ended:
            # Only looked at: what is too large is refused before it comes.
            self.look()
            return None
        message = self.take()
        if message is None or self.size:
            raise InvalidArgument("there has to be one message in the request, and all of it")
        return message

    def _expand(self, message: bytes) -> bytes:
        most = self._message_most
        if not self.head.compressed:
            raise InvalidArgument("a compressed message, without a grpc-encoding that says how")
        expander = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            expanded = expander.decompress(message, most + 1)
        except zlib.error as error:
            raise InvalidArgument(f"this is no gzip: {error}") from error
        if len(expanded) > most:
            raise Exhausted(f"a message that expands to over {most} bytes")
        if not expander.eof:
            raise InvalidArgument("a gzip stream that is cut short")
        return expanded
