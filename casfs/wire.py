"""The kernel's FUSE protocol for a read-only file system: bytes to values and back, no I/O.

Layouts and numbers are those of ``include/uapi/linux/fuse.h`` (protocol 7.x,
little-endian as the machine is: the protocol has the byte order of the host).

A request is a header of 40 bytes and a body that depends on the opcode; a reply
is a header of 16 bytes (length, negative errno, the request's `unique`) and a
body. Decoding never trusts a length: what is cut short raises BadRequest.

The functions take and give plain integers and bytes instead of an object per
message: a session runs them for each upcall.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from typing import NamedTuple

from casfs.errors import BadRequest

MAJOR = 7
MINOR = 41
"""The newest minor version whose layouts are used here; the kernel takes the lower of both."""
OLDEST_MINOR = 31
"""Linux 5.4. An older kernel has other layouts; the fuse engine (libfuse) knows those."""

FOREVER = 1 << 30
"""Seconds an answer stays valid in the kernel's caches: until it is invalidated or forgotten."""


class Opcode(IntEnum):
    """What the kernel asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


OPCODES = 64
"""Opcodes lie below this: the length of a table of counters."""

NO_REPLY = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""Requests the kernel expects no answer to."""


class InitFlag(IntFlag):
    """Capabilities in INIT, as one 64-bit number: the upper half travels as `flags2`."""

    ASYNC_READ = 1 << 0
    READDIRPLUS = 1 << 13
    PARALLEL_DIROPS = 1 << 18
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class OpenFlag(IntFlag):
    """How the kernel shall treat an opened file."""

    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


class Notify(IntEnum):
    """Messages a session sends unasked; their code stands where a reply has its error."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    DELETE = 6
    RESEND = 7
    INC_EPOCH = 8
    PRUNE = 9


_IN_HEADER = struct.Struct("<IIQQ8xIH2x")  # without uid and gid: the kernel checks permissions itself
_OUT_HEADER = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIII")
_INIT_IN_EXT = struct.Struct("<IIIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
_ATTR = "QQQQQQIIIIIIIIII"
_ENTRY_OUT = struct.Struct("<QQQQII" + _ATTR)
_ATTR_OUT = struct.Struct("<QII" + _ATTR)
_OPEN_OUT = struct.Struct("<QIi")
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")
_DIRENT = struct.Struct("<QQII")
_DIRENT_PLUS = struct.Struct("<QQQQII" + _ATTR + "QQII")
_READ_IN = struct.Struct("<QQIIQII")
_OPEN_IN = struct.Struct("<II")
_RELEASE_IN = struct.Struct("<QIIQ")
_INTERRUPT_IN = struct.Struct("<Q")
_FORGET = struct.Struct("<Q")
_BATCH_FORGET = struct.Struct("<II")
_FORGET_ONE = struct.Struct("<QQ")
_NOTIFY_INODE = struct.Struct("<Qqq")
_NOTIFY_ENTRY = struct.Struct("<QII")
_NOTIFY_DELETE = struct.Struct("<QQII")
_NOTIFY_PRUNE = struct.Struct("<II8x")

IN_HEADER_BYTES = _IN_HEADER.size
OPEN_EXEC = 0x20
"""Among the flags of an OPEN: to execute the file. The kernel's own (FMODE_EXEC in ``linux/fs.h``)."""
_new_tuple = tuple.__new__
"""Makes a named tuple without the call of its own constructor in between: half the time, once an upcall."""
RESENT = 1 << 63
"""In `unique`: the request was read before, by a daemon that is gone."""


class Request(NamedTuple):
    """One message from the kernel; `unique` names it in the answer, `node` is what it is about."""

    opcode: int
    unique: int
    node: int
    pid: int
    body: bytes


def decode_request(message: bytes) -> Request:
    """Split a message into its header's fields and its body. Raises BadRequest."""
    if len(message) < IN_HEADER_BYTES:
        raise BadRequest(f"a request of {len(message)} bytes: the header alone has {IN_HEADER_BYTES}")
    length, opcode, unique, node, pid, extension = _IN_HEADER.unpack_from(message)
    end = length - 8 * extension
    if length != len(message) or end < IN_HEADER_BYTES:
        raise BadRequest(f"a request of {len(message)} bytes says it has {length}")
    return _new_tuple(Request, (opcode, unique, node, pid, message[IN_HEADER_BYTES:end]))


