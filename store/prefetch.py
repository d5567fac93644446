"""Prefetching: bringing in every blob of a tree that is not in ``blobs/``, many at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from store.digest import Digest
from store.errors import MissingBlob
from store.manifests import tree_blobs
from store.repository import Store
from store.trees import Directory

_AT_ONCE = 1024
"""So many on their way keep every source busy, and are published with few syncs."""


@dataclass(slots=True)
class Prefetched:
    """What came in; sizes in bytes. `failed` says of each blob that did not come why."""

    fetched_blobs: int = 0
    fetched_bytes: int = 0
    failed: dict[Digest, str] = field(default_factory=dict)


Progress = Callable[[int, int], None]
"""Told how many blobs and bytes have just come in, or failed."""


def prefetch(store: Store, digests: list[Digest], progress: Progress = lambda blobs, size: None) -> Prefetched:
    """Fetch these blobs. Raises what ends all of it: NoSpace, StoreUnusable."""
    result = Prefetched()
    running: dict[Future[None], Digest] = {}
    rest = iter(digests)
    while True:
        while len(running) < _AT_ONCE and (digest := next(rest, None)) is not None:
            running[store.hydrator.fetch(digest, ahead=True)] = digest
        if not running:
            return result
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            digest = running.pop(future)
            try:
                future.result()
                result.fetched_blobs += 1
                result.fetched_bytes += digest.size
            except MissingBlob as error:
                result.failed[digest] = str(error)
            progress(1, digest.size)


def find_absent(store: Store, directory: Directory) -> list[Digest]:
    """The blobs of a tree that have no file in ``blobs/``, those of the cold tier included."""
    with store.index.view() as view:
        return [digest for digest in tree_blobs(view, directory) if not store.blobs.has_file(digest)]


def prefetch_tree(
    store: Store, directory: Directory, holder: str, begin: Callable[[int, int], Progress] | None = None
) -> Prefetched:
    """Fetch all that a tree lacks, under a lease on it. `begin` is told how many blobs and bytes that will be."""
    with store.leases.acquire("prefetch", [directory.digest], holder):
        absent = find_absent(store, directory)
        if begin is None:
            return prefetch(store, absent)
        return prefetch(store, absent, begin(len(absent), sum(digest.size for digest in absent)))
