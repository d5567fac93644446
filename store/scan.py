"""Looking at a directory of the host: which entries it has, and of what kind.

Only lists and stats; reading file contents is the ingest's. Symbolic links are
never followed. Single-threaded, iterative: a tree may be deeper than Python's
stack.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from store.entries import Stamp, SymlinkEntry, check_name, printable
from store.errors import BadInput, BadName


@dataclass(slots=True)
class ScannedFile:
    """A regular file: its name, its state, whether its owner may execute it."""

    name: bytes
    stamp: Stamp
    executable: bool


@dataclass(slots=True)
class ScannedDirectory:
    """What one directory holds; `path` is its absolute path on the host."""

    name: bytes
    path: bytes
    files: list[ScannedFile] = field(default_factory=list)
    symlinks: list[SymlinkEntry] = field(default_factory=list)
    directories: list[ScannedDirectory] = field(default_factory=list)

    def in_postorder(self) -> list[ScannedDirectory]:
        """This directory and all below, each after what it contains."""
        order = [self]
        for directory in order:
            order.extend(directory.directories)
        order.reverse()
        return order


Excluded = Callable[[bytes], bool]


def exclude_globs(globs: Sequence[str]) -> Excluded:
    """A test of relative paths against shell patterns.

    A pattern without a slash is compared with the last component (``*.pyc``,
    ``.git``), one with a slash with the whole relative path (``build/*``); ``*``
    also matches slashes. A slash at the end means nothing, one at the beginning
    only what is at the top. A directory that matches is not looked into.
    """
    globs = [glob.rstrip("/") for glob in globs]
    names = [fnmatch.translate(glob) for glob in globs if "/" not in glob]
    paths = [fnmatch.translate(glob.lstrip("/")) for glob in globs if "/" in glob]
    name_match = re.compile(os.fsencode("|".join(names))) if names else None
    path_match = re.compile(os.fsencode("|".join(paths))) if paths else None

    def excluded(path: bytes) -> bool:
        if name_match is not None and name_match.match(path.rpartition(b"/")[2]):
            return True
        return path_match is not None and path_match.match(path) is not None

    return excluded


def scan_directory(top: str | Path, excluded: Excluded, *, keep_mtime: bool = False) -> ScannedDirectory:
    """Everything below `top` but what is excluded.

    Raises BadInput naming the path for a socket, device or FIFO (exclude it to
    leave it out), for a `top` that is no directory, and for what can't be read.
    """
    root = ScannedDirectory(b"", os.path.realpath(os.fsencode(top)))
    if not os.path.isdir(root.path):
        raise BadInput(f"{os.fspath(top)} is not a directory")
    pending = [(root, b"")]
    while pending:
        directory, prefix = pending.pop()
        try:
            with os.scandir(directory.path) as listing:
                entries = sorted(listing, key=lambda e: e.name)
        except OSError as error:
            raise BadInput(f"can't read directory {printable(directory.path)}: {error.strerror}") from error
        for entry in entries:
            path = prefix + entry.name
            if excluded(path):
                continue
            try:
                _add(directory, entry, keep_mtime)
            except OSError as error:
                raise BadInput(f"can't read {printable(entry.path)}: {error.strerror}") from error
        for child in directory.directories:
            pending.append((child, prefix + child.name + b"/"))
    return root


def _add(directory: ScannedDirectory, entry: os.DirEntry[bytes], keep_mtime: bool) -> None:
    try:
        check_name(entry.name, printable(directory.path))
    except BadName as error:
        raise BadInput(str(error)) from error
    if entry.is_dir(follow_symlinks=False):
        directory.directories.append(ScannedDirectory(entry.name, entry.path))
        return
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode):
        directory.files.append(ScannedFile(entry.name, Stamp.of(status), bool(status.st_mode & 0o100)))
    elif stat.S_ISLNK(status.st_mode):
        mtime_ns = status.st_mtime_ns if keep_mtime else None
        directory.symlinks.append(SymlinkEntry(entry.name, os.readlink(entry.path), mtime_ns))
    else:
        raise BadInput(
            f"{printable(entry.path)} is a {describe_kind(status.st_mode)}: "
            "a tree has files, directories and symbolic links; leave it out with --exclude"
        )


def describe_kind(mode: int) -> str:
    """What a special file of that mode is called."""
    for test, name in (
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISFIFO, "FIFO"),
        (stat.S_ISBLK, "block device"),
        (stat.S_ISCHR, "character device"),
    ):
        if test(mode):
            return name
    return "special file"
