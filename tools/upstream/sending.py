"""Blobs of a store on their way to an upstream: what it lacks of them, small ones together, the others as streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from store.blobs import Blobs
from store.digest import Digest
from store.errors import MissingBlob
from tools.server.downloads import PIECE
from tools.upstream.client import Client

_BATCH_BYTES = 4 << 20


def send_blobs(client: Client, blobs: Blobs, digests: Sequence[Digest]) -> tuple[int, set[Digest]]:
    """Send blobs of one digest function; how many were, and those that it still hasn't.

    These are no longer here, or were refused. Raises UpstreamError.
    """
    failed: set[Digest] = set()
    batch: list[tuple[Digest, bytes]] = []
    missing = client.find_missing([digest for digest in digests if digest.size])
    for digest in missing:
        try:
            if client.is_small(digest):
                batch.append((digest, b"".join(_read(blobs, digest))))
            else:
                client.write_stream(digest, lambda digest=digest: _read(blobs, digest))  # type: ignore[misc]
        except MissingBlob:
            failed.add(digest)  # collected meanwhile
        if sum(len(data) for _, data in batch) > _BATCH_BYTES:
            failed.update(client.write_batch(batch))
            batch = []
    failed.update(client.write_batch(batch))
    return len(missing) - len(failed), failed


def _read(blobs: Blobs, digest: Digest) -> Iterator[bytes]:
    with open(blobs.open(digest), "rb", buffering=0) as file:
        while data := file.read(PIECE):
            yield data
