"""Scratch of sandboxes: directories made, locked while their owner lives, removed, and cleared after a kill.

A process that has sandboxes has one `ScratchSpace`, and in it a directory for
each: ``upper`` and ``work`` (overlayfs's) and ``merged`` (what the sandbox
sees). The lock is on the space's directory: the kernel drops it when the owner
ends, however that is, and whoever makes a space next removes what is unlocked.
Any thread may use any function here.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from casfs.errors import MissingCapability, SandboxError
from casfs.orphans import end_commands
from store.sessions import make_locked_directory

_PREFIX = "sandboxes-"


class Scratch:
    """The directory of one sandbox, by the names in it."""

    def __init__(self, base: Path, directory: Path) -> None:
        """Makes `directory`, somewhere in `base`. Raises SandboxError."""
        self.base = base
        self.directory = directory
        self.upper, self.work, self.merged = (directory / name for name in ("upper", "work", "merged"))
        self.lower = directory / "lower"
        """Where the input root is mounted by engines that need a place for it; made by them."""
        try:
            for path in (directory, self.upper, self.work, self.merged):
                os.mkdir(path, 0o755)
        except OSError as error:
            remove_tree(directory)
            raise _failed(base, error) from error

    def renew_work(self) -> None:
        """Make ``work`` empty again: overlayfs refuses one that a volatile mount has used, or tried to."""
        remove_tree(self.work)
        os.mkdir(self.work, 0o755)

    def is_full(self) -> bool:
        """Whether its disk has no room left, in bytes or in files; one page is room for nothing."""
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize <= 4096 or (status.f_files > 0 and status.f_favail == 0)

    def close(self) -> None:
        """Remove everything; nothing may be mounted in it any more. Harmless when repeated."""
        remove_tree(self.directory)


class ScratchSpace:
    """A directory of this process below `base`, which is made if need be; ours until `close`."""

    def __init__(self, base: Path) -> None:
        """Clears what dead owners left there. Raises SandboxError where nothing can be made."""
        self.base = base
        try:
            base.mkdir(parents=True, exist_ok=True)
            clear_leftovers(base)
            self.directory, self._lock = make_locked_directory(base, lambda: f"{_PREFIX}{os.urandom(8).hex()}")
        except OSError as error:
            raise _failed(base, error) from error
        self._numbers = count()

    def new(self) -> Scratch:
        """A directory for one more sandbox. Raises SandboxError."""
        return Scratch(self.base, self.directory / str(next(self._numbers)))

    def close(self) -> None:
        """Remove everything; harmless when repeated."""
        if self._lock >= 0:
            remove_tree(self.directory)
            os.close(self._lock)
            self._lock = -1


def _failed(base: Path, error: OSError) -> SandboxError:
    return SandboxError(f"can't make a scratch directory in {base}: {error.strerror}")


def clear_leftovers(base: Path) -> int:
    """Remove what dead owners left in `base`, and end what still runs there; returns how many directories that were."""
    cleared = 0
    for directory in base.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end_commands(directory)
            remove_tree(directory)
            cleared += 1
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
    return cleared


def remove_tree(top: Path) -> None:
    """Remove a directory and all below, as far as this user can; it may be deeper than Python's stack.

    Directories that keep even their owner out, as overlayfs's own ``work/work``
    does, are opened first.
    """
    directories = [os.fsencode(top)]
    for path in directories:
        with suppress(OSError):
            # Not in any case: it would change what is removed at once.
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                os.chmod(path, 0o700)
            with os.scandir(path) as listing:
                for item in listing:
                    if item.is_dir(follow_symlinks=False):
                        directories.append(item.path)
                    else:
                        os.unlink(item.path)
    for path in reversed(directories):
        with suppress(OSError):
            os.rmdir(path)


@contextmanager
def opened(*paths: Path) -> Iterator[list[int]]:
    """Descriptors of directories."""
    with ExitStack() as stack:
        descriptors = []
        for path in paths:
            descriptors.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            stack.callback(os.close, descriptors[-1])
        yield descriptors


def unusable(scratch: Scratch, error: OSError) -> MissingCapability:
    """Why overlayfs doesn't take a scratch directory."""
    return MissingCapability(
        f"overlayfs can't use {scratch.directory} as scratch ({error.strerror or os.strerror(error.errno or 0)}): it "
        "must be on a file system with user xattrs that is no overlay itself (ext4, XFS, btrfs, tmpfs of Linux 6.6), "
        "and without root Linux 5.11 is needed; --scratch names another place"
    )
