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

import sys
from collections.abc import Callable
from typing import Any

from tools.http2 import frames
from tools.http2.frames import CONTINUATION, DATA, FRAME_LEAST, HEAD_BYTES, HEADERS, WINDOW_MOST, ErrorCode, read_head
from tools.http2.headers import Malformed, check_trailers
from tools.http2.hpack import Decoder, HpackError
from tools.http2.outgoing import Outgoing
from tools.http2.stream import STREAM_WINDOW, Handler, Stream

_CONNECTION_WINDOW = 16 << 20
_BROKEN_MOST = 1000
"""Streams broken off beyond those that ended well. A build that is cancelled breaks off some hundreds."""
_CONTINUATIONS_MOST = 64
_KNOWN_MOST = 64
"""Header blocks whose meaning is remembered."""
_GONE_MOST = 4096


class _ConnectionError(Exception):
    def __init__(self, code: ErrorCode, why: str) -> None:
        super().__init__(why)
        self.code = code


class Connection:
    """Everything about one connection. `out` has what is to be sent; `wake` is called when there is something again."""

    def __init__(self, handler: Handler, streams_most: int, header_bytes: int, wake: Callable[[], object]) -> None:
        """`header_bytes`: of a request's headers; longer blocks than a few times that end the connection."""
        self.streams: dict[int, Stream] = {}
        self.closed = False
        """Nothing more is read or sent, but what is in `out`."""
        self.pings_answered = 0
        self.begun = False
        """The peer speaks HTTP/2."""
        self._handler = handler
        self._streams_most = streams_most
        self._block_most = 4 * header_bytes
        self._decoder = Decoder()
        self._known: dict[bytes, tuple[Any, int]] = {}
        self._known_changes = 0
        self._last_known: tuple[Any, int] | None = None
        """What the block meant that was decoded last."""
        self._data = b""
        self._position = 0
        """Of `_data`, what is worked on next."""
        self.hungry = False
        """What is unparsed is a part of a frame: without more nothing can be done."""
        self._partial: tuple[int, int, list[bytes]] | None = None
        """Of headers that aren't whole yet: stream, flags, the parts."""
        self._last = 0
        self.refusing = False
        """Streams that begin now come too late."""
        self._gone: dict[int, None] = {}
        """Streams that were ended here while the peer was sending: what comes of them is passed over."""
        self._broken = 0
        self._credit = 0
        self._room = _CONNECTION_WINDOW
        self.out = out = Outgoing(wake, self._end, handler.drained)
        settings = {
            frames.MAX_CONCURRENT_STREAMS: streams_most,
            frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            frames.MAX_HEADER_LIST_SIZE: header_bytes,
        }
        out.send(frames.settings(settings) + frames.window_update(0, _CONNECTION_WINDOW - frames.WINDOW))

    # What comes.

    def receive(self, data: bytes) -> None:
        """Bytes came: all of them are worked on. Whatever is wrong with them is the peer's to know, and in `out`."""
        self.feed(data)
        self.parse()

    def feed(self, data: bytes) -> None:
        """Bytes came, to be worked on by `parse`."""
        if self._position < len(self._data):
            data = self._data[self._position :] + data
        self._data = data
        self._position = 0
        self.hungry = False

    @property
    def unparsed(self) -> int:
        """Bytes that came and weren't worked on yet; of the last frame there may be only a part."""
        return len(self._data) - self._position

    def parse(self, most: int = sys.maxsize) -> bool:
        """Work on what came, and stop behind the frame with which `most` bytes are reached; says whether it stopped."""
        if self.closed:
            self._data, self._position = b"", 0
            return False
        data, position = self._data, self._position
        end = len(data)
        last = min(end, position + most)
        try:
            if not self.begun:
                if not data.startswith(frames.PREFACE[:end]):
                    raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "this is no HTTP/2")
                if end < len(frames.PREFACE):
                    return False
                self.begun = True
                position = len(frames.PREFACE)
            while position < last and position + HEAD_BYTES <= end:
                word, flags, stream_id = read_head(data, position)
                start = position + HEAD_BYTES
                stop = start + (word >> 8)
                if stop - start > FRAME_LEAST:
                    raise _ConnectionError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {stop - start} bytes")
                if stop > end:
                    self._position = position
                    self.hungry = True
                    return False
                position = stop
                kind = word & 0xFF
                if self._partial is not None and kind != CONTINUATION:
                    raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "a frame between headers and their continuation")
                if kind == DATA:
                    self._take_data(stream_id & WINDOW_MOST, flags, data[start:stop])
                elif kind == HEADERS:
                    self._take_headers(stream_id & WINDOW_MOST, flags, data[start:stop])
                else:
                    self._take_other(kind, flags, stream_id & WINDOW_MOST, data[start:stop])
        except HpackError as error:
            self.fail(ErrorCode.COMPRESSION_ERROR, str(error))
        except _ConnectionError as error:
            self.fail(error.code, str(error))
        if self.closed or position == end:
            self._data, self._position = b"", 0
            return False
        self._position = position
        self.hungry = position < last
        return not self.hungry

    def _take_data(self, stream_id: int, flags: int, data: bytes) -> None:
        length = len(data)
        self._room -= length
        if self._room < 0:
            raise _ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "more than the connection's window")
        self._credit += length
        if self._credit >= _CONNECTION_WINDOW >> 1:
            self.out.send(frames.window_update(0, self._credit))
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
        self._check_begun(stream_id)
        if stream_id in self._gone:
            return
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._break(stream, ErrorCode.STREAM_CLOSED)
        else:
            self.out.send(frames.rst_stream(stream_id, ErrorCode.STREAM_CLOSED))
            self._count_broken()

    def _check_begun(self, stream_id: int) -> None:
        if not stream_id or stream_id > self._last or not stream_id & 1:
            raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"a frame for stream {stream_id}, which is idle")

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
        known = None
        if self._known_changes == self._decoder.changes:
            known = self._known.get(block)
        else:
            self._known.clear()
            self._known_changes = self._decoder.changes
        if known is None:
            headers = self._decoder.decode(block)
            varied, last, self._last_known = self._decoder.varied, self._last_known, None
            if varied >= 0 and last is not None:
                known = self._handler.vary(last, headers[varied])
            if known is None:
                try:
                    known = self._handler.interpret(headers)
                except Malformed:
                    self._refuse(stream_id, ErrorCode.PROTOCOL_ERROR)
                    return
            self._last_known = known
            if self._known_changes == self._decoder.changes and len(self._known) < _KNOWN_MOST:
                self._known[block] = known
        if len(self.streams) >= self._streams_most or self.refusing:
            self._refuse(stream_id, ErrorCode.REFUSED_STREAM)
            return
        head, expected = known
        if ended and expected > 0:
            self._refuse(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        stream = self._handler.make(stream_id, head, self.out.first_window, expected)
        stream.receiving = not ended
        self.streams[stream_id] = stream
        self._handler.begin(stream, ended)

    def _take_trailers(self, stream_id: int, ended: bool, block: bytes) -> None:
        headers = self._decoder.decode(block)
        self._last_known = None
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
                self.out.send(frames.frame(frames.PING, frames.ACK, 0, payload))
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
            self.out.window += size
            if self.out.window > frames.WINDOW_MOST:
                raise _ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
            self.out.push_all()
            return
        known = self.streams.get(stream_id)
        if known is None:
            self._check_begun(stream_id)
            return
        if not size:
            self._break(known, ErrorCode.PROTOCOL_ERROR)
            return
        known.window += size
        if known.window > frames.WINDOW_MOST:
            self._break(known, ErrorCode.FLOW_CONTROL_ERROR)
        elif known.pending:
            self.out.push(known)

    def _take_reset(self, stream_id: int, payload: bytes) -> None:
        self._check_begun(stream_id)
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
                self._change_windows(value - self.out.first_window)
                self.out.first_window = value
            elif key == frames.MAX_FRAME_SIZE:
                if not frames.FRAME_LEAST <= value <= frames.FRAME_MOST:
                    raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, f"frames of {value} bytes")
                self.out.allow_frames(value)
            elif key == frames.ENABLE_PUSH and value > 1:
                raise _ConnectionError(ErrorCode.PROTOCOL_ERROR, "push is on or off")
        # Before anything that it allows: from here on the peer counts by it.
        self.out.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self.out.push_all()

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
            self.out.send(frames.window_update(stream.id, stream.credit))
            stream.credit = 0

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """Break a stream off; the handler isn't told."""
        if self.streams.get(stream.id) is stream:
            self._forget(stream)
            self._note_gone(stream.id)
            self.out.send(frames.rst_stream(stream.id, code))

    def ask_for_streams(self, most: int) -> None:
        """Ask the peer to have so many at a time; more are taken all the same, as far as they ever were."""
        self.out.send(frames.settings({frames.MAX_CONCURRENT_STREAMS: min(most, self._streams_most)}))

    def ping(self) -> None:
        """Ask the peer for a sign of life."""
        self.out.send(frames.frame(frames.PING, 0, 0, bytes(8)))

    def say_goodbye(self, *, refuse: bool) -> None:
        """Ask the peer for no more streams; with `refuse`, ones that come after all aren't taken any more."""
        self.refusing = refuse
        self.out.send(frames.goaway(self._last if refuse else frames.WINDOW_MOST, ErrorCode.NO_ERROR))

    def fail(self, code: ErrorCode, why: str) -> None:
        """End all of it."""
        if self.closed:
            return
        self.out.send(frames.goaway(self._last, code, why.encode()[:200]))
        self.end()

    def end(self) -> None:
        """There is no peer any more."""
        self.closed = True
        self._data, self._position = b"", 0
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            self.out.forget(stream)
            self._handler.broken(stream)

    def calm_down(self) -> None:
        """Time has passed: half of what was held against the peer is forgotten."""
        self._broken >>= 1

    # How.

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
        self.out.forget(stream)

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
        self.out.send(frames.rst_stream(stream_id, code))
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
