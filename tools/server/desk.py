"""Uploads that come piece by piece, and those of them whose client went away and may come back.

An upload that broke off is *parked* under its resource's name: whoever goes on
with it finds its bytes, its hash and its decompressor as they were left. It is
kept for ten minutes, or until its space is needed; it lives in this process
alone, and after a restart a client is told that nothing is there.

Threads may share a `Desk`; a `Transfer` is used by one at a time.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from store.errors import NoSpace
from store.uploads import Upload, Uploads
from tools.reapi.resource_names import Compression, ResourceName
from tools.server.compression import Expander

_PARK_SECONDS = 600.0
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Transfer:
    """One upload; `received` counts bytes as they came over the wire, so of a compressed one compressed ones."""

    name: ResourceName
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

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._lock = threading.Lock()
        # Under `_lock`:
        self._parked: OrderedDict[ResourceName, Transfer] = OrderedDict()

    def begin(self, name: ResourceName) -> Transfer:
        """Begin an upload. Raises NoSpace."""
        return Transfer(name, self.admit(lambda: self._uploads.begin(name.digest)))

    def admit(self, begin: Callable[[], T]) -> T:
        """Begin something that takes space. Raises what `begin` does."""
        self._drop_old()
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
            other.upload.discard()

    def forget(self, name: ResourceName) -> None:
        """Drop what is parked of an upload, if anything is: all of it comes anew."""
        if name in self._parked and (transfer := self.resume(name)) is not None:
            transfer.upload.discard()

    def _drop_old(self, age: float = _PARK_SECONDS) -> int:
        limit = time.monotonic() - age
        with self._lock:
            # Parked in this order, so the oldest is first.
            old = []
            while self._parked and next(iter(self._parked.values())).parked <= limit:
                old.append(self._parked.popitem(last=False)[1])
        for transfer in old:
            transfer.upload.discard()
        return len(old)

    def close(self) -> None:
        """Forget all that is parked."""
        self._drop_old(0.0)
