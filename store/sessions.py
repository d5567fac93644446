"""Private directories in ``STORE/tmp``, each locked while who made it lives.

A process that is killed leaves its directory behind and the kernel drops its
lock; the next start of any casfs finds it unlocked and removes it.

A name begins with the time in nanoseconds: collections spare what was used
since the oldest living session began.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from store.errors import NoSpace, StoreUnusable
from store.layout import Layout

SKEW_SECONDS = 60
"""So far apart two times may be without one of them being wrong: clocks are set, and machines share stores."""


class Session:
    """A new directory in ``tmp/``, ours until `close`, which removes it with all that is still in it."""

    def __init__(self, layout: Layout, *, spares: bool = True) -> None:
        """Raises NoSpace, or StoreUnusable where nothing can be made there.

        Without `spares` collections don't mind it: for a session that names
        nothing but what it brings, and may live as long as a server does.
        """
        with translated(layout, "beginning to add"):
            try:
                self.directory, self._lock = make_locked_directory(
                    layout.tmp, _new_name if spares else _new_name_without_time
                )
            except FileNotFoundError:
                raise StoreUnusable(f"{layout.tmp} is missing: this is not a whole store") from None

    def close(self) -> None:
        """Remove the directory; harmless when repeated."""
        if self._lock >= 0:
            # Renamed first: a signal that interrupts the start of a thread pool leaves a thread that nobody
            # waits for, and what that still tries to write must find no directory.
            closed = self.directory.with_name(f"{self.directory.name}-closed")
            with suppress(OSError):
                os.rename(self.directory, closed)
            shutil.rmtree(closed, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def make_locked_directory(base: Path, new_name: Callable[[], str]) -> tuple[Path, int]:
    """A new private directory in `base`, and the lock on it: a descriptor to be kept as long as it is ours.

    A cleaner removes what it finds unlocked, so the name may have to be made again.
    """
    while True:
        directory = base / new_name()
        os.mkdir(directory, 0o700)
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # a cleaner took it before it was locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return directory, lock
        os.close(lock)


def _new_name() -> str:
    return f"{time.time_ns()}-{os.urandom(4).hex()}"


def _new_name_without_time() -> str:
    return f"untimed-{_new_name()}"


def living_sessions(layout: Layout, *, clean: bool) -> list[int]:
    """When each living session began, in nanoseconds since the epoch.

    With `clean`, what dead ones left behind is removed.
    """
    began = []
    for path in layout.tmp.iterdir():
        try:
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if clean:
                _remove(path)
        except BlockingIOError:
            with suppress(ValueError):  # not ours, or one that spares nothing
                began.append(int(path.name.partition("-")[0]))
        finally:
            os.close(lock)
    return began


def spared_since(layout: Layout, now: int) -> int:
    """What was used at this second or later may be named by a living session; what dead ones left is removed.

    All in seconds since the epoch; the next second if there is no session. One
    from the future began before the clock was set back: nobody knows when, so
    it spares all.
    """
    began = [nanoseconds // 1_000_000_000 - SKEW_SECONDS for nanoseconds in living_sessions(layout, clean=True)]
    return min((0 if second > now else second for second in began), default=now + 1)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextmanager
def translated(layout: Layout, doing: str) -> Iterator[None]:
    """Map what the store's disk says to the store's own errors; `doing` begins the message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"{doing}: the disk of {layout.root} is full; make room there, for example with 'casfs gc'"
            ) from error
        if error.errno == errno.EROFS:
            raise StoreUnusable(f"{doing}: {layout.root} is on a read-only file system") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise StoreUnusable(
                f"{doing}: this user can't write in {layout.root}; choose another with --store"
            ) from error
        raise
