"""What one upcall costs on one core: our sessions against libfuse's examples in C.

Client and daemon are pinned to the same core, so that wall time per operation
is the client's system call, the daemon's work and the switches between them;
nothing runs in parallel and nobody polls. `passthrough_ll` (single-threaded,
`cache=always`) mirrors a directory; `hello_ll` has one file in memory and is the
floor of what libfuse itself costs. Every repetition is on a fresh mount.

    LOOKUP, missing    access(2) of a name never asked for before
    LOOKUP             stat(2) of a file, the first time
    GETATTR            statx(2) with AT_STATX_FORCE_SYNC, which passes every cache
    OPEN, READ         open(2), read(2) and close(2) of each file once, its name known; with
                       passthrough the blob is registered with the kernel, and there is no READ
    OPEN to RELEASE    open(2) and close(2) of one file again and again

*Answers* are the daemon's per operation, counted by its write system calls
(/proc/PID/io): passthrough_ll has a FLUSH for each close that we do without.
*Daemon CPU* is per operation, from the process's CPU clock.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from store.digest import Digest
from tools.bench.libfuse_examples import NoExample, build, mounted_example
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import cpu_seconds, ingest, mounted_tree, pinned, usable_engines
from tools.bench.sessions import ProfiledFunction, own_session

_EXAMPLES = ("passthrough_ll", "hello_ll")
_ENGINES = ("passthrough", "native", "fuse")
_FILES = 500
"""In one directory: passthrough_ll searches a list of all files it has seen at each LOOKUP."""
_SETTLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class _Operation:
    """A loop over one system call: how often it is made, and whether hello_ll can answer it."""

    name: str
    work: Callable[[Path, int], None]
    calls: int
    hello: bool = True


def run(settings: Settings) -> Outcome:
    """Pins this process, and so all it starts, to one core."""
    outcome = Outcome()
    scratch = settings.scratch
    store, root, source = _make_tree(scratch)
    engines, reasons = usable_engines(scratch, _ENGINES)
    outcome.notes += reasons
    try:
        programs = build(_EXAMPLES, scratch / "examples")
    except NoExample as error:
        programs = {}
        outcome.notes.append(f"libfuse's examples were left out: {error}")
    operations = _operations(settings)
    core = max(os.sched_getaffinity(0))
    with pinned(core):
        for number, side in alternate((*programs, *engines), settings.rounds(7)):
            place = scratch / f"{side}-{number}"
            with _serving(side, programs, store, root, source, place) as pid:
                for operation in operations:
                    if side != "hello_ll" or operation.hello:
                        _measure(outcome, operation, side, pid, place)
    if "passthrough_ll" in programs and "passthrough" in engines:
        for operation in operations:
            ours = outcome.median(f"{operation.name}, wall", "passthrough")
            theirs = outcome.median(f"{operation.name}, wall", "passthrough_ll")
            outcome.aim(f"{operation.name}: passthrough against passthrough_ll", ours / theirs, 1.0, "", at_most=True)
    return outcome


def _make_tree(scratch: Path) -> tuple[Path, Digest, Path]:
    source = scratch / "tree"
    source.mkdir()
    for number in range(_FILES):
        (source / f"file{number}").write_bytes(b"%d" % number)
    # hello_ll has its file under this name.
    (source / "hello").write_bytes(b"Hello World!\n")
    store = scratch / "store"
    return store, ingest(store, [(b"", source)], "tree").root, source


@contextmanager
def _serving(
    side: str, programs: dict[str, Path], store: Path, root: Digest, source: Path, place: Path
) -> Iterator[int]:
    if side in programs:
        options = f"source={source},cache=always" if side == "passthrough_ll" else ""
        with mounted_example(programs[side], place, options) as pid:
            yield pid
    else:
        with mounted_tree(store, root, place, side, "tree") as mounted:
            yield mounted.pid


def _operations(settings: Settings) -> list[_Operation]:
    calls = settings.size(4_000, 400)
    return [
        _Operation("LOOKUP, missing", _lookup_missing, calls),
        _Operation("LOOKUP", _lookup, _FILES, hello=False),
        _Operation("GETATTR", _getattr, calls),
        _Operation("OPEN, READ", _read_each, _FILES, hello=False),
        _Operation("OPEN to RELEASE", _open, calls),
    ]


def _measure(outcome: Outcome, operation: _Operation, side: str, pid: int, place: Path) -> None:
    answers, cpu = _answers(pid), cpu_seconds(pid)
    began = time.perf_counter()
    operation.work(place, operation.calls)
    seconds = time.perf_counter() - began
    time.sleep(_SETTLE_SECONDS)
    cpu, answers = cpu_seconds(pid) - cpu, _answers(pid) - answers
    per_call = {"answers": round(answers / operation.calls)}
    outcome.add(f"{operation.name}, wall", side, "µs", seconds / operation.calls * 1e6, per_call)
    outcome.add(f"{operation.name}, daemon CPU", side, "µs", cpu / operation.calls * 1e6)


def _answers(pid: int) -> int:
    """How many write system calls a daemon has made: one an answer."""
    with open(f"/proc/{pid}/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("syscw:"))


def _lookup_missing(top: Path, calls: int) -> None:
    for number in range(calls):
        os.access(f"{top}/missing{number}", os.F_OK)


def _lookup(top: Path, calls: int) -> None:
    for number in range(calls):
        os.stat(f"{top}/file{number}")


_AT_EMPTY_PATH, _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS = 0x1000, 0x2000, 0x7FF


def _getattr(top: Path, calls: int) -> None:
    statx = ctypes.CDLL(None, use_errno=True).statx
    found = ctypes.create_string_buffer(256)
    file = os.open(top / "hello", os.O_PATH)
    try:
        for _ in range(calls):
            if statx(file, b"", _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS, found):
                raise OSError(ctypes.get_errno(), "statx")
    finally:
        os.close(file)


def _read_each(top: Path, calls: int) -> None:
    for number in range(calls):
        file = os.open(f"{top}/file{number}", os.O_RDONLY)
        os.read(file, 4096)
        os.close(file)


def _open(top: Path, calls: int) -> None:
    file = os.open(top / "hello", os.O_PATH)
    path = f"/proc/self/fd/{file}"
    try:
        for _ in range(calls):
            os.close(os.open(path, os.O_RDONLY))
    finally:
        os.close(file)


def profile(settings: Settings) -> Iterator[tuple[str, int, list[ProfiledFunction]]]:
    """The native session under cProfile, a mount an operation: name, operations, functions by their own time.

    Functions that wait (poll, and read when nothing is there) show the client's
    time; the profiler's own cost is in all the others.
    """
    store, root, _ = _make_tree(settings.scratch)
    engines, _ = usable_engines(settings.scratch, ("passthrough",))
    with pinned(max(os.sched_getaffinity(0))):
        for number, operation in enumerate(_operations(settings)):
            place = settings.scratch / f"profiled-{number}"
            with own_session(store, root, place, passthrough=bool(engines), profile=True) as session:
                if operation.work is _read_each:
                    _lookup(place, operation.calls)
                operation.work(place, operation.calls)
            yield operation.name, operation.calls, session.profile
