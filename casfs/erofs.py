"""EROFS images of trees: names, sizes, modes, times, and for each file's bytes the path of its blob.

Such an image is the lower layer of an overlayfs whose data-only layer is the
blob directory. This is the writer, without I/O: the rows of directories in,
bytes out, in order. Equal trees make equal images. `casfs.images` keeps them.

It goes over the tree twice. The first time it finds where everything will be,
because a directory names the places of its subdirectories, which come after
it. In memory are eight bytes a directory, and of one directory at a time the
names and places. An image looks so:

    superblock │ the shared xattr, the root's inode │ group of the root │ groups of the rest, in preorder
    group: files and symlinks │ the directory's blocks │ the directory's inode, with what fills no block

An inode with bytes behind it may not cross a block's end. The root's inode
comes first, as its nid has but 16 bits; so what its group has are whole blocks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from casfs.erofs_format import (
    BLOCK,
    DIRECTORY,
    EXTENDED,
    INLINE,
    PLAIN,
    REGULAR_FILE,
    SLOT,
    SUPERBLOCK_AT,
    SYMLINK,
    FileCodec,
    InodeCodec,
    align,
    encode_directory,
    encode_superblock,
    split_names,
)
from casfs.overlay import Family
from casfs.tree import FIXED_MTIME_NS, shown
from store.entries import DirectoryEntry, FileEntry, ReferenceEntry, SymlinkEntry
from store.trees import Row

RowsOf = Callable[[int], Iterable[Row]]
"""The rows of the directory with that id, in order of name; the same at each call."""
RedirectOf = Callable[[FileEntry | ReferenceEntry], bytes]
"""Where a file's bytes are: absolute path in the data-only layers. May raise, for what can't be shown.

