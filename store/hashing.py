"""Hashing what lies in files, with all cores where the function can.

Reads descriptors it is given; opens nothing by name. The hashers release the
interpreter lock, so several threads hash at once.
"""

from __future__ import annotations

import os

from store.digest import Digest, DigestFunction, Hasher

CHUNK = 2 << 20
"""Bytes read at a time: as fast as a mapping (it stays in the cache), and a file that
is cut short meanwhile is a short read and not a SIGBUS."""


_SHARE_FROM = 8 << 20
"""A file of this size is worth starting threads for."""


def hasher_for(function: DigestFunction, size: int) -> Hasher:
    """A hasher for so many bytes: BLAKE3 takes all cores where there is enough to share.

    By threads of its own: those that `blake3.AUTO` shares in a process are gone
    in its children, and a daemon that was forked would wait for them for ever.
    """
    if function is DigestFunction.BLAKE3 and size >= _SHARE_FROM and (cores := os.cpu_count() or 1) > 1:
        from blake3 import blake3

        return blake3(max_threads=cores)
    return function.new()


def hash_descriptor(descriptor: int, function: DigestFunction) -> Digest:
    """The digest of a file's whole content, whatever the descriptor's position.

    The size in the digest is what was read. Raises OSError.
    """
    size = os.fstat(descriptor).st_size
    hasher = hasher_for(function, size)
    buffer = memoryview(bytearray(min(size, CHUNK) or 1))
    position = 0
    while count := os.preadv(descriptor, [buffer], position):
        hasher.update(buffer[:count])
        position += count
    return Digest(function, hasher.digest(), position)
