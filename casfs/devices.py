"""A /dev for commands, made once and lent to one command at a time: bubblewrap takes a millisecond for each it makes.

It has what bubblewrap's own has: null, zero, full, random, urandom, tty, the links to what a process has open, and
pseudo-terminals of its own. All of it is read-only, so nothing of a command stays there; a device is written to all
the same, and terminals are gone with whom they belonged to. `/dev/shm` is for each command to mount.

The mounts are in this process's mount namespace, and go with it. Threads may share a `Devices`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from casfs.newmount import attach_mount
from casfs.overlay import new_tmpfs
from casfs.syscalls import (
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REMOUNT,
    clone_mount,
    mount,
    umount,
)

log = logging.getLogger("casfs")

_NODES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "fd": "/proc/self/fd",
    "core": "/proc/kcore",
    "ptmx": "pts/ptmx",
}


class Devices:
    """As many as commands run at a time."""

    def __init__(self, directory: Path) -> None:
        """They are mounted below `directory`, which is this process's."""
        self._directory = directory
        self._numbers = count()
        self._lock = threading.Lock()
        # Under `_lock`:
        self._free: list[Path] = []
        self._made: list[Path] = []
        self._refused = False

    @contextmanager
    def lend(self) -> Iterator[str]:
        """Where one is mounted, for one command; empty where none can be made, as for whom the kernel has no root."""
        place = self._take()
        try:
            yield "" if place is None else str(place)
        finally:
            if place is not None:
                with self._lock:
                    self._free.append(place)

    def _take(self) -> Path | None:
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._refused:
                return None
            place = self._directory / f"dev-{next(self._numbers)}"
            try:
                make_devices(place)
            except OSError as error:
                log.info("each sandbox makes its /dev by itself: %s", error)
                self._refused = True
                return None
            self._made.append(place)
            return place

    def close(self) -> None:
        """Take them away; harmless when repeated. None may be lent."""
        with self._lock:
            self._free.clear()
            while self._made:
                remove_devices(self._made.pop())


def make_devices(place: Path) -> None:
    """Mount one at the new directory `place`. Raises OSError; then nothing is mounted."""
    place.mkdir()
    try:
        top = new_tmpfs("casfs-dev")
        try:
            attach_mount(top, place)
        finally:
            os.close(top)
        for name in _NODES:
            (place / name).touch(0o444)
            node = clone_mount(f"/dev/{name}", read_only=False, recursive=False, devices=True)
            try:
                attach_mount(node, place / name)
            finally:
                os.close(node)
        for name, target in _LINKS.items():
            (place / name).symlink_to(target)
        (place / "shm").mkdir()
        (place / "pts").mkdir()
        mount("devpts", str(place / "pts"), "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")
        mount("none", str(place), "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, "")
    except BaseException:
        remove_devices(place)
        raise


def remove_devices(place: Path) -> None:
    """Take it away; harmless where there is none."""
    with suppress(OSError):
        umount(str(place), MNT_DETACH)
    with suppress(OSError):
        place.rmdir()
