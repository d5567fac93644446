"""Remembering what a host file's digest was, so that an unchanged one isn't read again.

    STAMPS  device, inode, function → size, mtime, ctime, hash

A stamp is believed only if it was already old when it was taken: a write in
the same clock tick as the reading would leave the same times behind (git calls
such an entry racy).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable

from store.digest import Digest, DigestFunction
from store.entries import Stamp
from store.index import Change, Table, View

_KEY = struct.Struct(">QQB")
_VALUE = struct.Struct("<Qqq32s")

_TICK_NS = 100_000_000
"""No kernel's clock tick is longer than 10 ms."""
_COARSE_NS = 2_000_000_000
"""File systems with whole seconds only; FAT counts in twos."""


def find_stamp(view: View, stamp: Stamp, function: DigestFunction) -> Digest | None:
    """The digest a file with this stamp was found to have, or None."""
    value = view.get(Table.STAMPS, _KEY.pack(stamp.device, stamp.inode, function))
    if value is None:
        return None
    size, mtime_ns, ctime_ns, hash_ = _VALUE.unpack(value)
    if (size, mtime_ns, ctime_ns) != stamp[2:]:
        return None
    return Digest(function, hash_, size)


def is_settled(stamp: Stamp) -> bool:
    """Whether a write after this moment would surely show in the stamp. Ask before reading the file."""
    newest = max(stamp.mtime_ns, stamp.ctime_ns)
    coarse = not stamp.mtime_ns % 1_000_000_000 and not stamp.ctime_ns % 1_000_000_000
    return time.time_ns() - newest >= (_COARSE_NS if coarse else _TICK_NS)


def put_stamps(change: Change, stamps: Iterable[tuple[Stamp, Digest]]) -> None:
    """Remember digests of files whose stamps were settled before they were read."""
    for stamp, digest in stamps:
        key = _KEY.pack(stamp.device, stamp.inode, digest.function)
        change.put(Table.STAMPS, key, _VALUE.pack(*stamp[2:], digest.hash))


def forget_stamps(change: Change, gone: set[bytes]) -> None:
    """Forget the stamps of files whose blobs (by digest key) are gone."""
    for key, value in list(change.scan(Table.STAMPS)):
        if key[-1:] + value[-32:] in gone:
            change.delete(Table.STAMPS, key)
