"""Metadata layers in tmpfs: a tree's names, sizes, modes and times, with no contents.

About 6 µs and 1.2 KiB of memory an entry, so for what is small or new; the
layer lives as long as a mount or a descriptor of it. Nodes show what
`casfs.tree` shows of them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

from casfs.overlay import Family, new_tmpfs, redirect_of, write_file
from casfs.tree import FIXED_MTIME_NS, shown
from store.entries import DirectoryEntry, SymlinkEntry
from store.trees import Row

MEMORY_PER_NODE = 1200
"""Bytes that a node of a layer takes, which nothing can reclaim; measured (ARCHITECTURE.md)."""

_PATH_AT_ONCE = 4000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Part(NamedTuple):
    """One directory of a layer: its path from the root, and what is made in it, subdirectories empty."""

    path: bytes
    rows: list[Row]


def write_tmpfs(parts: Iterable[Part], family: Family) -> int:
    """A new tmpfs with these directories, of which the root is the first and each comes after its parent.

    Returns a descriptor of its root. Raises OSError where memory is short.
    """
    top = new_tmpfs()
    try:
        paths = []
        masked = _is_masked(top)
        for path, rows in parts:
            directory = _open_below(top, path)
            try:
                _fill(directory, rows, family, masked)
            finally:
                os.close(directory)
            paths.append(path)
        for path in reversed(paths):
            _finish(top, path)
    except BaseException:
        os.close(top)
        raise
    return top


def write_whiteouts(paths: Iterable[bytes]) -> int:
    """A new tmpfs that takes these paths away from what it is stacked over; a descriptor of its root. Raises OSError.

    A file has to be the topmost that says so: an overlay in between would take it for its own.
    """
    top = new_tmpfs()
    try:
        made = {b"": None}
        for path in paths:
            above, _, name = path.rpartition(b"/")
            for end in [at for at, byte in enumerate(above) if byte == 0x2F] + [len(above)]:
                if above[:end] not in made:
                    made[above[:end]] = None
                    inside = _open_below(top, above[:end].rpartition(b"/")[0])
                    os.mkdir(above[:end].rpartition(b"/")[2], 0o755, dir_fd=inside)
                    os.close(inside)
            directory = _open_below(top, above)
            try:
                os.mknod(name, stat.S_IFCHR, 0, dir_fd=directory)
            finally:
                os.close(directory)
        for path in reversed(made):
            _finish(top, path)
    except BaseException:
        os.close(top)
        raise
    return top


def _finish(top: int, path: bytes) -> None:
    """Give a directory its time and mode, when all is in it: making something in a directory changes its time."""
    directory = _open_below(top, path)
    os.utime(directory, ns=(FIXED_MTIME_NS, FIXED_MTIME_NS))
    os.fchmod(directory, 0o555)
    os.close(directory)


def _is_masked(top: int) -> bool:
    """Whether the umask takes what everybody may from the modes of new files; asking for it would change it."""
    os.mkdir("mask", 0o555, dir_fd=top)
    masked = os.stat("mask", dir_fd=top).st_mode & 0o777 != 0o555
    os.rmdir("mask", dir_fd=top)
    return masked


def _open_below(top: int, path: bytes) -> int:
    """A directory below `top`, which fsmount(2) opened with O_PATH; its path may be longer than the kernel takes."""
    if len(path) <= _PATH_AT_ONCE:
        return os.open(path or b".", _DIRECTORY, dir_fd=top)
    cut = path.rindex(b"/", 0, _PATH_AT_ONCE)
    above = os.open(path[:cut], _DIRECTORY, dir_fd=top)
    try:
        return _open_below(above, path[cut + 1 :])
    finally:
        os.close(above)


def _fill(directory: int, rows: list[Row], family: Family, masked: bool) -> None:
    # From the last name on: tmpfs lists what was made last first.
    for row in reversed(rows):
        entry = row.entry
        mode, size, mtime_ns = shown(entry)
        if isinstance(entry, DirectoryEntry):
            os.mkdir(entry.name, 0o755, dir_fd=directory)
        elif isinstance(entry, SymlinkEntry):
            os.symlink(entry.target, entry.name, dir_fd=directory)
            os.utime(entry.name, ns=(mtime_ns, mtime_ns), dir_fd=directory, follow_symlinks=False)
        else:
            write_file(directory, entry.name, family, redirect_of(entry), size, mode & 0o777, mtime_ns)
            if masked:
                os.chmod(entry.name, mode & 0o777, dir_fd=directory)
