"""The host's directories as sandboxes see them, put together once: each sandbox then binds one tree, not a dozen.

bubblewrap reads the kernel's whole table of mounts for each thing it binds, so
what many sandboxes share is mounted once, read-only, in this process's mount
namespace (`casfs.sandbox.enter_namespace`), and goes with it. Nothing of the
host is ever attached writable: who removes the directory by mistake finds a
read-only file system. Threads may share a `HostViews`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from casfs.bubblewrap import OWN, host_names
from casfs.newmount import attach_mount
from casfs.overlay import new_tmpfs
from casfs.syscalls import MNT_DETACH, clone_read_only, umount

log = logging.getLogger("casfs")


class HostViews:
    """What one process's sandboxes share, made for the second of them: for a single one it would cost what it saves."""

    def __init__(self, directory: Path) -> None:
        """They are mounted below `directory`, which is this process's."""
        self._directory = directory
        self._lock = threading.Lock()
        # Under `_lock`: by whether the network is seen, where it is mounted; empty where it isn't yet.
        self._places: dict[bool, str] = {}
        self._refused = False

    def find(self, network: bool) -> str:
        """Where the host's root is mounted as commands see it; empty where each has to see to that itself."""
        with self._lock:
            known = self._places.get(network)
            if known is None or known or self._refused:
                return self._places.setdefault(network, "")
            place = self._directory / ("host-network" if network else "host")
            try:
                make_host_view(place, host_names(network), OWN)
                self._places[network] = str(place)
            except OSError as error:
                log.warning("each sandbox mounts the host's directories by itself: %s", error)
                self._refused = True
            return self._places[network]

    def close(self) -> None:
        """Take them away; harmless when repeated."""
        with self._lock:
            while self._places:
                _, place = self._places.popitem()
                if place:
                    remove_host_view(Path(place))


def make_host_view(place: Path, names: Iterable[str], empty: Iterable[str]) -> None:
    """Show entries of the host's root at the new directory `place`; `empty` are directories to mount on.

    As in a sandbox: links as they are, directories with all that is mounted in
    them, files not at all. Raises OSError; then nothing is mounted.
    """
    place.mkdir()
    top = new_tmpfs("casfs-host")
    try:
        attach_mount(top, place)
    finally:
        os.close(top)
    try:
        for name in empty:
            (place / name).mkdir()
        for name in names:
            _show(Path("/") / name, place / name)
        top = clone_read_only(place, recursive=True)
        try:
            umount(str(place), MNT_DETACH)
            attach_mount(top, place)
        finally:
            os.close(top)
    except BaseException:
        remove_host_view(place)
        raise


def _show(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir()
        tree = clone_read_only(source, recursive=True)
        try:
            attach_mount(tree, target)
        finally:
            os.close(tree)


def remove_host_view(place: Path) -> None:
    """Take it away; harmless where there is none."""
    with suppress(OSError):
        umount(str(place), MNT_DETACH)
    with suppress(OSError):
        place.rmdir()
