"""Metadata layers in tmpfs: a tree's names, sizes, modes and times, with no contents.

About 6 µs and 1 KiB of memory an entry, so for what is small; the layer lives
as long as a mount or a descriptor of it. Files show the mode, size and time
that `casfs.tree` shows.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from casfs.overlay import Family, new_tmpfs, redirect_of, write_file
from casfs.tree import FIXED_MTIME_NS, shown
from store.entries import DirectoryEntry, SymlinkEntry
from store.index import View
from store.trees import Directory, Row, list_entries


@dataclass(slots=True)
class _Open:
    """A directory that is being filled: its descriptor, and its subdirectories that are empty yet."""

    descriptor: int
    subdirectories: list[Row]


def write_tmpfs(view: View, root: Directory, family: Family) -> int:
    """A new tmpfs with the metadata of a tree; a descriptor of its root.

    Raises MissingCapability for a file by reference: its bytes are in no blob
    directory. OSError where memory is short.
    """
    top = new_tmpfs()
    stack: list[_Open] = []
    try:
        # fsmount(2) gives an O_PATH descriptor, which can't be changed.
        writable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top)
        stack.append(_fill(view, writable, root.id, family))
        while stack:
            here = stack[-1]
            if here.subdirectories:
                row = here.subdirectories.pop()
                below = os.open(row.entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here.descriptor)
                stack.append(_fill(view, below, row.id, family))
            else:
                # Only now: making something in a directory changes its time.
                os.utime(here.descriptor, ns=(FIXED_MTIME_NS, FIXED_MTIME_NS))
                os.fchmod(here.descriptor, 0o555)
                os.close(here.descriptor)
                stack.pop()
    except BaseException:
        for here in stack:
            os.close(here.descriptor)
        os.close(top)
        raise
    return top


def _fill(view: View, descriptor: int, directory: int, family: Family) -> _Open:
    """Make what a directory has, its subdirectories empty."""
    subdirectories = []
    # From the last name on: tmpfs lists what was made last first.
    for row in reversed(list(list_entries(view, directory))):
        entry = row.entry
        mode, size, mtime_ns = shown(entry)
        if isinstance(entry, DirectoryEntry):
            os.mkdir(entry.name, 0o755, dir_fd=descriptor)
            subdirectories.append(row)
        elif isinstance(entry, SymlinkEntry):
            os.symlink(entry.target, entry.name, dir_fd=descriptor)
            os.utime(entry.name, ns=(mtime_ns, mtime_ns), dir_fd=descriptor, follow_symlinks=False)
        else:
            write_file(descriptor, entry.name, family, redirect_of(entry), size, stat.S_IMODE(mode), mtime_ns)
    return _Open(descriptor, subdirectories)
