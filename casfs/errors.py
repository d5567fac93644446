"""Everything that can go wrong with a mount, as one tree.

    CasfsError
    ├── MountError               a mount could not be made, found or undone
    │   ├── BadMountPoint        missing, not a directory, not empty, taken
    │   ├── NotMounted           there is no casfs mount there
    │   └── Busy                 files are open below it
    ├── MissingCapability        this machine or user can't do what was asked
    ├── BadRequest               bytes from the kernel that are no request we can answer
    ├── BadChange                a change of a mounted tree can't be made
    ├── BadTrace                 a file that is no trace, or a damaged one
    ├── BadStream                what a sandboxfs was sent is no JSON
    ├── CheckoutError            a tree could not be copied out
    └── SandboxError             a sandbox could not be made or used

`errno_of` says what a program inside a mount gets to see.
"""

from __future__ import annotations

import errno

from store.errors import CorruptBlob, MissingBlob, NoSpace, StaleReference


class CasfsError(Exception):
    """Any failure of the projection that has a message for a person."""


class MountError(CasfsError):
    """A mount could not be made, found or undone."""


class BadMountPoint(MountError):
    """The place can't be mounted on."""


class NotMounted(MountError):
    """There is no casfs mount at that place."""


class Busy(MountError):
    """Files below the mount are in use."""


class MissingCapability(CasfsError):
    """This machine, kernel or user can't do what was asked; the message says what would."""


class BadRequest(CasfsError):
    """Bytes from the kernel that are no request we can answer."""


class BadStream(CasfsError):
    """What a sandboxfs was sent is no JSON object, so nobody knows where the next one begins."""


class BadChange(CasfsError):
    """A change of a mounted tree that can't be made as it is; nothing was changed."""


class BadTrace(CasfsError):
    """A file that can't be read as a trace."""


class CheckoutError(CasfsError):
    """A tree could not be copied out."""


class SandboxError(CasfsError):
    """A sandbox could not be made or used."""


_ERRNO: tuple[tuple[type[Exception], int], ...] = (
    (StaleReference, errno.ESTALE),
    (MissingBlob, errno.EIO),
    (CorruptBlob, errno.EIO),
    (NoSpace, errno.ENOSPC),
)


def errno_of(error: Exception) -> int:
    """The errno for a program that met this error; EIO for what has none of its own."""
    for kind, number in _ERRNO:
        if isinstance(error, kind):
            return number
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO
