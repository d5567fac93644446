"""The place of a mount: whether it can be one, how it is cleared, and how it ends.

Used by whoever mounts (`casfs.mounting`) and by `casfs umount`.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from casfs.control import call
from casfs.errors import BadMountPoint, CasfsError, MountError
from casfs.fusemount import detach
from casfs.mountinfo import Mount, find_mount, resolve_mountpoint
from casfs.signals import acting_on_signals
from casfs.syscalls import has_admin_capability

GRACE_SECONDS = 3.0
"""How long a daemon that was told to end goes on serving files that are still open."""
_HEARD_SECONDS = 0.02
"""After which a signal whose handler hasn't run is sent once more."""


def check_mountpoint(mountpoint: Path) -> Path:
    """The resolved place for a new mount; what a dead daemon left mounted there is cleared away.

    Raises BadMountPoint.
    """
    path = resolve_mountpoint(mountpoint)
    mounted = find_mount(str(path))
    if mounted is not None and mounted.is_casfs:
        if _is_alive(path):
            raise BadMountPoint(f"{mountpoint} has a casfs mount already; 'casfs umount {mountpoint}' ends it")
        detach(path, lazy=True)
    elif mounted is not None:
        raise BadMountPoint(f"{mountpoint} is a mount point of {mounted.kind} already")
    try:
        if os.listdir(path):
            raise BadMountPoint(f"{mountpoint} is not empty: what is in it would be hidden")
    except FileNotFoundError:
        raise BadMountPoint(f"{mountpoint} does not exist; make it first (mkdir {mountpoint})") from None
    except NotADirectoryError:
        raise BadMountPoint(f"{mountpoint} is not a directory") from None
    except OSError as error:
        raise BadMountPoint(f"can't look into {mountpoint}: {error.strerror}") from error
    if not os.access(path, os.W_OK) and not has_admin_capability():
        raise BadMountPoint(f"{mountpoint} can't be written by this user: without root, mount on a directory of yours")
    return path


def _is_alive(path: Path) -> bool:
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
    return True


def find_own(path: Path) -> Mount:
    """What was just mounted there. Raises MountError if it is gone."""
    mounted = find_mount(str(path))
    if mounted is None:
        raise MountError(f"{path} was unmounted at once")
    return mounted


def wait_unmounted(place: Path) -> None:
    """Until nothing is mounted there: the kernel tells when the table of mounts has changed."""
    with open("/proc/self/mountinfo", "rb") as table:
        changes = select.poll()
        changes.register(table, select.POLLPRI)
        while find_mount(str(place)) is not None:
            changes.poll()


@contextmanager
def unmounting_on_failure(path: Path) -> Iterator[None]:
    """Whatever is raised inside takes the mount away."""
    try:
        yield
    except BaseException:
        with suppress(CasfsError):
            detach(path, lazy=True)
        raise


class Ending:
    """How a mount ends by a signal: at once, or as soon as `allow` was called."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._allowed = False
        self._asked = False
        self._mounted = False
        self._heard = False

    def allow(self) -> None:
        """From now on signals take the mount away; also one that came before."""
        self._allowed = True
        if self._asked:
            self._end()

    @contextmanager
    def insisted(self) -> Iterator[None]:
        """Inside, the main thread may block where nothing but a signal wakes it: one that came just before, too."""
        waiting = threading.get_ident()

        def insist(number: int) -> None:
            time.sleep(_HEARD_SECONDS)
            while not self._heard:
                signal.pthread_kill(waiting, number)
                time.sleep(_HEARD_SECONDS)

        with acting_on_signals(insist):
            yield

    def ask(self) -> bool:
        """A signal came. False where nothing was mounted yet."""
        self._heard = True
        self._mounted = self._mounted or find_mount(str(self._path)) is not None
        if self._mounted:
            self._asked = True
            if self._allowed:
                self._end()
        return self._mounted

    def _end(self) -> None:
        with suppress(CasfsError):
            detach(self._path, lazy=True)
        # Files still open would keep the connection, and this process, alive: not for ever.
        signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)


def _give_up(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


@contextmanager
def unmounting_on_signals(path: Path) -> Iterator[Ending]:
    """SIGTERM, SIGINT and SIGHUP take the mount away; the session then ends by itself, or after a grace period.

    Before anything is mounted there, they do what they did: what shall be mounted is not waited for.
    """
    ending = Ending(path)

    def end(number: int, frame: FrameType | None) -> None:
        if ending.ask():
            return
        earlier = before[signal.Signals(number)]
        if callable(earlier):
            earlier(number, frame)
        elif earlier is not signal.SIG_IGN:
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield ending
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def unmount(mountpoint: Path, *, lazy: bool = False, wait: float = 5.0) -> int | None:
    """Unmount, and wait (seconds) for the daemon to have let go of the store.

    Returns the process id of a daemon that lives on after the wait: another
    mount namespace has a copy of the mount, which no unmounting here takes
    away where mounts are private (as in containers). Works on a mount whose
    daemon was killed, too. Raises NotMounted, Busy.
    """
    path = resolve_mountpoint(mountpoint)
    pid = 0
    with suppress(CasfsError):
        pid = int(call(path, "statistics")["pid"])
    detach(path, lazy=lazy)
    deadline = time.monotonic() + wait
    while pid and not lazy and is_running(pid):
        if time.monotonic() > deadline:
            return pid
        time.sleep(0.002)
    return None


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it isn't a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False
