"""The calls the store needs that Python's `os` doesn't have.

Thin, no state. Raises OSError as `os` would.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602  # linux/fs.h; they take an int all the same
_FS_TOPDIR_FL = 0x00020000
_libc = ctypes.CDLL(None, use_errno=True)


def syncfs(descriptor: int) -> None:
    """Write everything of the file system that `descriptor` lies on to the disk, and wait for it."""
    if _libc.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def raise_open_files(most: int = sys.maxsize) -> int:
    """Let this process, and what it starts, have as many files open as it may, or so many: 1,024 are usual.

    Returns how many. The hard limit is a number on Linux: at most fs.nr_open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, min(most, hard))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):
        return soft
    return wanted


def fsync_path(path: str | Path) -> None:
    """Make a file's content, or a directory's names, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def opened_directory(path: str | Path) -> Iterator[int]:
    """A descriptor of a directory, for names relative to it."""
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def spread_directories(directory: str) -> None:
    """Ask ext4 to give each directory made in this one a part of the disk of its own; elsewhere nothing happens.

    ext4 passes over inodes that were freed in the last minutes, one by one:
    where much is deleted, making a file beside what was deleted takes twenty
    times as long as elsewhere (0.5 ms in place of 0.025).
    """
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = bytearray(8)
            fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
            wanted = int.from_bytes(flags[:4], sys.byteorder) | _FS_TOPDIR_FL
            fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, wanted.to_bytes(4, sys.byteorder) + bytes(4))
        finally:
            os.close(descriptor)


def try_clone(source: int, target: int) -> bool:
    """Make `target` share the blocks of `source` (a reflink); False where the file system can't."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
            return False
        raise
    return True


def clone_or_copy(source: int, target: int) -> None:
    """Fill the empty file `target` with the content of `source`: a reflink, else a copy in the kernel."""
    if not try_clone(source, target):
        copy(source, target)


def copy(source: int, target: int) -> None:
    """Fill the empty file `target` with the content of `source`, in the kernel where it can."""
    copied = 0
    while True:
        try:
            count = os.copy_file_range(source, target, 1 << 30, copied, copied)
        except OSError as error:
            # Between some file systems (and from some special ones) the kernel can't.
            if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            copy_unshared(source, target, copied)
            return
        if not count:
            # Files whose size is unknown to the kernel (procfs) claim to end at once.
            copy_unshared(source, target, copied)
            return
        copied += count


def copy_unshared(source: int, target: int, position: int = 0) -> None:
    """Fill `target` from `position` on with blocks of its own: copy_file_range(2) shares them on btrfs and XFS."""
    while data := os.pread(source, 1 << 20, position):
        view = memoryview(data)
        while view:
            written = os.pwrite(target, view, position)
            position += written
            view = view[written:]
