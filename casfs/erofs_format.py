"""The records of an EROFS image: superblock, inodes, directory blocks, the xattrs of a metadata layer.

No I/O and no state: values in, bytes out, from any thread. Which records there
are, and where, is `casfs.erofs`. The format is that of fs/erofs/erofs_fs.h in
Linux, and only what Linux 5.15 and all later ones read: 4 KiB blocks, nothing
compressed, chunk-based files.

    nid        where an inode is: its position in the image / 32
    compact    inode of 32 bytes: time that of the superblock, size and links of 32 and 16 bits
    extended   inode of 64 bytes, for all others
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

BLOCK = 4096
SLOT = 32
SUPERBLOCK_AT = 1024
DIRENT = 12

LINK_MAX_COMPACT = (1 << 16) - 1
SIZE_MAX_COMPACT = (1 << 32) - 1
COMPACT, EXTENDED = 32, 64

PLAIN, INLINE, CHUNKS = 0, 2, 4
"""Where an inode's bytes are: in blocks; in blocks and the rest behind the inode; where chunk pointers say."""

REGULAR_FILE, DIRECTORY, SYMLINK = 1, 2, 7
"""The kinds that a directory's entries have."""

_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
_MAGIC = 0xE0F5E1E2
_BLOCK_BITS = 12
_COMPAT_MTIME = 2
_INCOMPAT_CHUNKED_FILE = 4

_COMPACT = struct.Struct("<HHHHIIIIHHI")
_EXTENDED = struct.Struct("<HHHHQIIIIQII16x")
_U64 = (1 << 64) - 1
_SECOND = 1_000_000_000

_CHUNK_BITS = 31
CHUNK = BLOCK << _CHUNK_BITS
"""8 TiB, the largest there can be, as each chunk costs a pointer."""
_NO_CHUNK = b"\xff\xff\xff\xff"

_XATTR_HEADER = struct.Struct("<IB7xI")  # name filter, number of shared xattrs, and here always one of them
_XATTR_HEADER_BYTES = 12
_XATTR = struct.Struct("<BBH")
_XATTR_INDEX = {"user": 1, "trusted": 4}


def align(position: int, unit: int) -> int:
    """The first multiple of `unit` (a power of two) from `position` on."""
    return (position + unit - 1) & -unit


def encode_superblock(
    *, root: int, inodes: int, blocks: int, xattr_block: int, time_ns: int, uuid: bytes = bytes(16)
) -> bytes:
    """128 bytes. `root` is a nid below 65536, `time_ns` the time of compact inodes, from 1970 on."""
    seconds, nanoseconds = divmod(time_ns, _SECOND)
    return _SUPERBLOCK.pack(
        *(_MAGIC, 0, _COMPAT_MTIME, _BLOCK_BITS, 0, root, inodes, seconds, nanoseconds, blocks, 0, xattr_block),
        *(uuid, b"", _INCOMPAT_CHUNKED_FILE, 0, 0, 0, 0, 0, 0, 0, 0),
    )


class InodeCodec:
    """Makes inodes of one owner; compact where they can be, for which their time must be `time_ns`."""

    def __init__(self, uid: int, gid: int, time_ns: int) -> None:
        self._owner = uid, gid
        self._time_ns = time_ns
        self._compact = uid < 1 << 16 and gid < 1 << 16

    def length(self, size: int, mtime_ns: int, links: int) -> int:
        """32 or 64: how long such an inode is."""
        if mtime_ns == self._time_ns and size <= SIZE_MAX_COMPACT and links <= LINK_MAX_COMPACT and self._compact:
            return COMPACT
        return EXTENDED

    def encode(
        self,
        length: int,
        number: int,
        mode: int,
        size: int,
        mtime_ns: int,
        layout: int = PLAIN,
        xattrs: int = 0,
        place: int = 0,
        links: int = 1,
    ) -> bytes:
        """An inode of that length. `xattrs` counts as on disk; `place` is a block's number or the form of chunks."""
        number &= 0xFFFF_FFFF
        if length == COMPACT:
            return _COMPACT.pack(layout << 1, xattrs, mode, links, size, 0, place, number, *self._owner, 0)
        seconds, nanoseconds = divmod(mtime_ns, _SECOND)
        return _EXTENDED.pack(
            *(layout << 1 | 1, xattrs, mode, 0, size, place, number),
            *(*self._owner, seconds & _U64, nanoseconds, links),
        )


