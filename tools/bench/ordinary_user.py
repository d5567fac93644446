"""Root in the part of an ordinary user: for measuring, and for testing, what somebody without privilege gets.

A child process takes a mount namespace of its own, in which what the user
needs can be reached even where it lies below root's own directories, and gives
up all privilege. The namespace takes the arrangement away with it.
"""

from __future__ import annotations

import os
from pathlib import Path

from casfs.syscalls import CLONE_NEWNS, MS_BIND, MS_MOVE, MS_PRIVATE, MS_REC, mount, unshare

NOBODY = 65534
NOT_ROOT = "only root can be an ordinary user for a while"
"""Why a side was left out."""


def leave_namespace(home: Path) -> None:
    """As root: leave everybody's mount namespace; in the new one an empty tmpfs for all to write in is at `home`."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE, "")
    mount("none", str(home), "tmpfs", 0, "mode=0777")


def make_reachable(paths: list[Path], scratch: Path) -> None:
    """Directories that others may not pass are replaced by ones with nothing but what is needed below them."""
    hidden: dict[Path, list[tuple[Path, Path]]] = {}
    for number, path in enumerate(paths):
        closed = next((above for above in reversed(path.parents) if not above.stat().st_mode & 0o001), None)
        if closed is not None and not any(path.is_relative_to(other) for pair in hidden.values() for other, _ in pair):
            kept = scratch / f"kept{number}"
            kept.mkdir()
            mount(str(path), str(kept), "", MS_BIND | MS_REC, "")
            hidden.setdefault(closed, []).append((path, kept))
    for closed, kept_paths in hidden.items():
        mount("none", str(closed), "tmpfs", 0, "mode=0755")
        for path, kept in kept_paths:
            path.mkdir(parents=True)
            mount(str(kept), str(path), "", MS_MOVE, "")


def give_up_privilege() -> None:
    """Become nobody, for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