def thread_of(message: bytes) -> int:
    """The id of the thread that a request is for: what its header calls a pid. 0 for what is too short for one."""
    return _IN_HEADER.unpack_from(message)[4] if len(message) >= IN_HEADER_BYTES else 0


@dataclass(frozen=True, slots=True)
class InitRequest:
    """What the kernel offers when a mount begins."""

    major: int
    minor: int
    max_readahead: int
    flags: InitFlag


def decode_init(body: bytes) -> InitRequest:
    """Raises BadRequest."""
    _need(body, _INIT_IN, "INIT")
    major, minor, max_readahead, flags = _INIT_IN.unpack_from(body)
    if flags & InitFlag.INIT_EXT and len(body) >= _INIT_IN_EXT.size:
        flags |= _INIT_IN_EXT.unpack_from(body)[4] << 32
    return InitRequest(major, minor, max_readahead, InitFlag(flags))


@dataclass(frozen=True, slots=True)
class InitReply:
    """What the session takes of the offer; sizes in bytes."""

    minor: int
    max_readahead: int
    flags: InitFlag
    max_background: int
    max_write: int
    max_pages: int
    max_stack_depth: int

    def without(self, flags: InitFlag) -> InitReply:
        """The same, but for these capabilities."""
        return replace(self, flags=self.flags & ~flags)


def encode_init(reply: InitReply) -> bytes:
    """The body of the answer to INIT."""
    return _INIT_OUT.pack(
        MAJOR,
        reply.minor,
        reply.max_readahead,
        reply.flags & 0xFFFF_FFFF,
        reply.max_background,
        reply.max_background * 3 // 4,
        reply.max_write,
        1,  # times are exact to the nanosecond
        reply.max_pages,
        0,
        reply.flags >> 32,
        reply.max_stack_depth,
    )


