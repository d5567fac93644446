"""An upstream as sources: one for small blobs, which come many in a message, and one for the others, streamed.

They are two so that each has threads of its own (`store.lanes`): a file that is
read doesn't wait behind four large ones. Both share one client, which is made
when the first of them is asked.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from store.digest import Digest
from store.errors import StoreError
from store.sources import RemoteSource, Supply
from tools.upstream.options import UpstreamOptions

if TYPE_CHECKING:
    from tools.upstream.client import Client


class Upstream:
    """A client, made when it is first asked for."""

    def __init__(self, options: UpstreamOptions, timeout: float) -> None:
        self.options = options
        self._timeout = timeout
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._closed = False

    def client(self) -> Client:
        """The client. Raises BadInput where it can't be made, StoreError when closed."""
        with self._lock:
            if self._client is None:
                if self._closed:
                    raise StoreError("the store is being closed")
                from tools.upstream.client import Client

                self._client = Client(self.options, self._timeout)
            return self._client

    def statistics(self) -> dict[str, int]:
        """See `Client.statistics`."""
        return {} if self._client is None else self._client.statistics()

    def close(self) -> None:
        """Break off what is under way; harmless when repeated."""
        with self._lock:
            client, self._client, self._closed = self._client, None, True
        if client is not None:
            client.close()


class _Part:
    """What both sources are."""

    def __init__(self, upstream: Upstream) -> None:
        self.label = upstream.options.url
        self._upstream = upstream

    def accepted(self, digests: Sequence[Digest]) -> None:
        """Nothing is changed there."""

    def rejected(self, digest: Digest) -> None:
        """Nothing is changed there; the log names it."""

    def close(self) -> None:
        """Close the client."""
        self._upstream.close()


class SmallBlobs(_Part):
    """Answers for blobs that go with others in one message, and has no others. Knows trees."""

    most_together = 1000
    # With the last one, which is small, that is a message: so each round is one call, and shows that all goes on.
    most_bytes = 3 << 20

    def open(self, digest: Digest) -> Supply | None:
        """One blob."""
        [answer] = self.open_all([digest])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def open_all(self, digests: Sequence[Digest]) -> Sequence[Supply | Exception | None]:
        """In as few calls as they fit into."""
        client = self._upstream.client()
        found = client.read_batch([digest for digest in digests if client.is_small(digest)])
        return [_as_answer(found.get(digest)) for digest in digests]

    def read_tree(self, root: Digest) -> Iterator[bytes]:
        """Its Directory messages."""
        return self._upstream.client().read_tree(root)


class LargeBlobs(_Part):
    """Answers for the others."""

    def open(self, digest: Digest) -> Supply | None:
        """A stream of it."""
        from tools.upstream.errors import NotThere

        client = self._upstream.client()
        if client.is_small(digest) or not client.knows(digest.function):
            return None
        try:
            return Supply(client.open_stream(digest), executable=False)
        except NotThere:
            return None


def _as_answer(found: bytes | StoreError | None) -> Supply | Exception | None:
    return Supply(io.BytesIO(found), executable=False) if isinstance(found, bytes) else found


def parts(upstream: Upstream) -> Sequence[RemoteSource]:
    """The sources of an upstream."""
    return SmallBlobs(upstream), LargeBlobs(upstream)


def make_sources(options: UpstreamOptions, timeout: float) -> Sequence[RemoteSource]:
    """The sources of an upstream that nobody else uses."""
    return parts(Upstream(options, timeout))