class FileCodec:
    """Makes regular files with the two xattrs of a metadata layer.

    `metacopy`, the same for all files, is stored once, in the block of shared
    xattrs; a typical file then takes 160 bytes rather than 192.
    """

    def __init__(self, inodes: InodeCodec, metacopy: str, redirect: str) -> None:
        self.shared = _encode_xattr_name(metacopy, 0)
        self._inodes = inodes
        self._redirect = redirect
        self._frames: dict[int, _Frame] = {}

    def length(self, size: int, mtime_ns: int, redirect: int) -> int:
        """How many bytes such a file takes, with a redirect of so many bytes."""
        inode = self._inodes.length(size, mtime_ns, 1)
        if not size:
            return inode
        frame = self._frames.get(redirect) or self._make_frame(redirect)
        return (inode + frame.length + 4 * -(-size // CHUNK) + SLOT - 1) & -SLOT

    def encode(self, number: int, mode: int, size: int, mtime_ns: int, redirect: bytes) -> bytes:
        """The file, filled up to a whole number of slots. An empty file has no xattrs: it is all there is."""
        length = self._inodes.length(size, mtime_ns, 1)
        if not size:
            return self._inodes.encode(length, number, mode, 0, mtime_ns)
        frame = self._frames.get(len(redirect)) or self._make_frame(len(redirect))
        inode = self._inodes.encode(length, number, mode, size, mtime_ns, CHUNKS, frame.units, _CHUNK_BITS)
        if size <= CHUNK:
            return b"".join((inode, frame.head, redirect, frame.rest))
        record = b"".join((inode, frame.head, redirect, frame.padding, _NO_CHUNK * -(-size // CHUNK)))
        return record + bytes(-len(record) % SLOT)

    def _make_frame(self, redirect: int) -> _Frame:
        head = _XATTR_HEADER.pack(0, 1, 0) + _encode_xattr_name(self._redirect, redirect)
        padding = bytes(-(len(head) + redirect) % 4)
        length = len(head) + redirect + len(padding)
        # Both kinds of inode are whole slots, so what fills up the last one is the same.
        rest = padding + _NO_CHUNK
        rest += bytes(-(length + len(_NO_CHUNK)) % SLOT)
        frame = _Frame((length - _XATTR_HEADER_BYTES) // 4 + 1, length, head, padding, rest)
        self._frames[redirect] = frame
        return frame


class _Frame(NamedTuple):
    """What is around a redirect of some length.

    The xattrs' length, in `units` as an inode has it and in bytes; what is
    before the redirect; what is after it, without and with one chunk pointer
    up to a whole slot.
    """

    units: int
    length: int
    head: bytes
    padding: bytes
    rest: bytes


def _encode_xattr_name(name: str, size: int) -> bytes:
    """An xattr up to its value of so many bytes."""
    space, _, rest = name.partition(".")
    return _XATTR.pack(len(rest), _XATTR_INDEX[space], size) + rest.encode()


def split_names(names: Sequence[bytes]) -> tuple[list[int], int]:
    """How a directory's names, in order, go into blocks: where each but the first begins; bytes of the last."""
    used = DIRENT * len(names) + sum(map(len, names))
    if used <= BLOCK:
        return [], used
    starts = []
    used = 0
    for position, name in enumerate(names):
        need = DIRENT + len(name)
        if used + need > BLOCK:
            starts.append(position)
            used = 0
        used += need
    return starts, used


def encode_directory(names: Sequence[bytes], nids: Sequence[int], kinds: bytes | bytearray) -> bytes:
    """A directory's blocks: all full but for the last, which ends with its last name."""
    starts, _ = split_names(names)
    blocks = []
    begin = 0
    for end in (*starts, len(names)):
        here = names[begin:end]
        count = len(here)
        head: list[int] = [0] * (3 * count)
        head[0::3] = nids[begin:end]
        head[1::3] = list(accumulate(map(len, here[:-1]), initial=DIRENT * count))
        head[2::3] = kinds[begin:end]
        block = _dirents(count).pack(*head) + b"".join(here)
        blocks.append(block if end == len(names) else block.ljust(BLOCK, b"\0"))
        begin = end
    return b"".join(blocks)


@cache
def _dirents(count: int) -> struct.Struct:
    # At most BLOCK // (DIRENT + 1) different ones.
    return struct.Struct("<" + "QHBx" * count)
