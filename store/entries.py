"""The values a tree is made of: what one name in a directory stands for.

No I/O. Names and targets are bytes, as the kernel has them. The entries are
named tuples, not dataclasses, for the same reason as `Digest`: a tree of a
million files makes a million of them.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from store.digest import Digest
from store.errors import BadName

NAME_MAX = 255
"""Longest name in bytes: the kernel's NAME_MAX."""
PATH_MAX = 4096
"""Longest symlink target in bytes, with its terminating NUL: the kernel's PATH_MAX."""


class Stamp(NamedTuple):
    """What identifies one state of a file on the host; times in nanoseconds since the epoch."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp of a file as `os.stat` or `os.fstat` saw it."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class FileEntry(NamedTuple):
    """A regular file whose bytes are a blob. `mtime_ns` is None where the projection's fixed time is shown."""

    name: bytes
    digest: Digest
    executable: bool
    mtime_ns: int | None = None


class ReferenceEntry(NamedTuple):
    """A regular file that stays where it is: absolute host path, and its stamp when it was recorded."""

    name: bytes
    path: bytes
    stamp: Stamp
    executable: bool


class SymlinkEntry(NamedTuple):
    """A symbolic link; its target is shown as it is, whatever it points at."""

    name: bytes
    target: bytes
    mtime_ns: int | None = None


class DirectoryEntry(NamedTuple):
    """A subdirectory, named by the digest of its Directory message."""

    name: bytes
    digest: Digest


Entry = FileEntry | ReferenceEntry | SymlinkEntry | DirectoryEntry


_DOTS = (b".", b"..")


def check_name(name: bytes, where: str) -> None:
    """Raise BadName unless `name` can be one component of a path; `where` says whose it is."""
    if not name:
        raise BadName(f"{where}: an empty name")
    if name in _DOTS:
        raise BadName(f"{where}: the name {os.fsdecode(name)!r} can't be an entry")
    if b"/" in name or b"\0" in name:
        raise BadName(f"{where}: the name {printable(name)} has a slash or a NUL byte in it")
    if len(name) > NAME_MAX:
        raise BadName(f"{where}: the name {printable(name[:40])}… has {len(name)} bytes, {NAME_MAX} is the most")


def check_target(target: bytes, where: str) -> None:
    """Raise BadName unless `target` can be what a symbolic link says."""
    if not target or b"\0" in target or len(target) >= PATH_MAX:
        raise BadName(f"{where}: a symlink's target has 1 to {PATH_MAX - 1} bytes and no NUL")


def check_time(nanoseconds: int) -> int:
    """The time itself. Raises BadName unless it fits the 64 bits that a time takes in the index."""
    if not -1 << 63 <= nanoseconds < 1 << 63:
        raise BadName(f"{nanoseconds} is no time in nanoseconds: it has 64 bits")
    return nanoseconds


def check_stamp(stamp: Stamp) -> None:
    """Raise BadName unless a kernel could have said so."""
    if not (0 <= stamp.device < 1 << 64 and 0 <= stamp.inode < 1 << 64 and 0 <= stamp.size < 1 << 63):
        raise BadName(f"no file has the device, inode and size {stamp[:3]}")
    check_time(stamp.mtime_ns)
    check_time(stamp.ctime_ns)


def split_path(path: bytes, where: str) -> tuple[bytes, ...]:
    """The components of a relative path. Raises BadName for an absolute, empty or escaping one."""
    if path.startswith(b"/"):
        raise BadName(f"{where}: the path {printable(path)} is absolute; paths are relative to the root")
    components = tuple(path.split(b"/"))
    for component in components:
        # Only of a wrong one is it worth making the text that says where it stands.
        if not component or component in _DOTS or len(component) > NAME_MAX or b"\0" in component:
            check_name(component, f"{where}: path {printable(path[:200])}")
    return components


def printable(name: bytes) -> str:
    """A name or path for a message: quoted, with control and non-UTF-8 bytes escaped."""
    return repr(os.fsdecode(name).encode("utf-8", "backslashreplace").decode("utf-8"))


def path_order(path: bytes) -> bytes:
    """The sort key under which a directory comes right before its contents."""
    return path.replace(b"/", b"\0")
