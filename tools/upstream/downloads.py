"""A large blob on its way from an upstream: read as it comes, expanded, and gone on with where a connection broke."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, cast

import zstandard

from store.digest import Digest
from store.errors import CorruptBlob
from tools.upstream.errors import Unreachable
from tools.upstream.patience import Patience

_WINDOW_MOST = 1 << 27
_BREAKS_MOST = 20
"""Connections that may be lost during one download."""


class _Pieces:
    """Messages of a call as what zstandard reads from. Closing it breaks the call off."""

    def __init__(self, messages: Iterator[bytes]) -> None:
        self._messages = messages
        self._rest = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, none at the end."""
        while not self._rest:
            message = next(self._messages, None)
            if message is None:
                return b""
            self._rest = memoryview(message)
        size = len(self._rest) if size < 0 else size
        data, self._rest = bytes(self._rest[:size]), self._rest[size:]
        return data

    def close(self) -> None:
        close = getattr(self._messages, "close", None)
        if close is not None:
            close()


class Download:
    """Implements `store.sources.Stream`. One thread at a time."""

    def __init__(
        self, digest: Digest, begin: Callable[[int], Iterator[bytes]], patience: Patience, *, compressed: bool
    ) -> None:
        """`begin` reads from an offset of the plain bytes on. Raises NotThere and other UpstreamErrors."""
        self._digest = digest
        self._begin = begin
        self._patience = patience
        self._compressed = compressed
        self._offset = 0
        self._breaks = 0
        # The first bytes are read now: whether there is such a blob is known only then.
        self._first = self._start(1 << 17)

    def read(self, size: int, /) -> bytes:
        """The next bytes. Raises CorruptBlob for what zstd can't read, Unreachable."""
        data, self._first = self._first[:size], self._first[size:]
        if not data:
            data = self._next(size)
        self._offset += len(data)
        return data

    def _next(self, size: int) -> bytes:
        try:
            return self._expand(size)
        except Unreachable:
            self._breaks += 1
            if self._breaks > _BREAKS_MOST:
                raise
            self._pieces.close()
            return self._start(size) if self._offset < self._digest.size else b""

    def _start(self, size: int) -> bytes:
        def attempt(seconds: float) -> bytes:
            self._pieces = _Pieces(self._begin(self._offset))
            self._reader = (
                zstandard.ZstdDecompressor(max_window_size=_WINDOW_MOST).stream_reader(
                    cast("IO[bytes]", self._pieces), read_across_frames=True
                )
                if self._compressed
                else self._pieces
            )
            return self._expand(size)

        return self._patience.run(attempt)

    def _expand(self, size: int) -> bytes:
        try:
            return self._reader.read(size)
        except zstandard.ZstdError as error:
            raise CorruptBlob(f"what came as {self._digest} is no zstd stream: {error}") from error

    def close(self) -> None:
        """Break it off, if it hasn't come to its end."""
        self._pieces.close()
