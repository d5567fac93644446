"""The new mount API: a file system is set up key by key, and mounted where nobody sees it until it is ready.

Layers are handed over as descriptors, so they need no place in the tree of
mounts either, and what is not attached in the end goes away with the last
descriptor. Linux 5.2; overlayfs takes descriptors since 6.13.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import TracebackType

from casfs.syscalls import syscall

_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_SET_FLAG, _SET_STRING, _SET_FD, _CREATE = 0, 1, 5, 6
_CLOEXEC = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4

READ_ONLY, NO_SUID, NO_DEV = 1, 2, 4
"""Attributes of a mount."""


class FileSystemContext:
    """A file system that is being set up; a context manager. OSErrors say what the kernel logged about it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._descriptor = syscall(f"fsopen {kind}", _FSOPEN, kind.encode(), _CLOEXEC)

    def set_flag(self, key: str) -> None:
        """An option without a value."""
        self._configure(_SET_FLAG, key, None, 0)

    def set_string(self, key: str, value: str) -> None:
        """An option with a value; ``source`` is what `mount` and /proc show."""
        self._configure(_SET_STRING, key, value.encode(), 0)

    def set_descriptor(self, key: str, descriptor: int) -> None:
        """An option whose value is an open directory."""
        self._configure(_SET_FD, key, None, descriptor)

    def mount(self, attributes: int) -> int:
        """Make the file system and mount it nowhere; returns a descriptor of its root."""
        self._configure(_CREATE, None, None, 0)
        return syscall(f"fsmount {self._kind}", _FSMOUNT, self._descriptor, _CLOEXEC, attributes)

    def _configure(self, command: int, key: str | None, value: bytes | None, descriptor: int) -> None:
        name = None if key is None else ctypes.c_char_p(key.encode())
        try:
            syscall(f"{self._kind}: {key or 'create'}", _FSCONFIG, self._descriptor, command, name, value, descriptor)
        except OSError as error:
            logged = self._read_log()
            raise OSError(error.errno, f"{error.strerror}{logged and ': '}{logged}") from None

    def _read_log(self) -> str:
        lines = []
        try:
            while True:
                lines.append(os.read(self._descriptor, 4096).decode(errors="replace").strip())
        except OSError:  # ENODATA: that was all
            return "; ".join(lines)

    def __enter__(self) -> FileSystemContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def attach_mount(mount: int, place: Path | bytes) -> None:
    """Show a mount at a place, where it stays when `mount` is closed."""
    target = ctypes.c_char_p(os.fsencode(place))
    syscall(
        f"move_mount {os.fsdecode(place)}",
        _MOVE_MOUNT,
        mount,
        ctypes.c_char_p(b""),
        -100,
        target,
        _MOVE_MOUNT_F_EMPTY_PATH,
    )
