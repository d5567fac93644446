"""What `--trace` costs an upcall, and that it costs nothing where it isn't asked for.

    bare   the session's class itself, with nothing of tracing loaded
    off    a session made as `casfs mount` and `casfs run` make it without --trace
    on     the same with --trace: each use is an upcall, and is written to a file

Client and daemon are pinned to one core, as in *upcall*; every line is on a fresh mount, with engine passthrough where
this process may, else native.

    missing        access(2) of a name never asked for before
    stat, first    stat(2) of each file of a directory once
    stat, again    once more: with --trace the kernel may keep no names of files
    open, first    open, read and close of each file
    open, again    once more
    preprocess     g++ -E of the demonstration's program, which opens hundreds of headers, on both cores

*Functions* are the calls of functions that the daemon makes for one, counted by a profiler in a session that never
polls: a count, not a time, so *off* has to be *bare* exactly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from casfs.syscalls import has_admin_capability
from store.digest import Digest
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import cpu_seconds, ingest, pinned
from tools.bench.sessions import OwnSession, Trace, own_session
from tools.bench.toolchain import PROGRAM, NoCompiler, compile_source, find_toolchain

BARE, OFF, ON = "bare", "off", "on"
_FILES = 500
_SETTLE_SECONDS = 0.02
_PROFILED = 5
_SAME = 1.05
"""Of two sessions that run the same code: so far two medians may be apart."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done to a mount before the clock starts, and then; upcalls and times are divided by `_FILES`."""

    name: str
    before: Callable[[Path], None]
    work: Callable[[Path], None]


def run(settings: Settings) -> Outcome:
    """Pins this process, and so the sessions it starts, to one core, but for the preprocessing."""
    outcome = Outcome()
    bench = Tracing(outcome, settings)
    with pinned(max(os.sched_getaffinity(0))):
        for number, side in alternate((BARE, OFF, ON), settings.rounds(9)):
            for operation in OPERATIONS:
                bench.measure(operation, side, number)
        for operation in OPERATIONS:
            for side in (BARE, OFF, ON):
                bench.count_functions(operation, side)
    for operation in OPERATIONS:
        _set_aims(outcome, operation)
    try:
        bench.measure_preprocessing(settings.rounds(7))
    except NoCompiler as error:
        outcome.notes.append(f"preprocess was left out: {error}")
    return outcome


def _set_aims(outcome: Outcome, operation: Operation) -> None:
    functions, cpu = (
        [outcome.median(f"{operation.name}, {what}", side) for side in (BARE, OFF)]
        for what in ("functions", "daemon CPU")
    )
    more = functions[1] - functions[0]
    outcome.aim(f"{operation.name}: functions more with --trace off", more, 0, "", at_most=True)
    if functions[0]:  # else nobody was asked, and what the clocks show is the mount's making
        outcome.aim(f"{operation.name}: CPU with --trace off", cpu[1] / cpu[0], _SAME, "", at_most=True)


