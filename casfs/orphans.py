"""Commands whose owner was killed: its guard ends them, or whoever clears its scratch.

bubblewrap ends with its parent, and the command with bubblewrap, but only once they have told the kernel so. Before
that a killed owner leaves a bubblewrap that goes on, or one whose first process waits for it for ever.

All are found by what they mount, which their command line says: bubblewrap, a script in its place, and the first
process of the sandbox. When that ends, the kernel ends all others in there.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

from casfs.bubblewrap import PLACE
from casfs.guarding import Guard

_END_MILLISECONDS = 10_000
_EXEC_SECONDS = 10.0
_NAMELESS_SECONDS = 1.0
"""A program can take its command line away for good."""
_LOOKED_AT_BYTES = 1 << 16
"""Of a command line: what is mounted is said before the command."""


def guard_commands() -> Guard:
    """A guard that ends commands of this process when it was killed, whatever they had come to.

    It has to be told the directories of their scratch. To be made in the process's own namespaces.
    """
    return Guard(_end_all)


def _end_all(directories: Sequence[bytes]) -> None:
    _wait_for_programs()
    for directory in directories:
        end_commands(os.fsdecode(directory))


def _wait_for_programs() -> None:
    """Until what the owner has forked is the program that it was forked for.

    Such a fork has closed the pipe that the guard waits for, has still our own command line and name, and is in our
    mount namespace. A fork that is to stay has a name of its own there.
    """
    until = time.monotonic() + _EXEC_SECONDS
    own = _read_command("self"), _read_name("self"), _find_namespace("self")
    others = [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    for name in others:
        # In this order: most have another command line, which is quicker to see.
        while (
            _read_command(name) == own[0]
            and (_read_name(name), _find_namespace(name)) == own[1:]
            and time.monotonic() < until
        ):
            time.sleep(0.001)


def end_commands(directory: str | os.PathLike[str]) -> bool:
    """End what runs in sandboxes whose scratch is below a directory; whether all of it has ended."""
    below = os.fsencode(directory) + b"/"
    while True:
        found = _find_commands(below)
        # Not found by a whole look: then there is none that could start another.
        if not found:
            return True
        ended = [_end(int(name), below) for name in found]
        if not all(ended):
            return False


def _find_commands(below: bytes) -> list[str]:
    """Those there are, by their numbers: also what one has started that ended before it was looked at."""
    seen: set[str] = set()
    found: list[str] = []
    while new := {name for name in os.listdir("/proc") if name.isdigit()} - seen:
        seen |= new
        found += [name for name in new if _is_command(name, below)]
    return found


def _is_command(name: str, below: bytes) -> bool:
    words = _read_command(name).split(b"\0")
    place = os.fsencode(PLACE)
    return any(
        option == b"--bind" and source.startswith(below) and target == place
        for option, source, target in zip(words, words[1:], words[2:], strict=False)
    )


def _end(number: int, below: bytes) -> bool:
    try:
        process = os.pidfd_open(number)
    except OSError:
        return True
    with open(process, "rb", buffering=0):
        # Looked at once more, now that the number can't be another's any more.
        if not _is_command(str(number), below):
            return True
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(_END_MILLISECONDS))


def _read_name(name: str) -> bytes:
    """What ps(1) calls a process; empty where it has ended."""
    with suppress(OSError), open(f"/proc/{name}/comm", "rb", buffering=0) as file:
        return file.read(64)
    return b""


def _read_command(name: str) -> bytes:
    """The words of a process's command line, NUL behind each; empty where it has ended, or is the kernel's."""
    until = 0.0
    with suppress(OSError):
        while True:
            with open(f"/proc/{name}/cmdline", "rb", buffering=0) as file:
                command = file.read(_LOOKED_AT_BYTES)
            if command:
                return command
            # In the middle of exec it is empty, too; but then there is a program, so this link can be read.
            os.readlink(f"/proc/{name}/exe")
            until = until or time.monotonic() + _NAMELESS_SECONDS
            if time.monotonic() > until:
                break
            time.sleep(0.001)
    return b""


def _find_namespace(name: str) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{name}/ns/mnt")
    return ""
