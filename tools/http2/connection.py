"""A server's end of an HTTP/2 connection (RFC 9113): bytes in, calls of a handler; what is to be sent, out. No I/O.

Windows. A peer may send so many bytes of a stream as `Stream.room` says; a
handler opens it again with `allow` when it is done with what came, so an upload
that nobody reads stops by itself. The connection's own window is opened as
bytes come: else uploads that wait for their turn could hold those up that have
it. What is held for a client is bounded by streams times their room.

Floods. Whatever a peer can make this end do without having a stream for it is
counted: streams that it breaks off, header blocks without an end, all of which
ends the connection (ENHANCE_YOUR_CALM); answers to pings and settings wait with
everything else for the peer to read, and the owner reads no more until it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from tools.http2 import frames
from tools.http2.frames import ErrorCode
from tools.http2.headers import Malformed, check_request, check_trailers
from tools.http2.hpack import Decoder, Header, HpackError

Buffer = bytes | memoryview

STREAM_WINDOW = 256 << 10
"""Bytes of a stream that come before it is waited for."""
_CONNECTION_WINDOW = 16 << 20
_SENT_MOST = 64 << 10
"""Bytes of a frame that is sent, where the peer takes so large ones: in between others get their turn."""
_BROKEN_MOST = 1000
"""Streams broken off beyond those that ended well. A build that is cancelled breaks off some hundreds."""
_CONTINUATIONS_MOST = 64
_KNOWN_MOST = 64
"""Header blocks whose meaning is remembered."""
_GONE_MOST = 4096


class Stream:
    """One request and its answer, until both are over."""

    __slots__ = ("credit", "expected", "head", "id", "pending", "receiving", "room", "trailers", "window")

    def __init__(self, stream_id: int, head: Any, window: int, expected: int) -> None:
        """`head`: what the handler made of the headers. `expected`: the bytes to come, or -1."""
        self.id = stream_id
        self.head = head
        self.window = window
        """Bytes that the peer takes."""
        self.room = STREAM_WINDOW
        """Bytes that the peer may send."""
        self.credit = 0
        """Bytes that were allowed again, and not yet told."""
        self.expected = expected
        self.receiving = True
        self.pending: deque[memoryview] | None = None
        """What waits for windows; None when nothing ever did."""
        self.trailers: bytes | None = None
        """The block that ends the stream behind what is pending."""


class Handler(Protocol):
    """What a connection is for."""

    def interpret(self, headers: list[Header]) -> Any:
        """What a request's headers mean, for `Stream.head`; of equal ones it isn't asked again. Mustn't raise."""
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


class _ConnectionError(Exception):
    def __init__(self, code: ErrorCode, why: str) -> None:
        super().__init__(why)
        self.code = code


