"""zstd on the wire: streamed both ways, never more in memory than a few pieces.

A compressed stream may say anything about what it expands to. So it is
expanded a piece at a time into a sink that knows how many bytes may come, and
its window, which is memory, is bounded too.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Protocol, cast

import zstandard

from store.errors import DigestMismatch
from tools.server.errors import InvalidArgument

if TYPE_CHECKING:
    from typing_extensions import Buffer

LEVEL = 1
"""What is sent is compressed while the client waits."""
_PIECE = 128 << 10
_WINDOW_MOST = 1 << 27
"""128 MiB: what `zstd -d` takes without being asked for more."""


class Sink(Protocol):
    """Where expanded bytes go."""

    def write(self, data: bytes, /) -> object: ...


class Expander:
    """A zstd stream, given piece by piece, expanded into a sink."""

    def __init__(self, sink: Sink) -> None:
        """The sink stops a stream that is too long by raising."""
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MOST)
        target = cast("IO[bytes]", _Passing(sink))
        self._writer = decompressor.stream_writer(target, write_size=_PIECE, closefd=False)

    def write(self, data: bytes) -> None:
        """The next piece. Raises InvalidArgument for what is no zstd, and what the sink raises."""
        try:
            self._writer.write(data)
        except zstandard.ZstdError as error:
            raise InvalidArgument(f"this is no zstd stream: {error}") from error


class _Passing(io.RawIOBase):
    """What zstandard wants to write to."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: Buffer, /) -> int:
        self._sink.write(bytes(data))
        return memoryview(data).nbytes


class _Bounded:
    """Collects at most so many bytes."""

    def __init__(self, most: int) -> None:
        self.data = bytearray()
        self._most = most

    def write(self, data: bytes) -> None:
        if len(self.data) + len(data) > self._most:
            raise DigestMismatch(f"the zstd stream expands to over {self._most} bytes, which its digest says it has")
        self.data += data


def expand(data: bytes, size: int) -> bytes:
    """Expand what is in memory, into at most `size` bytes. Raises InvalidArgument or DigestMismatch."""
    sink = _Bounded(size)
    Expander(sink).write(data)
    return bytes(sink.data)


def compress(data: bytes) -> bytes:
    """One frame."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(data)


def compress_stream(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Compress so many bytes while they come."""
    chunker = zstandard.ZstdCompressor(level=LEVEL).chunker(size=size, chunk_size=1 << 20)
    for piece in pieces:
        yield from chunker.compress(piece)
    yield from cast("Iterator[bytes]", chunker.finish())  # type: ignore[no-untyped-call]
