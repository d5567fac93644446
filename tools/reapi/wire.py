"""The two messages that are read and written by hand, as protobuf makes objects of them by the thousand.

FindMissingBlobs is asked a thousand digests at a time, mostly about what is known: its digests are taken as they
are spelled, and nothing is made of them. The answer to BatchReadBlobs is put together without copying the blobs
three times. Bytes in and out, no I/O; field numbers are those of ``proto/remote_execution.proto``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

_HASH = rb"\x0a\x40.{64}"
_SIZES = (rb"", *(rb"\x10[\x80-\xff]{%d}[\x00-\x7f]" % more for more in range(5)))
_LENGTHS = (66, *range(68, 73))
_DIGEST = re.compile(
    rb"\x12(?:%s)"
    % rb"|".join(rb"\x%02x" % length + _HASH + size for length, size in zip(_LENGTHS, _SIZES, strict=True)),
    re.DOTALL,
)
"""A digest in a FindMissingBlobsRequest as protobuf writes it: a hash of 64 characters, a size of up to 35 bits."""


class Asked(NamedTuple):
    """A FindMissingBlobsRequest. `digests`: as they are spelled there, by which they can be known again."""

    instance: str
    function: int
    digests: list[bytes]


def read_find_missing(raw: bytes) -> Asked | None:
    """What is asked, or None where it is spelled otherwise than protobuf usually does: then it is for protobuf.

    Of the hashes only the length is looked at.
    """
    start, end, instance, function = 0, len(raw), "", 0
    if raw[:1] == b"\x0a" and len(raw) > 1:
        if raw[1] > 0x7F:
            return None
        start = 2 + raw[1]
        try:
            instance = raw[2:start].decode()
        except UnicodeDecodeError:
            return None
    # Not the end of a digest: that is one of 64 characters or a number, whose bytes but the last are above 127.
    if end - start >= 2 and raw[-2] == 0x18 and raw[-1] < 0x80:
        function, end = raw[-1], end - 2
    digests = _DIGEST.findall(raw, start, end)
    # They lie side by side, and nothing else does.
    return Asked(instance, function, digests) if len(b"".join(digests)) == end - start else None


def write_varint(value: int) -> bytes:
    """A number that isn't negative, seven bits a byte, the lowest first."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_batch_read(blobs: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A BatchReadBlobsResponse with the contents of blobs: (64 digits of the hash, size, bytes). No status means OK."""
    parts: list[bytes] = []
    for hash_, size, data in blobs:
        before, after = _around_hash(size)
        parts += (before, hash_.encode(), after, data)
    return b"".join(parts)


@lru_cache(1 << 12)
def _around_hash(size: int) -> tuple[bytes, bytes]:
    """What stands before and behind the hash of a blob of that size, up to its bytes."""
    number = b"\x10" + write_varint(size) if size else b""
    after = number + (b"\x12" + write_varint(size) if size else b"")
    digest = b"\x0a" + bytes((66 + len(number),)) + b"\x0a\x40"  # 64 digits follow
    length = len(digest) + 64 + len(after) + size
    return b"\x0a" + write_varint(length) + digest, after
