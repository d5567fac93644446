"""Exit codes: what they are, and which error leads to which.

A script may rely on them. Importing this module loads nothing else; the table
of errors is made when there is an error.
"""

from __future__ import annotations

import errno
import functools
from enum import IntEnum
from typing import Self


class Exit(IntEnum):
    """The codes of `casfs`; `meaning` is the line that ``casfs --help`` shows."""

    meaning: str

    def __new__(cls, number: int, meaning: str) -> Self:
        member = int.__new__(cls, number)
        member._value_ = number
        member.meaning = meaning
        return member

    OK = 0, "done"
    NO = 1, "the answer is no (differences, damage, a failed check), or it failed"
    USAGE = 2, "the command or its input is wrong; nothing was changed"
    NOT_FOUND = 3, "there is no such manifest, blob, path or mount"
    STORE = 4, "the store or a disk: not usable, not writable, full; deleted or replaced while it was served"
    MOUNT = 5, "a mount failed, or this machine or user lacks what it needs"
    OVERDUE = 6, "told to end, it wasn't done by its deadline, and was ended: something hung"
    INTERRUPTED = 130, "ended by Ctrl-C (SIGINT)"
    TERMINATED = 143, "ended by SIGTERM"


def describe_exits() -> str:
    """The codes as a table, for help texts."""
    return "\n".join(f"  {int(code):>3}  {code.meaning}" for code in Exit)


@functools.cache
def _table() -> tuple[tuple[type[Exception], Exit], ...]:
    """Error classes and their codes; the first that fits counts. The trees are in the two `errors` modules."""
    from casfs import errors as casfs
    from store import errors as store

    return (
        (store.BadInput, Exit.USAGE),
        (store.AlreadyExists, Exit.USAGE),
        (store.NotFound, Exit.NOT_FOUND),
        (store.NoSpace, Exit.STORE),
        (store.StoreUnusable, Exit.STORE),
        (store.StoreError, Exit.NO),
        (casfs.BadChange, Exit.USAGE),
        (casfs.BadTrace, Exit.USAGE),
        (casfs.NotMounted, Exit.NOT_FOUND),
        (casfs.MountError, Exit.MOUNT),
        (casfs.MissingCapability, Exit.MOUNT),
        (casfs.CasfsError, Exit.NO),
    )


def find_exit(error: BaseException) -> Exit | None:
    """The code for an error that has a message for a person; None for one nobody expected."""
    for kind, code in _table():
        if isinstance(error, kind):
            return code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exit.STORE
    return None