Asked twice a file, and so a third of the time that an image takes unless it is quick.
"""

_PIECE = 1 << 18
_XATTR_BLOCK = 1
_ROOT_AT = _XATTR_BLOCK * BLOCK + SLOT
_DOTS = (b".", b"..")
_NO_BLOCK = 0xFFFF_FFFF
_DIRECTORY_MODE = 0o40555
_CHANGED = "the rows of a tree changed while its image was written: keep it from being collected meanwhile"


def write_image(
    root: int,
    rows_of: RowsOf,
    redirect_of: RedirectOf,
    family: Family,
    *,
    uid: int = 0,
    gid: int = 0,
    uuid: bytes = bytes(16),
) -> Iterator[bytes]:
    """The image of the tree below the directory with the id `root`, in pieces of about 256 KiB.

    Every node belongs to `uid` and `gid`. A symlink is its target, and a file
    that is not empty has the xattrs of the family. About 6 µs and 180 bytes an
    entry. Raises RuntimeError when the second pass finds other rows than the first.
    """
    records = _Writer(root, rows_of, redirect_of, family, InodeCodec(uid, gid, FIXED_MTIME_NS)).records(uuid)
    return _gather(records)


def _gather(records: Iterable[bytes]) -> Iterator[bytes]:
    piece: list[bytes] = []
    length = 0
    for record in records:
        piece.append(record)
        length += len(record)
        if length >= _PIECE:
            yield b"".join(piece)
            piece.clear()
            length = 0
    yield b"".join(piece)


@dataclass(slots=True)
class _Plan:
    """What the first pass finds: each directory's nid by its number (see `_preorder`), the root's inode, totals."""

    nids: array[int]
    root: bytes = b""
    inodes: int = 0
    end: int = 0


class _Writer:
    """One image; `_position` is where the next byte goes, `_number` the number of the last inode."""

    def __init__(self, root: int, rows_of: RowsOf, redirect_of: RedirectOf, family: Family, inodes: InodeCodec) -> None:
        self._root = root
        self._rows_of = rows_of
        self._redirect_of = redirect_of
        self._inodes = inodes
        self._files = FileCodec(inodes, family.value.metacopy, family.value.redirect)
        self._position = _ROOT_AT + EXTENDED
        self._number = 0

    def records(self, uuid: bytes) -> Iterator[bytes]:
        """The image, a record at a time."""
        plan = self._plan()
        superblock = encode_superblock(
            root=_ROOT_AT // SLOT,
            inodes=plan.inodes,
            blocks=plan.end // BLOCK,
            xattr_block=_XATTR_BLOCK,
            time_ns=FIXED_MTIME_NS,
            uuid=uuid,
        )
        yield (bytes(SUPERBLOCK_AT) + superblock).ljust(_XATTR_BLOCK * BLOCK, b"\0")
        yield self._files.shared.ljust(SLOT, b"\0")
        yield plan.root
        below: list[int] = []
        for directory, index, parent, first in _preorder(self._root, below):
            contents = _Contents()
            yield from self._leaves(directory, below, plan.nids, first, contents)
            body = contents.encode(plan.nids[index], plan.nids[parent])
            links = 2 + len(below)
            if not index:  # its inode was the first
                yield from self._fill(_place(self._position, len(body), 0), b"", body)
                continue
            self._number += 1
            length = self._inodes.length(len(body), FIXED_MTIME_NS, links)
            place = _place(self._position, len(body), length)
            if place.inode // SLOT != plan.nids[index]:
                raise RuntimeError(_CHANGED)
            inode = self._encode_directory(length, self._number, len(body), place, links)
            yield from self._fill(place, inode, body)
        if align(self._position, BLOCK) != plan.end:
            raise RuntimeError(_CHANGED)
        yield bytes(-self._position % BLOCK)

    def _leaves(
        self, directory: int, below: list[int], nids: array[int], first: int, contents: _Contents
    ) -> Iterator[bytes]:
        """The files and symlinks of a directory; fills `contents`, and `below` for `_preorder`."""
        for row in self._rows_of(directory):
            entry = row.entry
            if isinstance(entry, DirectoryEntry):
                contents.add(entry.name, nids[first + len(below)], DIRECTORY)
                below.append(row.id)
                continue
            self._number = number = self._number + 1
            mode, size, mtime_ns = shown(entry)
            if isinstance(entry, SymlinkEntry):
                length = self._inodes.length(size, mtime_ns, 1)
                place = _place(self._position, size, length)
                contents.add(entry.name, place.inode // SLOT, SYMLINK)
                inode = self._inodes.encode(length, number, mode, size, mtime_ns, place.layout, 0, place.block)
                yield from self._fill(place, inode, entry.target)
            else:
                contents.add(entry.name, self._position // SLOT, REGULAR_FILE)
                record = self._files.encode(number, mode, size, mtime_ns, self._redirect_of(entry) if size else b"")
                self._position += len(record)
                yield record

    def _fill(self, place: _Place, inode: bytes, body: bytes) -> tuple[bytes, ...]:
        """What is from the position to the place's end, which is the position then."""
        in_blocks = len(body) - place.tail
        start, self._position = self._position, place.end
        return (
            bytes(place.blocks - start),
            body[:in_blocks].ljust(place.inode - place.blocks, b"\0"),
            inode,
            body[in_blocks:],
            bytes(place.end - place.inode - len(inode) - place.tail),
        )

    def _plan(self) -> _Plan:
        plan = _Plan(array("Q", [_ROOT_AT // SLOT]))
        position = self._position
        below: list[int] = []
        for directory, index, _, _ in _preorder(self._root, below):
            names = []
            for row in self._rows_of(directory):
                entry = row.entry
                names.append(entry.name)
                if isinstance(entry, DirectoryEntry):
                    below.append(row.id)
                    continue
                _, size, mtime_ns = shown(entry)
                if isinstance(entry, SymlinkEntry):
                    position = _place(position, size, self._inodes.length(size, mtime_ns, 1)).end
                else:
                    position += self._files.length(size, mtime_ns, len(self._redirect_of(entry)) if size else 0)
            plan.inodes += 1 + len(names) - len(below)
            plan.nids.frombytes(bytes(plan.nids.itemsize * len(below)))
            size = _directory_size(names)
            links = 2 + len(below)
            if index:
                place = _place(position, size, self._inodes.length(size, FIXED_MTIME_NS, links))
                plan.nids[index] = place.inode // SLOT
            else:
                place = _place(position, size, 0)
                plan.root = self._encode_directory(EXTENDED, 0, size, place, links)
            position = place.end
        plan.end = align(position, BLOCK)
        return plan

    def _encode_directory(self, length: int, number: int, size: int, place: _Place, links: int) -> bytes:
        return self._inodes.encode(
            length, number, _DIRECTORY_MODE, size, FIXED_MTIME_NS, place.layout, 0, place.block, links
        )


def _preorder(root: int, below: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """The directories of a tree: id, number, the parent's number, the number of the first subdirectory.

    The root is 0, and a directory's subdirectories take the next free numbers
    when it is visited, in their order. Whoever iterates puts their ids into
    `below` before going on.
    """
    pending = [(root, 0, 0)]
    count = 1
    while pending:
        directory, number, parent = pending.pop()
        below.clear()
        yield directory, number, parent, count
        pending.extend(reversed([(child, count + index, number) for index, child in enumerate(below)]))
        count += len(below)


class _Place(NamedTuple):
    """Where what has bytes goes: positions of its blocks, of its inode and of what comes next; bytes in no block."""

    blocks: int
    inode: int
    end: int
    tail: int

    @property
    def layout(self) -> int:
        return INLINE if self.tail else PLAIN

    @property
    def block(self) -> int:
        """The number of the first block, as an inode has it."""
        return self.blocks // BLOCK if self.blocks != self.inode else _NO_BLOCK


def _place(position: int, size: int, inode: int) -> _Place:
    """The place from `position` on for `size` bytes and their inode of that length, 0 if it is elsewhere."""
    if inode + size <= BLOCK - position % BLOCK and inode:
        return _Place(position, position, (position + inode + size + SLOT - 1) & -SLOT, size)
    full, tail = divmod(size, BLOCK)
    if tail and (not inode or inode + tail > BLOCK):
        full, tail = full + 1, 0
    blocks = align(position, BLOCK) if full else position
    at = blocks + full * BLOCK
    if at % BLOCK + inode + tail > BLOCK:
        at = align(at, BLOCK)
    return _Place(blocks if full else at, at, align(at + inode + tail, SLOT), tail)


def _directory_size(names: list[bytes]) -> int:
    for dots in _DOTS:
        names.insert(bisect_left(names, dots), dots)
    starts, last = split_names(names)
    return len(starts) * BLOCK + last


class _Contents:
    """The entries of a directory, as they come."""

    __slots__ = ("_kinds", "_names", "_nids")

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._nids: list[int] = []
        self._kinds = bytearray()

    def add(self, name: bytes, nid: int, kind: int) -> None:
        self._names.append(name)
        self._nids.append(nid)
        self._kinds.append(kind)

    def encode(self, own: int, parent: int) -> bytes:
        """The directory's bytes, of which an entry each is for itself and its parent."""
        for name, nid in zip(_DOTS, (own, parent), strict=True):
            at = bisect_left(self._names, name)
            self._names.insert(at, name)
            self._nids.insert(at, nid)
            self._kinds.insert(at, DIRECTORY)
        return encode_directory(self._names, self._nids, self._kinds)
