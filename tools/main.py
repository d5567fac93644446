"""`casfs`: one program, a verb per job.

Parses the command line, has the verb run, and turns what it raises into a line
on standard error and an exit code. Imports next to nothing: ``casfs --help``
has to answer at once. What a verb needs is imported by its module, which is
imported when the verb was chosen.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from tools.commands import VERBS, add_common, add_verbs
from tools.exits import Exit, describe_exits, find_exit

_DESCRIPTION = "Projects trees of files out of a content-addressed store."
_EXAMPLE = """\
a first mount:
  casfs manifest create headers /usr/include
  mkdir mnt
  casfs mount headers mnt
  casfs stats mnt
  casfs umount mnt
"""


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt, nothing but `main` shall catch it."""


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; the verbs' own arguments are added when one is chosen."""
    parser = argparse.ArgumentParser(
        "casfs",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLE}\nexit codes:\n{describe_exits()}\n\n'casfs VERB --help' explains a verb and has examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    add_common(parser)
    add_verbs(parser, "tools.commands", VERBS)
    return parser


class _Version(argparse.Action):
    """Prints the installed version; looking it up takes longer than all the rest of the start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            version = metadata.version("casfs")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"casfs {version}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see `tools.exits`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    with _raising_on_signals(for_good=argv is None):
        try:
            return _run_and_report(arguments)
        except KeyboardInterrupt:
            return _report("interrupted", Exit.INTERRUPTED)
        except Terminated:
            return _report("terminated", Exit.TERMINATED)


def _run_and_report(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        try:
            code = _run(arguments)
        except SystemExit as stop:  # argparse, after --help or a usage error
            code = stop.code if isinstance(stop.code, int) else Exit.NO
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        _forget_output()
        return Exit.OK
    except Exception as error:  # noqa: BLE001 - a person gets a line, never a traceback
        if debug:
            import traceback

            traceback.print_exc()
        known = find_exit(error)
        if known is None:
            hint = "" if debug else " (--debug shows where)"
            return _report(f"{_describe(error)}{hint}", Exit.NO)
        return _report(_describe(error), known)


def _prepare_streams() -> None:
    """Have all three standard streams, able to print every file name.

    One that was closed (``>&-``) is opened on /dev/null. Left free, its
    descriptor would be the next file's, and be overwritten by what is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends
    for stream in (sys.stdout, sys.stderr):
        # A file name may hold what the terminal's encoding has not, or no encoding has.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: list[str]) -> int:
    with _without_collections():
        args = make_parser().parse_args(arguments)
        from tools.config import load_settings

    settings = load_settings(getattr(args, "store", None), getattr(args, "config", None))
    return int(args.run(args, settings))


@contextmanager
def _without_collections() -> Iterator[None]:
    """For importing: what comes in stays, and looking for garbage in it again and again is a tenth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        # OSError's own text begins with a number that means little to a person.
        if isinstance(error.filename, str | bytes):
            return f"{os.fsdecode(error.filename)}: {error.strerror}"
        return f"can't write the output: {error.strerror}" if _output_fails() else error.strerror
    if find_exit(error) is None:
        return f"unexpected {type(error).__name__}: {error}"
    return str(error)


def _output_fails() -> bool:
    """Whether what is buffered for standard output can't be written; it is dropped then."""
    try:
        sys.stdout.flush()
    except OSError:
        _forget_output()
        return True
    return False


def _report(message: str, code: Exit) -> Exit:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        print(f"casfs: {message}", file=sys.stderr, flush=True)
    return code


def _forget_output() -> None:
    """Let what is still buffered for standard output go nowhere, so that the interpreter's end is quiet."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


_IMPATIENCE_SECONDS = 1.0


@contextmanager
def _raising_on_signals(*, for_good: bool) -> Iterator[None]:
    """The first SIGINT or SIGTERM raises, so that everything is cleaned up on the way out.

    One that comes within a second is the same signal once more (`timeout` and
    terminals send it to the process and to its group); a later one is somebody
    who doesn't want to wait, and ends the process at once. What that leaves in
    the store is removed at the next start. `for_good`: nothing but the end of
    the process comes afterwards; a signal then ends it without Python's traceback.
    """
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first:
            if now - first > _IMPATIENCE_SECONDS:
                os._exit(128 + number)
            return
        first = now
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    # What a shell had ignored, as it does for jobs in the background, stays ignored.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread: somebody else handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            # A server has taken them over, and hears them until the process is gone.
            if not for_good or signal.getsignal(number) is handle:
                signal.signal(number, signal.SIG_DFL if for_good else handler)


if __name__ == "__main__":
    sys.exit(main())