class Connection:
    """Everything about one connection. `output` is to be sent; `wake` is called when it has something again."""

    def __init__(self, handler: Handler, streams_most: int, header_bytes: int, wake: Callable[[], object]) -> None:
        """`header_bytes`: of a request's headers; longer blocks than a few times that end the connection."""
        self.streams: dict[int, Stream] = {}
        self.closed = False
        """Nothing more is read or sent, but what is in `output`."""
        self.pings_answered = 0
        self.begun = False
        """The peer speaks HTTP/2."""
        self._handler = handler
        self._wake = wake
        self._streams_most = streams_most
        self._block_most = 4 * header_bytes
        self._decoder = Decoder()
        self._known: dict[bytes, tuple[Any, int]] = {}
        self._known_changes = 0
        self._left = b""
        self._partial: tuple[int, int, list[bytes]] | None = None
        """Of headers that aren't whole yet: stream, flags, the parts."""
        self._last = 0
        self._refusing = False
        self._gone: dict[int, None] = {}
        """Streams that were ended here while the peer was sending: what comes of them is passed over."""
        self._broken = 0
        self._credit = 0
        self._room = _CONNECTION_WINDOW
        self._window = frames.WINDOW
        self._first_window = frames.WINDOW
        self._frame = frames.FRAME_LEAST
        self._blocked: dict[int, Stream] = {}
        self._output: list[Buffer] = [
            frames.settings(
                {
                    frames.MAX_CONCURRENT_STREAMS: streams_most,
                    frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                    frames.MAX_HEADER_LIST_SIZE: header_bytes,
                }
            ),
            frames.window_update(0, _CONNECTION_WINDOW - frames.WINDOW),
        ]

    def take_output(self) -> list[Buffer]:
        """What is to be sent, in order; it counts as sent."""
        output, self._output = self._output, []
        return output

    # What comes.

    def receive(self, data: bytes) -> None:
        """Bytes came. Whatever is wrong with them is the peer's to know, and in `output`."""
        if self.closed:
            return
        if self._left:
            data = self._left + data
            self._left = b""
        position, end = 0, len(data)
        try:
            if not self.begun:
                if not data.startswith(frames.PREFACE[:end]):
                    raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "this is no HTTP/2")
                if end < len(frames.PREFACE):
                    self._left = data
                    return
                self.begun = True
                position = len(frames.PREFACE)
            while position + 9 <= end:
                length, flags, stream_id = frames.read_head(data, position)
                kind = length & 0xFF
                length >>= 8
                if length > frames.FRAME_LEAST:
                    raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
                start = position + 9
                stop = start + length
                if stop > end:
                    break
                position = stop
                stream_id &= frames.WINDOW_MOST
                if self._partial is not None and kind != frames.CONTINUATION:
                    raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "a frame between headers and their continuation")
                if kind == frames.DATA:
                    self._take_data(stream_id, flags, data[start:stop])
                elif kind == frames.HEADERS:
                    self._take_headers(stream_id, flags, data[start:stop])
                else:
                    self._take_other(kind, flags, stream_id, data[start:stop])
        except HpackError as error:
            self.fail(ErrorCode.COMPRESSION_ERROR, str(error))
        except _ConnectionError as error:
            self.fail(error.code, str(error))
        self._left = data[position:]

    def _take_data(self, stream_id: int, flags: int, data: bytes) -> None:
        length = len(data)
        self._room -= length
        if self._room < 0:
            raise _ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "more than the connection's window")
        self._credit += length
        if self._credit >= _CONNECTION_WINDOW >> 1:
            self._output.append(frames.window_update(0, self._credit))
            self._room += self._credit
            self._credit = 0
        stream = self.streams.get(stream_id)
        if stream is None or not stream.receiving:
            self._refuse_closed(stream_id)
            return
        stream.room -= length
        if stream.room < 0:
            self._break(stream, ErrorCode.FLOW_CONTROL_ERROR)
            return
        if flags & frames.PADDED:
            data = _unpad(data)
            # The rest of it nobody will be done with.
            self.allow(stream, length - len(data))
        ended = flags & frames.END_STREAM != 0
        if stream.expected >= 0:
            stream.expected -= len(data)
            if stream.expected < 0 or (ended and stream.expected):
                self._break(stream, ErrorCode.PROTOCOL_ERROR)
                return
        if ended:
            stream.receiving = False
        self._handler.data(stream, data, ended)

    def _refuse_closed(self, stream_id: int) -> None:
        if not stream_id or stream_id > self._last or not stream_id & 1:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"a frame for stream {stream_id}, which is idle")
        if stream_id in self._gone:
            return
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._break(stream, ErrorCode.STREAM_CLOSED)
        else:
            self._send(frames.rst_stream(stream_id, ErrorCode.STREAM_CLOSED))
            self._count_broken()

    def _take_headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        if flags & (frames.PADDED | frames.PRIORITIZED):
            if flags & frames.PADDED:
                payload = _unpad(payload)
            if flags & frames.PRIORITIZED:
                if len(payload) < 5:
                    raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "headers without all of their priority")
                (dependency,) = frames.read_number(payload, 0)
                if dependency & frames.WINDOW_MOST == stream_id:
                    raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")
                payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._take_block(stream_id, flags, payload)
        else:
            self._partial = (stream_id, flags, [payload])

    def _take_continuation(self, stream_id: int, flags: int, payload: bytes) -> None:
        if self._partial is None or self._partial[0] != stream_id:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "a continuation of nothing")
        _, first_flags, parts = self._partial
        parts.append(payload)
        if len(parts) > _CONTINUATIONS_MOST or sum(map(len, parts)) > self._block_most:
            raise _ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, "headers without an end")
        if flags & frames.END_HEADERS:
            self._partial = None
            self._take_block(stream_id, first_flags, b"".join(parts))

    def _take_block(self, stream_id: int, flags: int, block: bytes) -> None:
        if len(block) > self._block_most:
            raise _ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, f"headers of {len(block)} bytes")
        ended = flags & frames.END_STREAM != 0
        if stream_id <= self._last:
            self._take_trailers(stream_id, ended, block)
            return
        if not stream_id & 1:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} isn't a client's to begin")
        self._last = stream_id
        if self._known_changes != self._decoder.changes:
            self._known.clear()
            self._known_changes = self._decoder.changes
        known = self._known.get(block)
        if known is None:
            headers = self._decoder.decode(block)
            try:
                expected = check_request(headers)
            except Malformed:
                self._refuse(stream_id, ErrorCode.PROTOCOL_ERROR)
                return
            known = self._handler.interpret(headers), expected
            if self._known_changes == self._decoder.changes and len(self._known) < _KNOWN_MOST:
                self._known[block] = known
        if len(self.streams) >= self._streams_most or self._refusing:
            self._refuse(stream_id, ErrorCode.REFUSED_STREAM)
            return
        head, expected = known
        if ended and expected > 0:
            self._refuse(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        stream = self._handler.make(stream_id, head, self._first_window, expected)
        stream.receiving = not ended
        self.streams[stream_id] = stream
        self._handler.begin(stream, ended)

    def _take_trailers(self, stream_id: int, ended: bool, block: bytes) -> None:
        headers = self._decoder.decode(block)
        stream = self.streams.get(stream_id)
        if stream is None or not stream.receiving:
            if stream_id in self._gone:
                return
            raise _ConnectionError(ErrorCode.STREAM_CLOSED, f"headers for stream {stream_id}, which is closed")
        try:
            if not ended:
                raise Malformed
            check_trailers(headers)
        except Malformed:
            self._break(stream, ErrorCode.PROTOCOL_ERROR)
            return
        if stream.expected > 0:
            self._break(stream, ErrorCode.PROTOCOL_ERROR)
            return
        stream.receiving = False
        self._handler.data(stream, b"", True)

    def _take_other(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == frames.WINDOW_UPDATE:
            self._take_window(stream_id, payload)
        elif kind == frames.RST_STREAM:
            self._take_reset(stream_id, payload)
        elif kind == frames.CONTINUATION:
            self._take_continuation(stream_id, flags, payload)
        elif kind == frames.SETTINGS:
            self._take_settings(stream_id, flags, payload)
        elif kind == frames.PING:
            if stream_id:
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "a ping on a stream")
            if len(payload) != 8:
                raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "a ping isn't 8 bytes")
            if flags & frames.ACK:
                self.pings_answered += 1
            else:
                self._send(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.PRIORITY:
            if not stream_id:
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "a priority of no stream")
            if len(payload) != 5:
                self._refuse(stream_id, ErrorCode.FRAME_SIZE_ERROR)
            elif frames.read_number(payload, 0)[0] & frames.WINDOW_MOST == stream_id:
                self._refuse(stream_id, ErrorCode.PROTOCOL_ERROR)
        elif kind == frames.GOAWAY:
            if stream_id:
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "a farewell on a stream")
        elif kind == frames.PUSH_PROMISE:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "a client can't push")
        # Other kinds are to be passed over.

    def _take_window(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "a window's update isn't 4 bytes")
        size = frames.read_number(payload, 0)[0] & frames.WINDOW_MOST
        if not stream_id:
            if not size:
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "a window opened by nothing")
            self._window += size
            if self._window > frames.WINDOW_MOST:
                raise _ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
            # In turns: who is served goes to the end.
            for stream in list(self._blocked.values()):
                del self._blocked[stream.id]
                self._blocked[stream.id] = stream
                self._push(stream)
            return
        known = self.streams.get(stream_id)
        if known is None:
            if stream_id > self._last or not stream_id & 1:
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"a window of stream {stream_id}, which is idle")
            return
        if not size:
            self._break(known, ErrorCode.PROTOCOL_ERROR)
            return
        known.window += size
        if known.window > frames.WINDOW_MOST:
            self._break(known, ErrorCode.FLOW_CONTROL_ERROR)
        elif known.pending:
            self._push(known)

    def _take_reset(self, stream_id: int, payload: bytes) -> None:
        if not stream_id or stream_id > self._last or not stream_id & 1:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"a reset of stream {stream_id}, which is idle")
        if len(payload) != 4:
            raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "a reset isn't 4 bytes")
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._forget(stream)
            self._handler.broken(stream)
            self._count_broken()

    def _take_settings(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "settings of a stream")
        if flags & frames.ACK:
            if payload:
                raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "settings in what acknowledges some")
            return
        if len(payload) % 6:
            raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "half a setting")
        for key, value in frames.read_settings(payload):
            if key == frames.INITIAL_WINDOW_SIZE:
                if value > frames.WINDOW_MOST:
                    raise _ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
                self._change_windows(value - self._first_window)
                self._first_window = value
            elif key == frames.MAX_FRAME_SIZE:
                if not frames.FRAME_LEAST <= value <= frames.FRAME_MOST:
                    raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"frames of {value} bytes")
                self._frame = min(value, _SENT_MOST)
            elif key == frames.ENABLE_PUSH and value > 1:
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "push is on or off")
        # Before anything that it allows: from here on the peer counts by it.
        self._send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        for stream in list(self._blocked.values()):
            self._push(stream)

    def _change_windows(self, change: int) -> None:
        for stream in self.streams.values():
            stream.window += change
            if stream.window > frames.WINDOW_MOST:
                raise _ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")

    # What goes out.

    def allow(self, stream: Stream, size: int, *, least: int = STREAM_WINDOW >> 1) -> None:
        """So many bytes that came are done with: the peer may send as many more.

        It is told when there are `least` of them.
        """
        stream.credit += size
        if stream.credit >= least and stream.receiving:
            stream.room += stream.credit
            self._send(frames.window_update(stream.id, stream.credit))
            stream.credit = 0

    def answer(self, stream: Stream, headers: bytes, message: bytes, trailers: bytes) -> None:
        """The whole answer at once: two blocks and what is between them."""
        size = len(message)
        if size > stream.window or size > self._window or size > self._frame:
            self.send_headers(stream, headers)
            self.send_data(stream, message)
            self.send_trailers(stream, trailers)
            return
        stream.window -= size
        self._window -= size
        stream_id, frame = stream.id, frames.frame
        self._send(
            frame(frames.HEADERS, frames.END_HEADERS, stream_id, headers)
            + frame(frames.DATA, 0, stream_id, message)
            + frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream_id, trailers)
        )
        self._end(stream)

    def send_headers(self, stream: Stream, block: bytes) -> None:
        """Begin an answer."""
        self._send(frames.frame(frames.HEADERS, frames.END_HEADERS, stream.id, block))

    def send_data(self, stream: Stream, *parts: bytes) -> bool:
        """Go on with an answer; whether all of it is out. If it isn't, `Handler.drained` says when."""
        pending = stream.pending
        if pending is None:
            pending = stream.pending = deque()
        pending.extend(memoryview(part) for part in parts if part)
        return self._push(stream)

    def send_trailers(self, stream: Stream, block: bytes) -> None:
        """End an answer, once what is pending is out."""
        if stream.pending:
            stream.trailers = block
            return
        self._send(frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream.id, block))
        self._end(stream)

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """Break a stream off; the handler isn't told."""
        if self.streams.get(stream.id) is stream:
            self._forget(stream)
            self._note_gone(stream.id)
            self._send(frames.rst_stream(stream.id, code))

    def ping(self) -> None:
        """Ask the peer for a sign of life."""
        self._send(frames.frame(frames.PING, 0, 0, bytes(8)))

    def say_goodbye(self, *, refuse: bool) -> None:
        """Ask the peer for no more streams; with `refuse`, ones that come after all aren't taken any more."""
        self._refusing = refuse
        self._send(frames.goaway(self._last if refuse else frames.WINDOW_MOST, ErrorCode.NO_ERROR))

    def fail(self, code: ErrorCode, why: str) -> None:
        """End all of it."""
        if self.closed:
            return
        self._send(frames.goaway(self._last, code, why.encode()[:200]))
        self.end()

    def end(self) -> None:
        """There is no peer any more."""
        self.closed = True
        streams = list(self.streams.values())
        self.streams.clear()
        self._blocked.clear()
        for stream in streams:
            self._handler.broken(stream)

    def calm_down(self) -> None:
        """Time has passed: half of what was held against the peer is forgotten."""
        self._broken >>= 1

    # How.

    def _send(self, data: bytes) -> None:
        if not self._output:
            self._wake()
        self._output.append(data)

    def _push(self, stream: Stream) -> bool:
        """Send of what is pending what the windows take; whether that was all."""
        pending = stream.pending
        if pending and not self._output:
            self._wake()
        output, most = self._output, self._frame
        while pending:
            part = pending[0]
            size = min(len(part), most, stream.window, self._window)
            if size <= 0:
                self._blocked[stream.id] = stream
                return False
            stream.window -= size
            self._window -= size
            output.append(frames.head(frames.DATA, 0, stream.id, size))
            if size == len(part):
                output.append(part)
                pending.popleft()
            else:
                output.append(part[:size])
                pending[0] = part[size:]
        if self._blocked.pop(stream.id, None) is not None:
            if stream.trailers is not None:
                self.send_trailers(stream, stream.trailers)
            self._handler.drained(stream)
        return True

    def _end(self, stream: Stream) -> None:
        """It is answered; what the peer may still be sending isn't wanted."""
        if stream.receiving:
            self.reset(stream, ErrorCode.NO_ERROR)
        else:
            self._forget(stream)
        if self._broken:
            self._broken -= 1

    def _forget(self, stream: Stream) -> None:
        del self.streams[stream.id]
        if stream.pending:
            stream.pending.clear()
            self._blocked.pop(stream.id, None)

    def _note_gone(self, stream_id: int) -> None:
        if len(self._gone) >= _GONE_MOST:
            del self._gone[next(iter(self._gone))]
        self._gone[stream_id] = None

    def _break(self, stream: Stream, code: ErrorCode) -> None:
        """A stream's error: it alone ends."""
        self.reset(stream, code)
        self._handler.broken(stream)
        self._count_broken()

    def _refuse(self, stream_id: int, code: ErrorCode) -> None:
        """A stream that never was one."""
        known = self.streams.get(stream_id)
        if known is not None:
            self._break(known, code)
            return
        self._note_gone(stream_id)
        self._send(frames.rst_stream(stream_id, code))
        # One too many is no fault: its client may not have read how many there may be.
        if code != ErrorCode.REFUSED_STREAM:
            self._count_broken()

    def _count_broken(self) -> None:
        self._broken += 1
        if self._broken > _BROKEN_MOST:
            raise _ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, "too many streams were broken off")


def _unpad(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "more padding than there are bytes")
    return payload[1 : len(payload) - payload[0]]