class Tracing:
    """The measures, each on a session made for it."""

    def __init__(self, outcome: Outcome, settings: Settings) -> None:
        self._outcome = outcome
        self._settings = settings
        self._passthrough = has_admin_capability()
        self._store = settings.scratch / "store"
        source = settings.scratch / "tree"
        (source / "directory").mkdir(parents=True)
        for number in range(_FILES):
            _file(source, number).write_bytes(b"%d" % number)
        self._root = ingest(self._store, [(b"", source)], "tree").root
        self._before: dict[tuple[str, str], dict[str, int]] = {}

    @contextmanager
    def _session(
        self, side: str, name: str, root: Digest, *, poll: bool = True, profile: bool = False
    ) -> Iterator[OwnSession]:
        place = self._settings.scratch / f"{name.replace(', ', '-')}-{side}"
        written = place.with_name(f"{place.name}.trace")
        trace: Trace = {BARE: None, OFF: "off"}.get(side, written)
        with own_session(
            self._store, root, place, passthrough=self._passthrough, poll=poll, profile=profile, trace=trace
        ) as session:
            yield session
        written.unlink(missing_ok=True)

    def measure(self, operation: Operation, side: str, number: int) -> None:
        """Wall, the daemon's CPU, and upcalls."""
        with self._session(side, f"{operation.name}-{number}", self._root) as session:
            operation.before(session.path)
            time.sleep(_SETTLE_SECONDS)
            cpu = cpu_seconds(session.pid)
            began = time.perf_counter()
            operation.work(session.path)
            seconds = time.perf_counter() - began
            time.sleep(_SETTLE_SECONDS)
            cpu = cpu_seconds(session.pid) - cpu
        before = self._upcalls_before(operation, side)
        counts = {
            name: round((count - before.get(name, 0)) / _FILES) for name, count in session.statistics["upcalls"].items()
        }
        shown = {name: count for name, count in counts.items() if count}
        self._outcome.add(f"{operation.name}, wall", side, "µs", seconds / _FILES * 1e6, shown)
        self._outcome.add(f"{operation.name}, daemon CPU", side, "µs", cpu / _FILES * 1e6)

    def _upcalls_before(self, operation: Operation, side: str) -> dict[str, int]:
        """Those of what comes before the clock starts, the mount's making included: the same each time."""
        key = operation.name, side
        if key not in self._before:
            with self._session(side, f"{operation.name}-before", self._root) as session:
                operation.before(session.path)
            self._before[key] = session.statistics["upcalls"]
        return self._before[key]

    def count_functions(self, operation: Operation, side: str) -> None:
        """How many functions the daemon calls, less those for what came before: the fewest of some sessions.

        Where the kernel has just dropped something from its caches, an open takes another way, with more.
        """
        counts = []
        for what, work in (("before", _do_nothing), ("all", operation.work)):
            found = []
            for number in range(_PROFILED):
                name = f"{operation.name}-functions-{what}-{number}"
                with self._session(side, name, self._root, poll=False, profile=True) as session:
                    operation.before(session.path)
                    work(session.path)
                    time.sleep(_SETTLE_SECONDS)  # the last RELEASE comes when the kernel likes
                found.append(sum(function.calls for function in session.profile))
            counts.append(min(found))
        self._outcome.add(f"{operation.name}, functions", side, "", (counts[1] - counts[0]) / _FILES)

    def measure_preprocessing(self, rounds: int) -> None:
        """A real compiler that reads headers. Raises NoCompiler."""
        toolchain = find_toolchain()
        source = self._settings.scratch / "program.cc"
        source.write_text(PROGRAM)
        natively = compile_source(toolchain, source, None, mount=None, preprocess=True)
        needed = toolchain.exclude_unneeded(natively)
        root = ingest(self._store, toolchain.grafts(), "headers", excluded=needed).root
        for number, side in alternate((BARE, OFF, ON), rounds):
            with self._session(side, f"preprocess-{number}", root) as session:
                cpu = cpu_seconds(session.pid)
                done = compile_source(toolchain, source, None, mount=session.path, preprocess=True)
                cpu = cpu_seconds(session.pid) - cpu
                if not done.ok:
                    raise RuntimeError(f"the program can't be preprocessed:\n{done.messages}")
            counts = session.statistics["upcalls"]
            shown = {name: count for name, count in counts.items() if count and name not in ("INIT", "DESTROY")}
            self._outcome.add("preprocess, wall", side, "ms", done.seconds * 1e3, shown)
            self._outcome.add("preprocess, daemon CPU", side, "ms", cpu * 1e3)


def _file(top: Path, number: int) -> Path:
    return top / "directory" / f"file{number}"


def _do_nothing(top: Path) -> None:
    return None


def _enter(top: Path) -> None:
    os.stat(top / "directory")


def _miss_each(top: Path) -> None:
    for number in range(_FILES):
        if os.access(f"{top}/directory/missing{number}", os.F_OK):
            raise RuntimeError("a file that doesn't exist was found")


def _stat_each(top: Path) -> None:
    for number in range(_FILES):
        os.stat(f"{top}/directory/file{number}")


def _read_each(top: Path) -> None:
    for number in range(_FILES):
        file = os.open(f"{top}/directory/file{number}", os.O_RDONLY)
        data = os.read(file, 64)
        os.close(file)
        if data != b"%d" % number:
            raise RuntimeError(f"file{number} has other bytes than it should")


OPERATIONS = (
    Operation("missing", _enter, _miss_each),
    Operation("stat, first", _enter, _stat_each),
    Operation("stat, again", _stat_each, _stat_each),
    Operation("open, first", _enter, _read_each),
    Operation("open, again", _read_each, _read_each),
)
