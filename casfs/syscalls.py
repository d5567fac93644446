"""System calls for mounting that Python's `os` doesn't have. Thin: arguments in, OSError out.

Numbers are those of the generic table, the same on x86-64 and arm64 for all
calls made since Linux 5.1; structures are those of ``linux/mount.h``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from typing import NewType

BackingId = NewType("BackingId", int)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_MOVE, MS_REC = 4096, 8192, 16384
MS_PRIVATE, MS_SLAVE = 1 << 18, 1 << 19
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000

_SYS_OPEN_TREE, _SYS_OPENAT2, _SYS_MOUNT_SETATTR = 428, 437, 442
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_RESOLVE_CACHED = 0x20

_STATX_MNT_ID, _STATX_BYTES = 0x1000, 0x100
_STATX_MNT_ID_AT = 0x90  # linux/stat.h: struct statx

_IOC_BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
_IOC_BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)
_BACKING_MAP = struct.Struct("<iIQ")

_CAP_SYS_ADMIN = 21
_CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _fail(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def syscall(what: str, number: int, *arguments: object) -> int:
    """syscall(2); `what` is for the error's text."""
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise _fail(what)
    return result


def has_admin_capability() -> bool:
    """Whether this process has CAP_SYS_ADMIN in its user namespace: then it mounts by itself."""
    with open("/proc/self/status", "rb") as status:
        effective = next(line for line in status if line.startswith(b"CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_ADMIN & 1)


def is_initial_namespace() -> bool:
    """Whether this process's user namespace is the one of the machine, where file systems on images can be mounted."""
    with open("/proc/self/uid_map", "rb") as mapped:
        return mapped.read().split() == [b"0", b"0", b"4294967295"]


def mount(source: str, target: str | bytes, kind: str, flags: int, options: str) -> None:
    """mount(2)."""
    if _libc.mount(source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()):
        raise _fail(f"mount {os.fsdecode(target)}")


def umount(target: str | bytes, flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(os.fsencode(target), flags):
        raise _fail(f"umount {os.fsdecode(target)}")


def mount_number(descriptor: int) -> int:
    """The number of the mount that an open file is on, by which mountinfo has it: statx(2), Linux 5.8."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_MNT_ID, buffer):
        raise _fail("statx")
    return int.from_bytes(buffer.raw[_STATX_MNT_ID_AT : _STATX_MNT_ID_AT + 8], sys.byteorder)


def unshare(flags: int) -> None:
    """unshare(2); `os.unshare` comes with Python 3.12."""
    if _libc.unshare(flags):
        raise _fail("unshare")


def enter_user_namespace(namespace: int) -> None:
    """setns(2) into the user namespace of that descriptor; `os.setns` comes with Python 3.12."""
    if _libc.setns(namespace, CLONE_NEWUSER):
        raise _fail("setns")


def enter_network(namespace: int) -> None:
    """setns(2) into the network namespace of that descriptor, with this thread alone."""
    if _libc.setns(namespace, CLONE_NEWNET):
        raise _fail("setns")


def keep_capabilities() -> None:
    """Let the programs that this process becomes have its capabilities, in its user namespace: they become ambient."""
    data = (ctypes.c_uint32 * 6)()
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    if _libc.capget(header, data):
        raise _fail("capget")
    data[2], data[5] = data[1], data[4]  # inheritable: what is permitted
    if _libc.capset(header, data):
        raise _fail("capset")
    for number in range(64):
        if (data[1] | data[4] << 32) >> number & 1 and _libc.prctl(
            _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0
        ):
            raise _fail("prctl")


def clone_mount(
    place: int | str | bytes | os.PathLike[str], *, read_only: bool, recursive: bool = True, devices: bool = False
) -> int:
    """A descriptor of a copy of what is mounted at a path, or where a descriptor is, attached nowhere.

    The half of a bind mount; `recursive`: with all that is mounted below; `devices`: those can be opened. Needs
    CAP_SYS_ADMIN.
    """
    directory, path, at = (place, b"", _AT_EMPTY_PATH) if isinstance(place, int) else (-100, os.fsencode(place), 0)
    below = _AT_RECURSIVE if recursive else 0
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | at | below
    copy = syscall(f"open_tree {os.fsdecode(path)}", _SYS_OPEN_TREE, directory, ctypes.c_char_p(path), flags)
    wanted = _MOUNT_ATTR_NOSUID
    wanted |= 0 if devices else _MOUNT_ATTR_NODEV
    wanted |= _MOUNT_ATTR_RDONLY if read_only else 0
    attributes = struct.pack("<QQQQ", wanted, 0, 0, 0)
    flags = _AT_EMPTY_PATH | below
    try:
        syscall(f"mount_setattr {os.fsdecode(path)}", _SYS_MOUNT_SETATTR, copy, b"", flags, attributes, len(attributes))
    except OSError:
        os.close(copy)
        raise
    return copy


def clone_read_only(path: str | bytes | os.PathLike[str], *, recursive: bool = False) -> int:
    """A descriptor of a read-only copy of the mount that `path` is on, beginning there and attached nowhere.

    `recursive`: with all that is mounted below.
    What is opened below it can't be opened for writing, by nobody: the mount
    says no, whatever the permissions. Needs CAP_SYS_ADMIN.
    """
    return clone_mount(path, read_only=True, recursive=recursive)


def open_cached(path: str | bytes, flags: int, directory: int) -> int:
    """openat2(2) that fails with EAGAIN where looking the path up would have to wait for a disk."""
    how = struct.pack("<QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_CACHED)
    descriptor = _libc.syscall(_SYS_OPENAT2, directory, os.fsencode(path), how, len(how))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(descriptor)


def register_backing(device: int, descriptor: int) -> BackingId:
    """Hand a file to the kernel for passthrough on the connection `device`. Needs CAP_SYS_ADMIN."""
    # A bytearray: with bytes `ioctl` returns those and not the number, which is the id.
    return BackingId(fcntl.ioctl(device, _IOC_BACKING_OPEN, bytearray(_BACKING_MAP.pack(descriptor, 0, 0))))


def close_backing(device: int, backing_id: BackingId) -> None:
    """Take a backing id back; it must not be in use by an open file."""
    fcntl.ioctl(device, _IOC_BACKING_CLOSE, bytearray(struct.pack("<I", backing_id)))


def read_cached(descriptor: int, room: memoryview, offset: int) -> int | None:
    """Fill `room` from the page cache; how many bytes came, or None where that would wait for a disk.

    Fewer than there is room for means the end of the file, as in an answer to READ.
    """
    try:
        length = os.preadv(descriptor, (room,), offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        length = 0
    if length < len(room) and offset + length < os.fstat(descriptor).st_size:
        return None
    return length
