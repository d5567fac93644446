"""A client's end of HTTP/2 with gRPC on it: calls that can be awaited, each with its own deadline, and cancelled.

As gRPC does it, a call whose deadline is over ends at the client at once and its
stream is reset; what of it wasn't sent isn't. Calls beyond the streams that the
server allows wait here, and those of them that are given up are never sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from struct import Struct

from tests.tools.server.overload.pipe import Pipe
from tools.http2 import frames
from tools.http2.frames import ErrorCode
from tools.http2.hpack import Decoder, encode
from tools.reapi.methods import Method

OK, CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE = 0, 1, 4, 8, 14
_PREFIX = Struct(">BI")
_GREETING = frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 20}) + frames.window_update(0, 1 << 30)
_WIDE = frames.window_update(0, 1 << 20)


class Failed(Exception):
    """A call ended with another status than OK: `code`."""

    def __init__(self, code: int, why: str = "") -> None:
        super().__init__(f"status {code} {why}")
        self.code = code


class _Sent:
    """A call that is under way."""

    __slots__ = ("body", "done", "ends", "head", "message", "stream", "window")

    def __init__(self, done: asyncio.Future[bytes], head: bytes, messages: tuple[bytes, ...], ends: bool) -> None:
        self.done = done
        self.head = head
        self.body = deque(
            message[at : at + frames.FRAME_LEAST]
            for message in (_PREFIX.pack(0, len(message)) + message for message in messages)
            for at in range(0, len(message), frames.FRAME_LEAST)
        )
        self.ends = ends
        self.stream = 0
        self.window = 0
        self.message = b""


class Peer:
    """A connection. `answers`: statuses that came of the server, by code; `wrong`: what it mustn't do."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.pipe: Pipe
        self.answers: dict[int, int] = {}
        self.wrong: list[str] = []
        self.over = False
        self.farewell = ""
        self._calls: dict[int, _Sent] = {}
        self._next = 1
        self._window = frames.WINDOW
        self._stream_window = frames.WINDOW
        self._blocked: dict[int, _Sent] = {}
        self._data = b""
        self._taken = 0
        self._heads: dict[bytes, bytes] = {}
        self._ended: set[int] = set()
        self._streams_most = 100
        self._waiting: dict[_Sent, None] = {}

    def join(self, pipe: Pipe) -> None:
        """Greet the server."""
        self.pipe = pipe
        pipe.send(_GREETING)

    @property
    def under_way(self) -> int:
        """Calls that wait for an answer, or to be sent."""
        return len(self._calls) + len(self._waiting)

    async def call(self, method: Method, *messages: bytes, seconds: float = 0.0, ends: bool = True) -> bytes:
        """The answer's only message. `seconds`: its deadline. Without `ends` its last message never comes.

        Cancelled, it resets its stream. Raises Failed.
        """
        done: asyncio.Future[bytes] = self.loop.create_future()
        timer = self.loop.call_later(seconds, _expire, done) if seconds else None
        sent = _Sent(done, self._head(method, seconds), messages, ends)
        self._waiting[sent] = None
        self._begin_waiting()
        try:
            return await done
        finally:
            if timer is not None:
                timer.cancel()
            self._end(sent)

    def _begin_waiting(self) -> None:
        while self._waiting and len(self._calls) < self._streams_most:
            sent = next(iter(self._waiting))
            del self._waiting[sent]
            if self.over:
                sent.done.set_exception(Failed(UNAVAILABLE, self.farewell))
                continue
            sent.stream, self._next = self._next, self._next + 2
            sent.window = self._stream_window
            self._calls[sent.stream] = sent
            self.pipe.send(frames.frame(frames.HEADERS, frames.END_HEADERS, sent.stream, sent.head))
            self._push(sent)

    def _head(self, method: Method, seconds: float) -> bytes:
        path = method.path.encode()
        block = self._heads.get(path)
        if block is None:
            headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"here")]
            headers += [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
            if seconds:
                headers.append((b"grpc-timeout", b"%dm" % (seconds * 1000)))
            self._heads[path] = block = encode(headers)
        return block

    def _push(self, sent: _Sent) -> None:
        """What the windows and the transport take."""
        pipe = self.pipe
        while sent.body:
            part = sent.body[0]
            size = min(len(part), sent.window, self._window)
            if size <= 0 or not pipe.is_writable:
                self._blocked[sent.stream] = sent
                return
            if size < len(part):
                sent.body[0] = part[size:]
            else:
                del sent.body[0]
            sent.window -= size
            self._window -= size
            last = frames.END_STREAM if sent.ends and not sent.body else 0
            pipe.send(frames.frame(frames.DATA, last, sent.stream, part[:size]))
        self._blocked.pop(sent.stream, None)

    def _push_all(self) -> None:
        for sent in list(self._blocked.values()):
            self._push(sent)

    def _end(self, sent: _Sent) -> None:
        self._waiting.pop(sent, None)
        self._blocked.pop(sent.stream, None)
        if self._calls.pop(sent.stream, None) is not None and not self.over:
            # Nothing ended it yet but this client.
            self.pipe.send(frames.rst_stream(sent.stream, ErrorCode.CANCEL))
        self._begin_waiting()

    # For the pipe.

    def received(self, data: bytes) -> None:
        data = self._data + data
        position, end = 0, len(data)
        while position + frames.HEAD_BYTES <= end:
            length, flags, stream = frames.read_head(data, position)
            kind, length = length & 0xFF, length >> 8
            stop = position + frames.HEAD_BYTES + length
            if stop > end:
                break
            self._take(kind, flags, stream, data[position + frames.HEAD_BYTES : stop])
            position = stop
        self._data = data[position:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.HEADERS:
            if flags & frames.END_STREAM:
                self._answered(stream, payload)
        elif kind == frames.DATA:
            self._taken += len(payload)
            if self._taken >= 1 << 20:
                self._taken -= 1 << 20
                self.pipe.send(_WIDE)
            sent = self._calls.get(stream)
            if sent is not None:
                sent.message += payload
        elif kind == frames.WINDOW_UPDATE:
            self._widen(stream, *frames.read_number(payload, 0))
        elif kind == frames.RST_STREAM:
            sent = self._calls.pop(stream, None)
            if sent is not None and not sent.done.done():
                sent.done.set_exception(Failed(CANCELLED, f"reset with {frames.read_number(payload, 0)[0]}"))
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            settings = dict(frames.read_settings(payload))
            more = settings.get(frames.INITIAL_WINDOW_SIZE, self._stream_window) - self._stream_window
            self._stream_window += more
            for sent in self._calls.values():
                # A call may have begun before the server's settings came; then its window may be less than nothing.
                sent.window += more
            self._push_all()
            self._streams_most = settings.get(frames.MAX_CONCURRENT_STREAMS, self._streams_most)
            self._begin_waiting()
            self.pipe.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        elif kind == frames.PING and not flags & frames.ACK:
            self.pipe.send(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.GOAWAY:
            self.farewell = f"code {frames.read_number(payload, 4)[0]} {payload[8:].decode()}"

    def _widen(self, stream: int, size: int) -> None:
        if not stream:
            self._window += size
            self._push_all()
            return
        sent = self._calls.get(stream)
        if sent is not None:
            sent.window += size
            if sent.body:
                self._push(sent)

    def _answered(self, stream: int, block: bytes) -> None:
        headers = dict(Decoder().decode(block))
        code = int(headers[b"grpc-status"])
        self.answers[code] = self.answers.get(code, 0) + 1
        if stream >= self._next or stream in self._ended:
            self.wrong.append(f"an answer for stream {stream}, that was never begun, or was answered")
        self._ended.add(stream)
        sent = self._calls.pop(stream, None)
        if sent is None or sent.done.done():
            return
        if code:
            sent.done.set_exception(Failed(code, headers.get(b"grpc-message", b"").decode()))
        else:
            sent.done.set_result(sent.message[_PREFIX.size :])

    def writable(self) -> None:
        self._push_all()

    def lost(self) -> None:
        self.over = True
        for sent in (*self._calls.values(), *self._waiting):
            if not sent.done.done():
                sent.done.set_exception(Failed(UNAVAILABLE, self.farewell or "the connection was lost"))


def _expire(done: asyncio.Future[bytes]) -> None:
    if not done.done():
        done.set_exception(Failed(DEADLINE_EXCEEDED))
