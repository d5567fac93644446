"""Uploads that are going on: how many a client has, and those whose client went away and may come back.

An upload that broke off is *parked* under its resource's name: whoever goes on
with it finds its bytes, its hash and its decompressor as they were left. It is
kept for ten minutes, or until its space is needed; it lives in this process
alone, and after a restart a client is told that nothing is there.

Threads may share a `Desk`; a `Transfer` is used by one at a time.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from store.errors import NoSpace
from store.uploads import Upload, Uploads
from tools.reapi.resource_names import Compression, ResourceName
from tools.server.compression import Expander
from tools.server.errors import Exhausted

_PARK_SECONDS = 600.0
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Transfer:
    """One upload; `received` counts bytes as they came over the wire, so of a compressed one compressed ones."""

    name: ResourceName
    client: str
    upload: Upload
    received: int = 0
    parked: float = 0.0
    expander: Expander | None = field(init=False)

    def __post_init__(self) -> None:
        compressed = self.name.compression is Compression.ZSTD
        self.expander = Expander(self.upload) if compressed else None

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises InvalidArgument, DigestMismatch, NoSpace."""
        if self.expander is not None:
            self.expander.write(data)
        else:
            self.upload.write(data)
        self.received += len(data)


class Desk:
    """Where uploads are registered."""

    def __init__(self, uploads: Uploads, most_per_client: int) -> None:
        self._uploads = uploads
        self.most_per_client = most_per_client
        self._lock = threading.Lock()
        # Under `_lock`:
        self._open: Counter[str] = Counter()
        self._parked: OrderedDict[ResourceName, Transfer] = OrderedDict()

    def begin(self, client: str, name: ResourceName) -> Transfer:
        """Begin an upload. Raises Exhausted where the client has too many, NoSpace."""
        return Transfer(name, client, self.admit(client, lambda: self._uploads.begin(name.digest)))

    def admit(self, client: str, begin: Callable[[], T]) -> T:
        """Begin something that the client has open until it is dismissed. Raises Exhausted, and what `begin` does."""
        self._drop_old()
        with self._lock:
            if self._open[client] >= self.most_per_client:
                raise Exhausted(f"this client has {self.most_per_client} uploads open already: finish one first")
            self._open[client] += 1
        try:
            return self._begin(begin)
        except BaseException:
            self.dismiss(client)
            raise

    def _begin(self, begin: Callable[[], T]) -> T:
        try:
            return begin()
        except NoSpace:
            # Those who may never come back don't keep out those who are here.
            if not self._drop_old(0.0):
                raise
            return begin()

    def resume(self, name: ResourceName) -> Transfer | None:
        """Take up an upload that broke off."""
        with self._lock:
            return self._parked.pop(name, None)

    def received(self, name: ResourceName) -> int:
        """How many bytes of a parked upload are here."""
        with self._lock:
            transfer = self._parked.get(name)
        return 0 if transfer is None else transfer.received

    def park(self, transfer: Transfer) -> None:
        """Keep an upload whose client went away."""
        transfer.parked = time.monotonic()
        with self._lock:
            other = self._parked.pop(transfer.name, None)
            self._parked[transfer.name] = transfer
        if other is not None:
            self.drop(other)

    def finish(self, transfer: Transfer) -> None:
        """The client has sent all. Returns when the blob is durable; raises DigestMismatch, NoSpace."""
        try:
            transfer.upload.finish()
        finally:
            self.dismiss(transfer.client)

    def drop(self, transfer: Transfer) -> None:
        """Forget an upload."""
        transfer.upload.discard()
        self.dismiss(transfer.client)

    def dismiss(self, client: str) -> None:
        """The client has one less open."""
        with self._lock:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]

    def _drop_old(self, age: float = _PARK_SECONDS) -> int:
        limit = time.monotonic() - age
        with self._lock:
            # Parked in this order, so the oldest is first.
            old = []
            while self._parked and next(iter(self._parked.values())).parked <= limit:
                old.append(self._parked.popitem(last=False)[1])
        for transfer in old:
            self.drop(transfer)
        return len(old)

    def close(self) -> None:
        """Forget all that is parked."""
        self._drop_old(0.0)
