"""One command under bubblewrap: started, watched, ended, waited for with all that it has started.

bubblewrap makes the namespaces and the view; this module makes its command
line, and watches it by descriptors only, so that whoever waits costs nothing.
Its JSON status says what an exit code can't: the process id of the sandbox's
first process, and whether the command began at all.

A `Watcher` may look after a command: it is told the first process before the
command begins (limits and control groups belong there), can end it, and can
say that it was held up.
"""

from __future__ import annotations

import os
import re
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Protocol

from casfs.errors import MissingCapability, SandboxError

PLACE = "/build"
"""Where a command finds its input root, and begins."""

TEMPORARY = "/tmp"  # noqa: S108 - the sandbox's own
TIMED_OUT = 124
"""The exit code of a command that took too long: that of timeout(1)."""

OWN = ("proc", "dev", "tmp", PLACE.lstrip("/"))
"""What a sandbox has of its own, by name in its root."""

_NOT_FROM_HOST = {*OWN, "sys", "run"}
"""What of the host's root is never shown: what the sandbox has of its own, and sockets of services."""
_POLL_MOST = (1 << 31) - 1
_END_SECONDS = 60.0
"""How long the kernel may take to end what was killed; it can only be longer where a disk hangs."""


class Watcher(Protocol):
    """Looks after a command."""

    def begin(self, process: int) -> None:
        """The sandbox's first process is there and waits; the command begins when this returns."""
        ...

    @property
    def stop(self) -> int:
        """A descriptor that becomes readable when the command is to be ended."""
        ...

    def held_up(self) -> float:
        """Seconds that don't count against the timeout, so far."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended: `code` as the shell has it (128 and the signal's number for a signal), `cpu` in seconds.

    `begun` is false where there was nothing to run: no such program, or none
    that can be executed; then `code` is bubblewrap's own. `memory` is the
    largest of its processes' sizes, in bytes.
    """

    code: int
    seconds: float
    cpu: float = 0.0
    memory: int = 0
    timed_out: bool = False
    stopped: bool = False
    begun: bool = True


def host_names(network: bool) -> list[str]:
    """What a sandbox sees of the host's root."""
    return sorted(set(os.listdir("/")) - (_NOT_FROM_HOST - {"run"} if network else _NOT_FROM_HOST))


