"""Digests: which function, which 32 bytes, how many bytes of content.

Pure values and hashing of memory; reading files to hash them is `store.hashing`.
Everything here may be used from any thread.

A digest is written ``blake3:<64 hex>/<size>``. In the index it is keyed by one
byte for the function and the 32 bytes of the hash: the size follows from those.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import NamedTuple, Protocol

from store.errors import BadDigest

HASH_BYTES = 32
KEY_BYTES = 1 + HASH_BYTES


class Hasher(Protocol):
    """The part of hashlib's interface that both functions share."""

    def update(self, data: bytes | memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


class DigestFunction(IntEnum):
    """The functions casfs stores blobs under; the numbers are REAPI's ``DigestFunction.Value``."""

    SHA256 = 1
    BLAKE3 = 9

    @property
    def label(self) -> str:
        """The lower-case name, as in paths and texts."""
        return self.name.lower()

    def new(self) -> Hasher:
        """A hasher that has seen no bytes yet."""
        return _maker(self)()

    def of(self, data: bytes | memoryview) -> Digest:
        """The digest of bytes in memory."""
        hasher = self.new()
        hasher.update(data)
        return Digest(self, hasher.digest(), len(data))

    @classmethod
    def named(cls, label: str) -> DigestFunction:
        """The function of that name. Raises BadDigest."""
        try:
            return cls[label.upper()]
        except KeyError:
            known = ", ".join(f.label for f in cls)
            raise BadDigest(f"unknown digest function {label!r}: casfs knows {known}") from None


@cache
def _maker(function: DigestFunction) -> Callable[[], Hasher]:
    # Imported at first use: a command that hashes nothing, or with the other function, shall not load it.
    if function is DigestFunction.SHA256:
        from hashlib import sha256

        return sha256
    from blake3 import blake3

    return blake3


class Digest(NamedTuple):
    """Function, hash (32 bytes) and size in bytes of one blob.

    A named tuple and not a dataclass: trees make millions of them, and a
    tuple is built four times faster.
    """

    function: DigestFunction
    hash: bytes
    size: int

    @property
    def hex(self) -> str:
        """The hash in lower-case hexadecimal."""
        return self.hash.hex()

    @property
    def key(self) -> bytes:
        """33 bytes: the function's number, then the hash."""
        return bytes((self.function,)) + self.hash

    @classmethod
    def from_key(cls, key: bytes, size: int) -> Digest:
        """The inverse of `key`."""
        return cls(DigestFunction(key[0]), key[1:], size)

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read ``function:hex/size``. Raises BadDigest that says which part is wrong."""
        label, colon, rest = text.partition(":")
        if not colon:
            raise BadDigest(f"{text!r} is not a digest: write function:hex/size, as in blake3:{'00' * 2}…/12")
        function = DigestFunction.named(label)
        hexadecimal, slash, size = rest.partition("/")
        if not slash or not (size.isascii() and size.isdigit()):
            raise BadDigest(f"digest {text!r} has no size: it ends in /<bytes>")
        if int(size) >= 1 << 63:
            raise BadDigest(f"digest {text!r} has a size over 63 bits")
        return cls(function, parse_hash(hexadecimal), int(size))

    @property
    def is_empty_blob(self) -> bool:
        """Whether this is the blob of no bytes, which always exists and needs no upload."""
        return not self.size and self.hash == empty_hash(self.function)

    def __str__(self) -> str:
        return f"{self.function.label}:{self.hash.hex()}/{self.size}"


@cache
def empty_hash(function: DigestFunction) -> bytes:
    """The hash of no bytes."""
    return function.new().digest()


def parse_hash(hexadecimal: str) -> bytes:
    """32 bytes from 64 lower-case hexadecimal digits. Raises BadDigest."""
    try:
        hash_ = bytes.fromhex(hexadecimal)
    except ValueError:
        hash_ = b""
    # It would take upper case and spaces as well.
    if len(hash_) != HASH_BYTES or hash_.hex() != hexadecimal:
        raise BadDigest(f"{hexadecimal[:80]!r} is not a hash: 64 hexadecimal digits in lower case")
    return hash_
