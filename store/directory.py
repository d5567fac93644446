"""REAPI ``Directory`` messages as bytes, and back: a codec with no I/O.

Field numbers are those of ``build.bazel.remote.execution.v2`` (PROTOCOLS: they
are facts of the wire). Written by hand because a tree of a million entries is
encoded at a microsecond an entry, and because names are bytes here: a name
that is not UTF-8 makes a message that casfs reads back exactly, and that
other implementations refuse, as protobuf's ``string`` demands.

    Directory      1 files  2 directories  3 symlinks  5 node_properties
    FileNode       1 name  2 digest  4 is_executable  6 node_properties
    DirectoryNode  1 name  2 digest
    SymlinkNode    1 name  2 target  4 node_properties
    Digest         1 hash (hexadecimal text)  2 size_bytes
    NodeProperties 1 properties {1 name 2 value}  2 mtime {1 seconds 2 nanos}  3 unix_mode

A by-reference file is a FileNode with no digest and a property named
``casfs.reference``, so that it takes part in the digest of its directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise

from store.digest import Digest, DigestFunction, parse_hash
from store.entries import (
    DirectoryEntry,
    Entry,
    FileEntry,
    ReferenceEntry,
    Stamp,
    SymlinkEntry,
    check_name,
    check_stamp,
    check_target,
    check_time,
    printable,
)
from store.errors import BadDigest, BadName, BadTree

_REFERENCE = b"casfs.reference"
_REFERENCE_VALUE = re.compile(rb"(\d{1,20}):(\d{1,20}):(\d{1,20}):(-?\d{1,20}):(-?\d{1,20}):(/[^\0]*)", re.DOTALL)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@lru_cache(1 << 14)
def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(tag: bytes, payload: bytes) -> bytes:
    return tag + _varint(len(payload)) + payload


def _digest(digest: Digest) -> bytes:
    encoded = b"\n\x40" + digest.hash.hex().encode()
    return encoded + b"\x10" + _varint(digest.size) if digest.size else encoded


def _mtime(mtime_ns: int) -> bytes:
    seconds, nanos = divmod(mtime_ns, 1_000_000_000)
    stamp = b"\x08" + _varint(seconds % (1 << 64)) if seconds else b""
    return _field(b"\x12", stamp + (b"\x10" + _varint(nanos) if nanos else b""))


def _reference(entry: ReferenceEntry) -> bytes:
    value = b":".join(str(n).encode() for n in entry.stamp) + b":" + entry.path
    return _field(b"\n", _field(b"\n", _REFERENCE) + _field(b"\x12", value))


def _file(entry: FileEntry | ReferenceEntry) -> bytes:
    node = b"\n" + _varint(len(entry.name)) + entry.name
    if isinstance(entry, FileEntry):
        digest = _digest(entry.digest)
        node += b"\x12" + _varint(len(digest)) + digest
        properties = b"" if entry.mtime_ns is None else _mtime(entry.mtime_ns)
    else:
        properties = _reference(entry)
    if entry.executable:
        node += b"\x20\x01"
    if properties:
        node += _field(b"\x32", properties)
    return b"\n" + _varint(len(node)) + node


def encode_directory(entries: Iterable[Entry]) -> bytes:
    """The canonical message of a directory: REAPI wants each kind sorted by name.

    The entries may come in any order; names must have been checked.
    """
    files: list[Entry] = []
    directories: list[DirectoryEntry] = []
    symlinks: list[SymlinkEntry] = []
    for entry in entries:
        if isinstance(entry, DirectoryEntry):
            directories.append(entry)
        elif isinstance(entry, SymlinkEntry):
            symlinks.append(entry)
        else:
            files.append(entry)
    # An entry's first field is its name, names are distinct: tuples sort by name.
    out = [_file(e) for e in sorted(files) if not isinstance(e, DirectoryEntry | SymlinkEntry)]
    for directory in sorted(directories):
        out.append(_field(b"\x12", _field(b"\n", directory.name) + _field(b"\x12", _digest(directory.digest))))
    for link in sorted(symlinks):
        node = _field(b"\n", link.name) + _field(b"\x12", link.target)
        if link.mtime_ns is not None:
            node += _field(b"\x22", _mtime(link.mtime_ns))
        out.append(_field(b"\x1a", node))
    return b"".join(out)


def decode_directory(message: bytes, function: DigestFunction) -> list[Entry]:
    """The entries of a message, sorted by name over all kinds.

    `function` is what the digests inside are made with: a message doesn't say.
    Raises BadTree for bytes that are no Directory, for names or digests that
    can't be, and for a name that is there twice.
    """
    try:
        nodes = [(number, payload) for number, payload in _fields(message) if number in (1, 2, 3)]
        entries = [_decode_node(number, payload, function) for number, payload in nodes]
    except (BadName, BadDigest, ValueError, IndexError) as error:
        raise BadTree(f"not a valid Directory message: {error}") from error
    entries.sort(key=lambda entry: entry.name)
    for one, other in pairwise(entries):
        if one.name == other.name:
            raise BadTree(f"not a valid Directory message: {printable(one.name)} is in it twice")
    return entries


def _decode_node(number: int, payload: bytes | int, function: DigestFunction) -> Entry:
    name, digest, second, properties, executable = b"", None, b"", b"", False
    for inner, value in _fields(_as_bytes(payload)):
        if inner == 1:
            name = _as_bytes(value)
        elif inner == 2:
            second = _as_bytes(value)
        elif inner == 4 and number == 1:
            executable = bool(value)
        elif inner == (4 if number == 3 else 6):
            properties = _as_bytes(value)
    check_name(name, "entry")
    mtime_ns, reference = _decode_properties(properties) if properties else (None, None)
    if number == 3:
        check_target(second, f"symlink {printable(name)}")
        return SymlinkEntry(name, second, mtime_ns)
    if number == 1 and reference is not None:
        path, stamp = _decode_reference(reference)
        return ReferenceEntry(name, path, stamp, executable)
    digest = _decode_digest(second, function)
    return DirectoryEntry(name, digest) if number == 2 else FileEntry(name, digest, executable, mtime_ns)


def _decode_digest(payload: bytes, function: DigestFunction) -> Digest:
    hexadecimal, size = "", 0
    for number, value in _fields(payload):
        if number == 1:
            hexadecimal = _as_bytes(value).decode("ascii", "replace")
        elif number == 2 and isinstance(value, int):
            size = value
    if size >= 1 << 63:
        raise BadDigest(f"the size of {hexadecimal} is negative")
    return Digest(function, parse_hash(hexadecimal), size)


def _decode_properties(payload: bytes) -> tuple[int | None, bytes | None]:
    mtime_ns, reference = None, None
    for number, value in _fields(payload):
        if number == 1:
            pair = dict(_fields(_as_bytes(value)))
            if pair.get(1) == _REFERENCE:
                reference = _as_bytes(pair.get(2, b""))
        elif number == 2:
            stamp = dict(_fields(_as_bytes(value)))
            seconds, nanos = stamp.get(1, 0), stamp.get(2, 0)
            if isinstance(seconds, int) and isinstance(nanos, int):
                signed = seconds - (1 << 64) if seconds >> 63 else seconds
                mtime_ns = check_time(signed * 1_000_000_000 + nanos)
    return mtime_ns, reference


def _decode_reference(value: bytes) -> tuple[bytes, Stamp]:
    match = _REFERENCE_VALUE.fullmatch(value)
    if match is None:
        raise BadName(f"a reference is device:inode:size:mtime:ctime:/path, not {printable(value[:80])}")
    *numbers, path = match.groups()
    stamp = Stamp(*map(int, numbers))
    check_stamp(stamp)
    return path, stamp


def _as_bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of one protobuf message in order: number, and bytes or an unsigned integer."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _read_varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _BYTES:
            length, position = _read_varint(message, position)
            if length > end - position:
                raise ValueError(f"field {number} is cut short")
            yield number, message[position : position + length]
            position += length
        elif wire_type == _VARINT:
            value, position = _read_varint(message, position)
            yield number, value
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
            if position > end:
                raise ValueError(f"field {number} is cut short")
        else:
            raise ValueError(f"field {number} has wire type {wire_type}")


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
        shift += 7
        if shift > 63:
            raise ValueError("a varint of over 64 bits")
