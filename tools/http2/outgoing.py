"""What a connection sends: frames in order, as far as the peer's windows take data.

What they don't take waits with its stream, and the end of the stream behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tools.http2 import frames
from tools.http2.stream import Stream

Buffer = bytes | memoryview

_SENT_MOST = 64 << 10
"""Bytes of a frame that is sent, where the peer takes so large ones: in between others get their turn."""


class Outgoing:
    """Of one connection. `wake` is called when there is something to take again."""

    def __init__(
        self, wake: Callable[[], object], ended: Callable[[Stream], object], drained: Callable[[Stream], object]
    ) -> None:
        """`ended`: a stream's end is out. `drained`: what waited of one is out."""
        self.window = frames.WINDOW
        """Bytes that the peer takes of all streams together."""
        self.first_window = frames.WINDOW
        """And of a new one."""
        self._wake = wake
        self._ended = ended
        self._drained = drained
        self._frame = frames.FRAME_LEAST
        self._blocked: dict[int, Stream] = {}
        self._buffers: list[Buffer] = []

    @property
    def is_blocked(self) -> bool:
        """Something waits for the peer to open a window."""
        return bool(self._blocked)

    def take(self) -> list[Buffer]:
        """What is to be sent, in order; it counts as sent."""
        buffers, self._buffers = self._buffers, []
        return buffers

    def allow_frames(self, size: int) -> None:
        """The peer takes frames of so many bytes."""
        self._frame = min(size, _SENT_MOST)

    def send(self, data: bytes) -> None:
        """Whole frames."""
        if not self._buffers:
            self._wake()
        self._buffers.append(data)

    def answer(self, stream: Stream, headers: bytes, message: bytes, trailers: bytes) -> None:
        """The whole answer at once: two blocks and what is between them."""
        size = len(message)
        if size > stream.window or size > self.window or size > self._frame:
            self.send_headers(stream, headers)
            self.send_data(stream, message)
            self.send_trailers(stream, trailers)
            return
        stream.window -= size
        self.window -= size
        stream_id, head = stream.id, frames.head
        self.send(
            b"".join(
                (
                    head(frames.HEADERS, frames.END_HEADERS, stream_id, len(headers)),
                    headers,
                    head(frames.DATA, 0, stream_id, size),
                    message,
                    head(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream_id, len(trailers)),
                    trailers,
                )
            )
        )
        self._ended(stream)

    def send_headers(self, stream: Stream, block: bytes) -> None:
        """Begin an answer."""
        self.send(frames.frame(frames.HEADERS, frames.END_HEADERS, stream.id, block))

    def send_data(self, stream: Stream, *parts: bytes) -> None:
        """Go on with an answer. What of it has to wait is `Stream.pending`; `drained` is called when it is out."""
        pending = stream.pending
        if pending is None:
            pending = stream.pending = deque()
        for part in parts:
            if part:
                pending.append(memoryview(part))
                stream.waiting += len(part)
        self.push(stream)

    def send_trailers(self, stream: Stream, block: bytes) -> None:
        """End an answer, once what is pending is out."""
        if stream.pending:
            stream.trailers = block
            return
        self.send(frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream.id, block))
        self._ended(stream)

    def push(self, stream: Stream) -> None:
        """Send of what is pending what the windows take."""
        pending = stream.pending
        if pending and not self._buffers:
            self._wake()
        buffers, most = self._buffers, self._frame
        while pending:
            size = min(stream.waiting, most, stream.window, self.window)
            if size <= 0:
                self._blocked[stream.id] = stream
                return
            stream.window -= size
            self.window -= size
            stream.waiting -= size
            buffers.append(frames.head(frames.DATA, 0, stream.id, size))
            while size:
                part = pending.popleft()
                if len(part) > size:
                    pending.appendleft(part[size:])
                    part = part[:size]
                buffers.append(part)
                size -= len(part)
        if self._blocked.pop(stream.id, None) is not None:
            if stream.trailers is not None:
                self.send_trailers(stream, stream.trailers)
            self._drained(stream)

    def push_all(self) -> None:
        """The windows have grown. In turns: who is served goes to the end."""
        for stream in list(self._blocked.values()):
            del self._blocked[stream.id]
            self._blocked[stream.id] = stream
            self.push(stream)

    def forget(self, stream: Stream) -> None:
        """Send no more of it."""
        if stream.pending:
            stream.pending.clear()
            self._blocked.pop(stream.id, None)
