"""What the adaptive polling of the native session gains in a burst, and what it costs when it is of no use.

    burst         2,000 system calls in a row, each an upcall: a stat of a name never asked for
                  before, an open and close of a known file (OPEN, and RELEASE)
    two cores     the same with the client pinned to one core and the daemon to another, where
                  a daemon that sleeps has to be woken across cores; otherwise the scheduler
                  chooses, and for a pair that takes turns it may choose one core
    idle          processor time of the daemon in a second without a request, right after a burst
    cores busy    a loop on every core counting as fast as it can, and a client that asks for
                  something new every 2 ms: how far the loops count with polling on and off
    preprocess    g++ -E of the demonstration's program on a fresh mount: a client that
                  computes between its opens

Sessions are made anew for each repetition, with `poll` as the only difference.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from casfs.syscalls import has_admin_capability
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import Ingested, cpu_seconds, ingest
from tools.bench.sessions import OwnSession, own_session
from tools.bench.toolchain import PROGRAM, Compilation, NoCompiler, Toolchain, compile_source, find_toolchain

_SIDES = {"sleeping": False, "polling": True}
_PAUSE_SECONDS = 0.002


def run(settings: Settings) -> Outcome:
    """With passthrough where this process may."""
    outcome = Outcome()
    bench = _Polling(outcome, settings)
    for number, side in alternate(tuple(_SIDES), settings.rounds(5)):
        bench.measure_session(side, number)
    # Loops with no client and no session at all, too, to know what "nothing" costs.
    for number, side in alternate(("no client", *_SIDES), settings.rounds(5)):
        bench.measure_busy(side, number)
    idle = outcome.median("idle, daemon CPU in 1 s", "polling")
    outcome.aim("idle, daemon CPU in 1 s, polling", idle, 0.1, "ms", at_most=True)
    loops = outcome.median("cores busy, loops", "polling") / outcome.median("cores busy, loops", "sleeping")
    outcome.aim("cores busy: loops with polling against without", loops, 0.95, "", at_most=False)
    try:
        bench.measure_preprocessing(settings.rounds(7))
    except NoCompiler as error:
        outcome.notes.append(f"preprocess was left out: {error}")
        return outcome
    wall = outcome.median("preprocess, wall", "polling") / outcome.median("preprocess, wall", "sleeping")
    outcome.aim("preprocess: time with polling against without", wall, 1.05, "", at_most=True)
    return outcome


class _Polling:
    """The measures, each on sessions made for it."""

    def __init__(self, outcome: Outcome, settings: Settings) -> None:
        self._outcome = outcome
        self._settings = settings
        self._passthrough = has_admin_capability()
        self._store = settings.scratch / "store"
        source = settings.scratch / "file"
        source.mkdir()
        (source / "known").write_bytes(b"x" * 4096)
        self._file = ingest(self._store, [(b"", source)], "file")

    def _session(self, tree: Ingested, side: str, what: str) -> AbstractContextManager[OwnSession]:
        place = self._settings.scratch / f"{what}-{side}"
        return own_session(self._store, tree.root, place, passthrough=self._passthrough, poll=_SIDES[side])

    def measure_session(self, side: str, number: int) -> None:
        """Bursts and idleness."""
        with self._session(self._file, side, f"burst-{number}") as session:
            self._measure_bursts(session, side, "burst")
            time.sleep(0.05)
            cpu = cpu_seconds(session.pid)
            time.sleep(1.0)
            self._outcome.add("idle, daemon CPU in 1 s", side, "ms", (cpu_seconds(session.pid) - cpu) * 1e3)
            cores = sorted(os.sched_getaffinity(0))
            if len(cores) < 2:
                return
            try:
                os.sched_setaffinity(0, {cores[0]})
                os.sched_setaffinity(session.pid, {cores[-1]})
                self._measure_bursts(session, side, "two cores")
            finally:
                os.sched_setaffinity(0, cores)

    def _measure_bursts(self, session: OwnSession, side: str, where: str) -> None:
        calls = self._settings.size(2_000, 200)
        for what, work in (
            ("stat of a new name", partial(_ask_for_missing, session.path, where, calls)),
            ("open and close", partial(_open_and_close, session.path / "known", calls)),
        ):
            cpu = cpu_seconds(session.pid)
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
            cpu = cpu_seconds(session.pid) - cpu
            self._outcome.add(f"{where}, {what}", side, "µs", seconds / calls * 1e6)
            self._outcome.add(f"{where}, {what}, daemon CPU", side, "µs", cpu / calls * 1e6)

    def measure_busy(self, side: str, number: int) -> None:
        """Loops that want every core, beside a client that asks now and then."""
        seconds = 0.2 if self._settings.quick else 1.5
        if side == "no client":
            self._outcome.add("cores busy, loops", side, "M counts/s", _count_on_all_cores(seconds, _do_nothing) / 1e6)
            return
        with self._session(self._file, side, f"busy-{number}") as session:
            client = _Client(session, side)
            cpu = cpu_seconds(session.pid)
            counts = _count_on_all_cores(seconds, client.ask_once)
            cpu = cpu_seconds(session.pid) - cpu
        self._outcome.add("cores busy, loops", side, "M counts/s", counts / 1e6)
        self._outcome.add("cores busy, client's stat", side, "µs", client.seconds / client.calls * 1e6)
        self._outcome.add("cores busy, daemon CPU per stat", side, "µs", cpu / client.calls * 1e6)

    def measure_preprocessing(self, rounds: int) -> None:
        """A real compiler that reads headers. Raises NoCompiler."""
        toolchain = find_toolchain()
        source = self._settings.scratch / "program.cc"
        source.write_text(PROGRAM)
        natively = _preprocess(toolchain, source, None)
        needed = toolchain.exclude_unneeded(natively)
        tree = ingest(self._store, toolchain.grafts(), "headers", excluded=needed)
        for number, side in alternate(tuple(_SIDES), rounds):
            with self._session(tree, side, f"preprocess-{number}") as session:
                cpu = cpu_seconds(session.pid)
                seconds = _preprocess(toolchain, source, session.path).seconds
                cpu = cpu_seconds(session.pid) - cpu
            self._outcome.add("preprocess, wall", side, "ms", seconds * 1e3)
            self._outcome.add("preprocess, daemon CPU", side, "ms", cpu * 1e3)


def _preprocess(toolchain: Toolchain, source: Path, mount: Path | None) -> Compilation:
    done = compile_source(toolchain, source, None, mount=mount, preprocess=True)
    if not done.ok:
        raise RuntimeError(f"the program can't be preprocessed:\n{done.messages}")
    return done


def _do_nothing() -> None:
    return None


def _ask_for_missing(top: Path, tag: str, calls: int) -> None:
    for number in range(calls):
        if os.access(f"{top}/{tag}-{number}", os.F_OK):
            raise RuntimeError("a file that doesn't exist was found")


def _open_and_close(path: Path, calls: int) -> None:
    for _ in range(calls):
        os.close(os.open(path, os.O_RDONLY))


class _Client:
    """Asks for a new name each time, and sums how long the answers took."""

    def __init__(self, session: OwnSession, tag: str) -> None:
        self._top = session.path
        self._tag = tag
        self.calls = 0
        self.seconds = 0.0

    def ask_once(self) -> None:
        """One upcall."""
        path = f"{self._top}/{self._tag}-slow-{self.calls}"
        began = time.perf_counter()
        os.access(path, os.F_OK)
        self.seconds += time.perf_counter() - began
        self.calls += 1


def _count_on_all_cores(seconds: float, ask: Callable[[], None]) -> float:
    """How many counts a second all loops together reach while `ask` is called every 2 ms."""
    children = []
    cores = sorted(os.sched_getaffinity(0))
    reading, writing = os.pipe()
    try:
        for core in cores:
            child = os.fork()
            if child == 0:
                _count(core, seconds, writing)
            children.append(child)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ask()
            time.sleep(_PAUSE_SECONDS)
        rates: list[float] = [struct.unpack("<d", os.read(reading, 8))[0] for _ in cores]
        return sum(rates)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def _count(core: int, seconds: float, writing: int) -> None:
    """In a child: count for so long, write the rate, never return."""
    try:
        os.sched_setaffinity(0, {core})
        count = 0
        began = now = time.perf_counter()
        while now - began < seconds:
            for _ in range(1000):
                count += 1
            now = time.perf_counter()
        os.write(writing, struct.pack("<d", count / (now - began)))
        signal.pause()  # until it is reaped: what it wrote is then surely read
    finally:
        os._exit(1)
