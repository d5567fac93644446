"""Sources: where a blob that is not in ``blobs/`` may come from.

A source is asked for one digest at a time and answers with a stream, or with
None where it hasn't that blob. What it sends is not trusted: it is hashed on
its way in (`store.hydration`), so a source need not verify. Those of this
layer are the cold tier (`store.cold`) and directories
(`store.directory_source`); those that need a network are made by the layers
above (`SourceOptions.remote`), and may answer for many digests at a time.

Sources are asked from several threads at once, and may be slow or hang: that
is the hydrator's matter, not theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from store.digest import Digest

DEFAULT_TIMEOUT = 30.0
"""Seconds after which a source that makes no progress is given up."""


class Stream(Protocol):
    """The bytes of a blob, on their way."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end. Raises OSError, or CorruptBlob where the source's copy is damaged."""
        ...

    def close(self) -> None: ...


class Supply(NamedTuple):
    """What a source has of a blob; `executable`: it was added from a program."""

    stream: Stream
    executable: bool


class Source(Protocol):
    """One place that blobs come from."""

    @property
    def label(self) -> str:
        """What a log line calls it."""
        ...

    def open(self, digest: Digest) -> Supply | None:
        """The blob, or None where there is none. Raises OSError or StoreError where that can't be said."""
        ...

    def accepted(self, digests: Sequence[Digest]) -> None:
        """These came from here and are durable in ``blobs/`` now."""
        ...

    def rejected(self, digest: Digest) -> None:
        """What was sent as this blob had other bytes, or was damaged."""
        ...


class RemoteSource(Source, Protocol):
    """A source that is made when a store is opened and closed with it. It may be a `BatchSource`, a `TreeSource`."""

    def close(self) -> None: ...


@runtime_checkable
class BatchSource(Protocol):
    """A source for which asking for many costs about what asking for one does."""

    @property
    def most_together(self) -> int:
        """How many digests it wants to be asked for at a time."""
        ...

    @property
    def most_bytes(self) -> int:
        """It isn't asked for more where what it is asked for has so many bytes: they may all be in memory."""
        ...

    def open_all(self, digests: Sequence[Digest]) -> Sequence[Supply | Exception | None]:
        """For each what `open` would return or raise. Raises where nothing can be said of any."""
        ...


@runtime_checkable
class TreeSource(Protocol):
    """A source that can send all directories of a tree at once."""

    def read_tree(self, root: Digest) -> Iterator[bytes]:
        """Directory messages of a tree: perhaps not all, perhaps others, in any order. Raises OSError, StoreError."""
        ...
