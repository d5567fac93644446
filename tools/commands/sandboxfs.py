"""``casfs sandboxfs``: Bazel's sandboxes, without a link or an upcall for a file.

Speaks the protocol of sandboxfs 0.2 on its standard input and output, for
``--experimental_sandboxfs_path`` of Bazel up to 6, which wants one program: see
`tools.sandboxfs`.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from contextlib import suppress
from fcntl import fcntl
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from casfs.errors import BadStream, CasfsError
from casfs.sandboxfs_protocol import VERSION, Create, Parser, Refused, Request, encode_answer
from casfs.signals import waking_on_signals
from store.errors import BadInput
from tools.config import Settings
from tools.exits import Exit
from tools.output import warn

if TYPE_CHECKING:
    from casfs.sandboxfs import Sandboxfs

EXAMPLES = """
bazel build --experimental_use_sandboxfs --experimental_sandboxfs_path=casfs-sandboxfs //...
casfs sandboxfs --namespace bazel build --experimental_use_sandboxfs …   # without root
casfs sandboxfs --allow=self mnt                  # what Bazel does; requests are read from stdin
"""

_PIECE = 1 << 20
_F_SETPIPE_SZ = 1031


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs sandboxfs`` takes."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version of the protocol and exit")
    parser.add_argument(
        "--allow",
        choices=("self", "root", "other"),
        default="self",
        help="accepted for Bazel: who may look in is decided by the files' own modes",
    )
    parser.add_argument(
        "--namespace",
        action="store_true",
        help="run a command, such as Bazel, where an ordinary user may mount: in a user and mount namespace of its own",
    )
    parser.add_argument("mountpoint", metavar="MOUNT", help="an empty directory; with --namespace, the command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help=argparse.SUPPRESS)


class _Version(argparse.Action):
    """Bazel takes what follows the first word of the first line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"sandboxfs {VERSION}")
        parser.exit()


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Serve until a signal, or until nobody can ask any more."""
    if args.namespace:
        return _run_in_namespace([args.mountpoint, *args.arguments])
    if args.arguments:
        raise BadInput(f"sandboxfs takes one directory, not {' '.join([args.mountpoint, *args.arguments])}")
    from casfs.guarding import guarded
    from casfs.sandboxfs import Sandboxfs, unmount_place

    # Modes of what is laid out are those of the host's files.
    os.umask(0)
    with Sandboxfs(Path(args.mountpoint)) as sandboxfs:
        # Closed once more at the end of the line: before the guard goes.
        unmount = partial(unmount_place, sandboxfs.place, sandboxfs.mounted.id)
        with guarded(unmount, f"casfs: sandboxfs was killed; {sandboxfs.place} is unmounted"), sandboxfs:
            return _serve(sandboxfs)


def _serve(sandboxfs: Sandboxfs) -> int:
    with suppress(OSError):
        # Bazel names 12,000 files in a megabyte, and a pipe usually takes 64 KiB.
        fcntl(0, _F_SETPIPE_SZ, _PIECE)
    with waking_on_signals() as woken:
        parser = Parser()
        try:
            while data := _read(woken):
                for request in parser.feed(data):
                    _answer(_meet(sandboxfs, request))
            parser.finish()
        except BadStream as error:
            with suppress(OSError):
                _answer(encode_answer(None, str(error)))
            raise
        _wait_for_end(woken)
    return Exit.OK


def _read(woken: int) -> bytes:
    """What there is on standard input, b"" at its end."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if woken in ready:
            os.read(woken, 64)  # the signal's handler raises before this returns, or it was for nobody
        if 0 in ready:
            return os.read(0, _PIECE)


def _meet(sandboxfs: Sandboxfs, request: Request | Refused) -> bytes:
    """Do what is asked; returns the answer."""
    if isinstance(request, Refused):
        warn(str(request))
        return encode_answer(request.id, str(request))
    try:
        if isinstance(request, Create):
            sandboxfs.create(request.id, request.mappings)
        else:
            sandboxfs.destroy(request.id)
    except (CasfsError, OSError) as error:
        text = f"casfs sandboxfs: {error}"
        warn(f"sandbox {request.id}: {error}")
        return encode_answer(request.id, text)
    return encode_answer(request.id, None)


def _answer(line: bytes) -> None:
    while line:
        line = line[os.write(1, line) :]


def _wait_for_end(woken: int) -> None:
    """The end of stdin freezes the sandboxes: until a signal comes, or nobody reads the answers any more.

    A Bazel that was killed can't send a signal.
    """
    poll = select.poll()
    poll.register(1, 0)
    poll.register(woken, select.POLLIN)
    while True:
        for descriptor, event in poll.poll():
            if event & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                return
            if descriptor == woken:
                os.read(woken, 64)


def _run_in_namespace(command: list[str]) -> int:
    from casfs.sandbox import enter_namespace
    from casfs.syscalls import keep_capabilities

    enter_namespace()
    keep_capabilities()
    sys.stdout.flush()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - what the user asked for
    except OSError as error:
        raise BadInput(f"can't run {command[0]}: {error.strerror}") from error
