"""Sources: where a blob that is not in ``blobs/`` may come from.

A source is asked for one digest at a time and answers with a stream, or with
None where it hasn't that blob. What it sends is not trusted: it is hashed on
its way in (`store.hydration`), so a source need not verify. Those of today
are the cold tier (`store.cold`) and directories (`store.directory_source`);
a remote cache fits the same protocol.

Sources are asked from several threads at once, and may be slow or hang: that
is the hydrator's matter, not theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from store.digest import Digest


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
