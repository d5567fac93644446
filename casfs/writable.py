"""Mounts that can be written: an upper layer on host scratch, over any engine.

    SCRATCH/upper   what was written: the outputs; whiteouts are what was deleted
    SCRATCH/work    overlayfs's own

The kernel engine's stack has the upper layer in it; what a FUSE session serves
is covered by an overlay, in the same place. Either way inputs never change.
Needs CAP_SYS_ADMIN, as others shall see the mount.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from casfs.errors import MissingCapability, MountError
from casfs.newmount import attach_mount
from casfs.overlay import Family, Upper, stack
from casfs.scratch import remove_tree
from casfs.syscalls import MNT_DETACH, has_admin_capability, umount


@contextmanager
def opened_upper(scratch: Path, *, volatile: bool) -> Iterator[Upper]:
    """The upper layer in a scratch directory, which is made if need be; what was written there before is kept.

    Raises MissingCapability, MountError.
    """
    if not has_admin_capability():
        raise MissingCapability(
            "a mount that can be written needs root (CAP_SYS_ADMIN); 'casfs run' gives every user a tree to write in"
        )
    with ExitStack() as opened:
        try:
            # overlayfs refuses a work directory that a volatile mount has used; what is in it is of no use to us.
            remove_tree(scratch / "work")
            directory, work = (_open_made(scratch / name, opened) for name in ("upper", "work"))
        except OSError as error:
            raise MountError(f"can't use {scratch} as scratch: {error.strerror}") from error
        yield Upper(directory, work, volatile)


def _open_made(path: Path, opened: ExitStack) -> int:
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    opened.callback(os.close, descriptor)
    return descriptor


def cover(place: Path, upper: Upper, source: str) -> None:
    """Put an overlay with `upper` in the place of what is mounted there, which is below it from then on.

    Whoever serves what is below must be at it. Raises MountError.
    """
    try:
        below = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # No redirects and no partial copies: with `user` xattrs overlayfs has neither.
            mounted = stack([below], [], Family.USER, source, upper)
        finally:
            os.close(below)
        try:
            umount(str(place), MNT_DETACH)
            attach_mount(mounted, place)
        finally:
            os.close(mounted)
    except OSError as error:
        raise MountError(f"can't make {place} writable: {error.strerror}") from error