def encode_version() -> bytes:
    """The body of the answer to an INIT of a newer major version: the kernel then asks again with ours."""
    return _INIT_OUT.pack(MAJOR, MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def encode_reply(unique: int, body: bytes = b"") -> bytes:
    """A successful answer."""
    return _OUT_HEADER.pack(16 + len(body), 0, unique) + body


def encode_header(unique: int, size: int) -> bytes:
    """What stands before the `size` bytes of a successful answer's body."""
    return _OUT_HEADER.pack(16 + size, 0, unique)


def encode_error(unique: int, number: int) -> bytes:
    """A failed answer; `number` is a positive errno."""
    return _OUT_HEADER.pack(16, -number, unique)


def encode_entry(unique: int, node: int, mode: int, size: int, mtime_ns: int, nlink: int, uid: int, gid: int) -> bytes:
    """The answer to LOOKUP, valid forever; `node` is the inode number too."""
    seconds, nanos = divmod(mtime_ns, 1_000_000_000)
    return _OUT_HEADER.pack(144, 0, unique) + _ENTRY_OUT.pack(
        node, 0, FOREVER, FOREVER, 0, 0,
        node, size, (size + 511) >> 9, seconds & _U64, seconds & _U64, seconds & _U64,
        nanos, nanos, nanos, mode, nlink, uid, gid, 0, 4096, 0,
    )  # fmt: skip


def decode_entry(reply: bytes) -> int:
    """The node that an answer to LOOKUP names; 0 where there is none, or the answer is an error."""
    return int.from_bytes(reply[16:24], "little")


def forget_entry(reply: bytes) -> bytes:
    """The same answer to LOOKUP, but that the kernel has to ask for the name again. Attributes stay valid."""
    return reply if len(reply) == 16 else reply[:32] + bytes(8) + reply[40:]


def encode_no_entry(unique: int) -> bytes:
    """The answer to LOOKUP of a name that doesn't exist, which the kernel remembers."""
    return _OUT_HEADER.pack(144, 0, unique) + _NO_ENTRY


_NO_ENTRY = _ENTRY_OUT.pack(0, 0, FOREVER, 0, *([0] * 18))
_U64 = (1 << 64) - 1


def encode_attr(unique: int, node: int, mode: int, size: int, mtime_ns: int, nlink: int, uid: int, gid: int) -> bytes:
    """The answer to GETATTR, valid forever."""
    seconds, nanos = divmod(mtime_ns, 1_000_000_000)
    return _OUT_HEADER.pack(120, 0, unique) + _ATTR_OUT.pack(
        FOREVER, 0, 0,
        node, size, (size + 511) >> 9, seconds & _U64, seconds & _U64, seconds & _U64,
        nanos, nanos, nanos, mode, nlink, uid, gid, 0, 4096, 0,
    )  # fmt: skip


def encode_open(unique: int, handle: int, flags: int, backing_id: int = 0) -> bytes:
    """The answer to OPEN."""
    return _OUT_HEADER.pack(32, 0, unique) + _OPEN_OUT.pack(handle, flags, backing_id)


def decode_opened(reply: bytes) -> int | None:
    """The handle in an answer to OPEN, or None if that was an error."""
    if len(reply) < 16 + _OPEN_OUT.size or _OUT_HEADER.unpack_from(reply)[1]:
        return None
    handle: int = _OPEN_OUT.unpack_from(reply, 16)[0]
    return handle


def encode_statfs(unique: int, nodes: int, content: int) -> bytes:
    """The answer to STATFS of a full, read-only file system with so many nodes and bytes."""
    blocks = (content + 4095) >> 12
    return encode_reply(unique, _STATFS_OUT.pack(blocks, 0, 0, nodes, 0, 4096, 255, 4096, 0))


def decode_open(body: bytes) -> int:
    """The open(2) flags of an OPEN. Raises BadRequest."""
    _need(body, _OPEN_IN, "OPEN")
    flags: int = _OPEN_IN.unpack_from(body)[0]
    return flags


def decode_read(body: bytes) -> tuple[int, int, int]:
    """Handle, offset and size of a READ, READDIR or READDIRPLUS. Raises BadRequest."""
    _need(body, _READ_IN, "READ")
    handle, offset, size, *_ = _READ_IN.unpack_from(body)
    return handle, offset, size


def decode_release(body: bytes) -> int:
    """The handle of a RELEASE. Raises BadRequest."""
    _need(body, _RELEASE_IN, "RELEASE")
    handle: int = _RELEASE_IN.unpack_from(body)[0]
    return handle


def decode_interrupt(body: bytes) -> int:
    """The `unique` of the request that nobody waits for any more. Raises BadRequest."""
    _need(body, _INTERRUPT_IN, "INTERRUPT")
    unique: int = _INTERRUPT_IN.unpack_from(body)[0]
    return unique


def decode_forget(body: bytes) -> int:
    """How many lookups a FORGET takes back."""
    _need(body, _FORGET, "FORGET")
    lookups: int = _FORGET.unpack_from(body)[0]
    return lookups


def decode_forgotten(body: bytes) -> list[tuple[int, int]]:
    """The node ids of a BATCH_FORGET, each with how many lookups of it are taken back."""
    _need(body, _BATCH_FORGET, "BATCH_FORGET")
    count, _ = _BATCH_FORGET.unpack_from(body)
    if len(body) < _BATCH_FORGET.size + count * _FORGET_ONE.size:
        raise BadRequest(f"BATCH_FORGET: {len(body)} bytes for {count} nodes")
    return list(_FORGET_ONE.iter_unpack(body[_BATCH_FORGET.size :][: count * _FORGET_ONE.size]))


def decode_name(body: bytes) -> bytes:
    """The name of a LOOKUP: what stands before the terminating NUL. Raises BadRequest."""
    if body.find(0) != len(body) - 1 or len(body) < 2:
        raise BadRequest("a name that doesn't end in its only NUL")
    return body[:-1]


class DirectoryPage:
    """The answer to one READDIR or READDIRPLUS as it fills up, at most `size` bytes.

    A cookie is where the kernel goes on after an entry; of `mode`, a listing without attributes shows the type.
    """

    __slots__ = ("_parts", "_room")

    def __init__(self, size: int) -> None:
        self._room = size
        self._parts: list[bytes] = []

    def add_name(self, node: int, cookie: int, mode: int, name: bytes) -> bool:
        """Add an entry without attributes; False, and nothing added, when it doesn't fit."""
        return self._add(_DIRENT.pack(node, cookie, len(name), mode >> 12), name)

    def add_bare(self, node: int, cookie: int, mode: int, name: bytes) -> bool:
        """Add an entry to a READDIRPLUS that the kernel shall not enter in its cache (``.`` and ``..``)."""
        return self._add(_BARE + _DIRENT.pack(node, cookie, len(name), mode >> 12), name)

    def add_entry(
        self,
        cookie: int,
        name: bytes,
        node: int,
        mode: int,
        size: int,
        mtime_ns: int,
        nlink: int,
        uid: int,
        gid: int,
    ) -> bool:
        """Add an entry with its attributes; False, and nothing added, when it doesn't fit."""
        seconds, nanos = divmod(mtime_ns, 1_000_000_000)
        seconds &= _U64
        entry = _DIRENT_PLUS.pack(
            node, 0, FOREVER, FOREVER, 0, 0,
            node, size, (size + 511) >> 9, seconds, seconds, seconds,
            nanos, nanos, nanos, mode, nlink, uid, gid, 0, 4096, 0,
            node, cookie, len(name), mode >> 12,
        )  # fmt: skip
        return self._add(entry, name)

    def _add(self, entry: bytes, name: bytes) -> bool:
        room = self._room - len(entry) - (len(name) + 7 & ~7)
        if room < 0:
            return False
        self._room = room
        self._parts += (entry, name, _PADDING[len(name) & 7])
        return True

    def encode(self, unique: int) -> bytes:
        """The whole reply."""
        body = b"".join(self._parts)
        return _OUT_HEADER.pack(16 + len(body), 0, unique) + body


_BARE = bytes(_ENTRY_OUT.size)
_PADDING = [bytes(-n & 7) for n in range(8)]


def notify_inval_inode(node: int, offset: int = 0, length: int = 0) -> bytes:
    """Forget what is cached of an inode: its attributes, and its pages from `offset` on (negative: keep those)."""
    return _notify(Notify.INVAL_INODE, _NOTIFY_INODE.pack(node, offset, length))


def notify_inval_entry(parent: int, name: bytes) -> bytes:
    """Forget that a name stands for something, or for nothing."""
    return _notify(Notify.INVAL_ENTRY, _NOTIFY_ENTRY.pack(parent, len(name), 0) + name + b"\0")


def notify_delete(parent: int, child: int, name: bytes) -> bytes:
    """A name was removed: tell watchers, and forget it, as if it had been deleted through the mount."""
    return _notify(Notify.DELETE, _NOTIFY_DELETE.pack(parent, child, len(name), 0) + name + b"\0")


def notify_resend() -> bytes:
    """Send again what an earlier daemon read and did not answer."""
    return _notify(Notify.RESEND, b"")


def notify_inc_epoch() -> bytes:
    """Everything cached so far is to be looked up again (Linux ≥ 6.16)."""
    return _notify(Notify.INC_EPOCH, b"")


def notify_prune(nodes: list[int]) -> bytes:
    """Drop unused inodes from the kernel's caches (Linux ≥ 6.18)."""
    return _notify(Notify.PRUNE, _NOTIFY_PRUNE.pack(len(nodes), 0) + struct.pack(f"<{len(nodes)}Q", *nodes))


def _notify(code: Notify, body: bytes) -> bytes:
    return _OUT_HEADER.pack(16 + len(body), code, 0) + body


def _need(body: bytes, layout: struct.Struct, name: str) -> None:
    if len(body) < layout.size:
        raise BadRequest(f"a {name} with a body of {len(body)} bytes: {layout.size} are needed")
