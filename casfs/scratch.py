"""Scratch directories of sandboxes: made, locked while their owner lives, removed, and cleared after a kill.

Each has ``lower`` (where the input root is mounted), ``upper`` and ``work``
(overlayfs's) and ``merged`` (what the sandbox sees). The lock is on the
directory itself: the kernel drops it when the owner ends, however that is, and
whoever opens a sandbox next removes what is unlocked. Any thread may use any
function here.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path

from casfs.errors import SandboxError
from store.sessions import make_locked_directory

_PREFIX = "sandbox-"


class Scratch:
    """A new scratch directory below `base`, which is made if need be; ours until `close`."""

    def __init__(self, base: Path) -> None:
        """Raises SandboxError where nothing can be made."""
        try:
            base.mkdir(parents=True, exist_ok=True)
            self.directory, self._lock = make_locked_directory(base, _new_name)
        except OSError as error:
            raise SandboxError(f"can't make a scratch directory in {base}: {error.strerror}") from error
        self.lower, self.upper, self.work, self.merged = (
            self.directory / name for name in ("lower", "upper", "work", "merged")
        )
        try:
            for path in (self.lower, self.upper, self.work, self.merged):
                path.mkdir(mode=0o755)
        except OSError as error:
            self.close()
            raise SandboxError(f"can't make a scratch directory in {base}: {error.strerror}") from error

    def is_full(self) -> bool:
        """Whether its disk has no room left, in bytes or in files; one page is room for nothing."""
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize <= 4096 or (status.f_files > 0 and status.f_favail == 0)

    def close(self) -> None:
        """Remove everything; nothing may be mounted in it any more. Harmless when repeated."""
        if self._lock >= 0:
            remove_tree(self.directory)
            os.close(self._lock)
            self._lock = -1


def _new_name() -> str:
    return f"{_PREFIX}{secrets.token_hex(8)}"


def clear_leftovers(base: Path) -> int:
    """Remove what dead owners left in `base`; returns how many directories that were."""
    cleared = 0
    for directory in base.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
