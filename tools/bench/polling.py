"""What the adaptive polling of the native session gains in a burst, and what it costs when it is of no use.

    burst         2,000 system calls in a row, each an upcall: a stat of a name never asked for
                  before, an open and close of a known file (OPEN, and RELEASE)
    idle          processor time of the daemon in 2 seconds without a request, right after a burst
    cores busy    a loop on every core counting as fast as it can, and a client that asks for
                  something new every 2 ms: how far the loops count with polling on and off

Sessions are made anew for each repetition, with `poll` as the only difference.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from casfs.syscalls import has_admin_capability
from store.digest import Digest
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import cpu_seconds, ingest
from tools.bench.sessions import OwnSession, own_session

_SIDES = {"sleeping": False, "polling": True}
_PAUSE_SECONDS = 0.002


def run(settings: Settings) -> Outcome:
    """With passthrough where this process may."""
    outcome = Outcome()
    passthrough = has_admin_capability()
    source = settings.scratch / "file"
    source.mkdir()
    (source / "known").write_bytes(b"x" * 4096)
    store = settings.scratch / "store"
    root = ingest(store, [(b"", source)], "file").root
    # Loops with no client and no session at all, to know what "nothing" costs.
    seconds = 0.3 if settings.quick else 2.0
    for number, side in alternate(("no client", *_SIDES), settings.rounds(5)):
        if side == "no client":
            outcome.add("cores busy, loops", side, "M counts/s", _count_on_all_cores(seconds, _do_nothing) / 1e6)
            continue
        place = settings.scratch / f"{side}-{number}"
        _measure(outcome, settings, store, root, place, side, passthrough, seconds)
    idle = outcome.median("idle, daemon CPU in 2 s", "polling")
    outcome.aim("idle, daemon CPU in 2 s, polling", idle, 0.1, "ms", at_most=True)
    return outcome


def _do_nothing() -> None:
    return None


def _measure(
    outcome: Outcome,
    settings: Settings,
    store: Path,
    root: Digest,
    place: Path,
    side: str,
    passthrough: bool,
    seconds: float,
) -> None:
    calls = settings.size(2_000, 200)
    with own_session(store, root, place, passthrough=passthrough, poll=_SIDES[side]) as session:
        for what, work in (
            ("burst, stat of a new name", partial(_ask_for_missing, session.path, "burst", calls)),
            ("burst, open and close", partial(_open_and_close, session.path / "known", calls)),
        ):
            cpu = cpu_seconds(session.pid)
            began = time.perf_counter()
            work()
            outcome.add(what, side, "µs", (time.perf_counter() - began) / calls * 1e6)
            outcome.add(f"{what}, daemon CPU", side, "µs", (cpu_seconds(session.pid) - cpu) / calls * 1e6)
        time.sleep(0.05)
        cpu = cpu_seconds(session.pid)
        time.sleep(2.0)
        outcome.add("idle, daemon CPU in 2 s", side, "ms", (cpu_seconds(session.pid) - cpu) * 1e3)
        cpu = cpu_seconds(session.pid)
        client = _Client(session, side)
        counts = _count_on_all_cores(seconds, client.ask_once)
        outcome.add("cores busy, loops", side, "M counts/s", counts / 1e6)
        outcome.add("cores busy, client's stat", side, "µs", client.seconds / client.calls * 1e6)
        per_call = (cpu_seconds(session.pid) - cpu) / client.calls
        outcome.add("cores busy, daemon CPU per stat", side, "µs", per_call * 1e6)


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