@lru_cache
def command_line(
    network: bool, host_root: bool, view: str = "", devices: str = "", apart: bool = False
) -> tuple[str, ...]:
    """The beginning of its command line: everything but the input root and the command.

    What the host's root has is looked up once a process; `view` is where that is
    mounted already (`casfs.host_view`), `devices` where a /dev is
    (`casfs.devices`); `apart`: it is started in a network of its own
    (`casfs.networks`). Raises MissingCapability.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise MissingCapability("running a command needs bubblewrap: install the Debian package bubblewrap")
    words = [program, "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--hostname", "casfs"]
    words += ["--die-with-parent", "--new-session"]
    if os.getuid() == 0:
        words += ["--cap-drop", "ALL"]
    # Who wrote a directory's mode shall not matter: everything is the action's to write, in its own scratch.
    words += ["--cap-add", "CAP_DAC_OVERRIDE"]
    if not network and not apart:
        words.append("--unshare-net")
    if view:
        words += ["--ro-bind", view, "/"]
    elif host_root:
        for name in host_names(network):
            path = f"/{name}"
            if os.path.islink(path):
                words += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                words += ["--ro-bind-try", path, path]
    words += ["--proc", "/proc", "--tmpfs", TEMPORARY]
    words += ["--dev-bind", devices, "/dev"] if devices else ["--dev", "/dev"]
    words += ["--tmpfs", "/dev/shm"]  # noqa: S108 - the sandbox's own
    # As one that is lent is: whether there is one shall make no difference.
    return (*words, *(() if devices else ("--remount-ro", "/dev")))


def run(
    words: Sequence[str],
    command: Sequence[str | bytes],
    environment: Mapping[str, str],
    *,
    timeout: float | None = None,
    watcher: Watcher | None = None,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> Ended:
    """Run a command and wait until it, and everything it started, has ended.

    `words` is bubblewrap's command line up to the command; `timeout` in
    seconds. Raises SandboxError where what was killed doesn't end.
    """
    began = time.monotonic()
    status, status_out = os.pipe()
    block_in, block = os.pipe()
    watched = _Watched(status, block)
    try:
        blocking = () if watcher is None else ("--block-fd", str(block_in))
        try:
            process = subprocess.Popen(
                [*words, "--json-status-fd", str(status_out), *blocking, "--", *command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                pass_fds=[status_out, block_in],
                cwd="/",
            )
        finally:
            os.close(status_out)
            os.close(block_in)
        return watched.watch(process, began, timeout, watcher)
    finally:
        watched.close()


class _Watched:
    """A command that was started. Descriptors are plain numbers here: file objects would cost as much as the rest."""

    def __init__(self, status: int, block: int) -> None:
        """`status`: where bubblewrap writes its own, `block`: what it waits for the end of."""
        self._status = status
        self._block = block
        self._first = -1
        self._process = -1

    def watch(
        self, process: subprocess.Popen[bytes], began: float, timeout: float | None, watcher: Watcher | None
    ) -> Ended:
        """See to it that it begins, and wait until nothing of it is left."""
        number: int | None = None
        timed_out = stopped = False
        said = b""
        try:
            # One document a line; none where bubblewrap couldn't even make its namespaces.
            while b"\n" not in said and (more := os.read(self._status, 4096)):
                said += more
            number = find_number(said, "child-pid")
            with suppress(ProcessLookupError):
                if number is not None:
                    self._first = os.pidfd_open(number)
                    if watcher is not None:
                        watcher.begin(number)
            self._let_begin()
            timed_out, stopped = self._wait(process.pid, began, timeout, watcher)
        finally:
            usage = self._end(process, number)
        while more := os.read(self._status, 4096):
            said += more
        code = process.returncode
        return Ended(
            code=TIMED_OUT if timed_out else code if code >= 0 else 128 - code,
            seconds=time.monotonic() - began,
            cpu=usage.ru_utime + usage.ru_stime,
            memory=usage.ru_maxrss << 10,
            timed_out=timed_out,
            stopped=stopped,
            begun=timed_out or stopped or find_number(said, "exit-code") is not None,
        )

    def _let_begin(self) -> None:
        if self._block >= 0:
            os.close(self._block)
            self._block = -1

    def _wait(self, process: int, began: float, timeout: float | None, watcher: Watcher | None) -> tuple[bool, bool]:
        """Until the process ends; whether it took too long, whether it is to be ended before."""
        # Not select(2), which takes no descriptor above 1,023; not Popen.wait, which looks twenty times a second.
        poll = select.poll()
        self._process = os.pidfd_open(process)
        poll.register(self._process, select.POLLIN)
        if watcher is not None:
            poll.register(watcher.stop, select.POLLIN)
        while True:
            left = None
            if timeout is not None:
                left = began + timeout + (watcher.held_up() if watcher else 0.0) - time.monotonic()
                if left <= 0:
                    return True, False
            # Rounded up: a moment early would only be a round more. At most what poll(2) takes.
            for descriptor, _ in poll.poll(None if left is None else min(left * 1000 + 1, _POLL_MOST)):
                return False, descriptor != self._process

    def _end(self, process: subprocess.Popen[bytes], number: int | None) -> resource.struct_rusage:
        """End all that still runs, wait for it, and say what it has used.

        bubblewrap returns when the command does, which may have left processes
        behind. The first one is waited for by who adopts orphans (a subreaper):
        its usage is that of all it has waited for.
        """
        if self._first < 0:
            process.kill()
        else:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if self._first >= 0 and number is not None:
            _wait_ended(self._first)
            with suppress(ChildProcessError):
                usage = os.wait4(number, 0)[2]
        return usage

    def close(self) -> None:
        """Close all descriptors."""
        for descriptor in (self._status, self._block, self._first, self._process):
            if descriptor >= 0:
                os.close(descriptor)


def find_number(said: bytes, name: str) -> int | None:
    """A number of bubblewrap's JSON status, or None where it didn't come to say it.

    There are no other texts in it than names, so it needn't be parsed.
    """
    match = re.search(rb'"%s": *(\d+)' % name.encode(), said)
    return None if match is None else int(match[1])


def _wait_ended(first: int) -> None:
    """Wait until that process is gone: the kernel has then ended all others of its namespace.

    Raises SandboxError where it lives on: its files can't be taken.
    """
    poll = select.poll()
    poll.register(first, select.POLLIN)
    if not poll.poll(_END_SECONDS * 1000):
        raise SandboxError(f"a command that was killed didn't end within {_END_SECONDS:g} s: does a disk hang?")
