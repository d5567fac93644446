"""Many cold build clients at once, each with 100 connections and 100 calls in flight on each, and a calm one beside.

    casfs           `casfs serve`, as it is by default, everything durable before it is acknowledged
    bazel-remote    where it is on the PATH: files without compression, written to the disk when the kernel likes
    nativelink      where it is on the PATH: its store of files, checked by size and hash

The clients are a program of our own (tools/bench/fleet). A call has 60 s from its beginning. After a failed upload
QueryWriteStatus asks how much of it the server has; there are five more tries, with a growing pause between them. Blobs
have 500 bytes, a batch has 50 blobs. Each row has a fresh server with an empty store, on the same cores as the clients.

The calm client is another process, and makes one call after the other on one connection: what it waits is what a person
at another machine notices. It asks for capabilities, an action result, a small blob, and whether the server is well. A
call that fails counts as 60 s.

Peak memory is the most of what was resident, seen four times a second, with pages that a server's processes share
counted once (Pss). At the end the load begins anew, and in the middle of it the server gets
SIGTERM; one that still runs after 60 s is killed.
"""

from __future__ import annotations

import time
from pathlib import Path

from store.kernel import raise_open_files
from tools.bench.fleet_program import PROGRAM, Load, Result, storming
from tools.bench.fleet_servers import (
    DRAINED_SECONDS,
    END_SECONDS,
    LoadedServer,
    find_sides,
    loaded_server,
    serves_http,
)
from tools.bench.load import get_generator
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.server import CASFS, MemoryWatch
from tools.bench.workers import Refused

_ROWS = (
    Load("write", 1, 20_000),
    Load("write", 4, 20_000),
    Load("write", 16, 20_000, limit=900),
    Load("http", 4, 5_000),
    Load("batch", 4, 20_000),
    Load("read", 4, 20_000),
)
_BOUNDS = (("calm client, p99", 250, "ms"), ("calm client, max", 1000, "ms"), ("peak memory", 200, "MiB"))
"""Aims of each row, but for those that are compared."""
_QUICK_ROWS = tuple(Load(how, 1, 200, connections=4) for how in ("write", "http", "batch", "read"))
_LONG_CLIENTS = 16
"""A row with so many takes a side minutes: once is enough to see whether it stands, unless told otherwise."""
_TO_SIGTERM_SECONDS = 5.0


def run(settings: Settings) -> Outcome:
    """Without the program there is nothing to measure, without peers nothing beside casfs."""
    outcome = Outcome()
    try:
        program = get_generator(PROGRAM)
    except Refused as refused:
        outcome.notes.append(f"No load was put on a server: {refused}")
        return outcome
    outcome.notes.append(f"The server and the clients may each have {raise_open_files():,} files open.")
    if settings.fleet.core_percent:
        outcome.notes.append(f"The server was held to {settings.fleet.core_percent}% of a core.")
    sides, missing = find_sides()
    outcome.notes += missing
    rows = choose_rows(settings)
    try:
        for number, side in alternate(sides, settings.rounds(3)):
            for row in rows:
                if number and not settings.repeat and row.clients >= _LONG_CLIENTS:
                    continue
                if row.how != "http" or serves_http(side):
                    _measure(settings, outcome, program, side, row)
    except Refused as refused:
        outcome.notes.append(f"The server can't be held to a part of a core: {refused}.")
        return outcome
    for row in rows:
        _compare(outcome, row, sides[1:])
    return outcome


def choose_rows(settings: Settings) -> list[Load]:
    """The usual ones; told a number of clients, one row of each kind with so many."""
    rows = _QUICK_ROWS if settings.quick else _ROWS
    chosen: dict[str, Load] = {}
    for row in rows:
        clients, files = settings.fleet.clients or row.clients, settings.fleet.files or row.files
        load = Load(row.how, clients, files, row.connections, limit=max(row.limit, 75 * clients))
        chosen.setdefault(load.title, load)
    return list(chosen.values())


def _measure(settings: Settings, outcome: Outcome, program: Path, side: str, row: Load) -> None:
    with loaded_server(side, settings.scratch / "server", core_percent=settings.fleet.core_percent) as server:
        served = server.served
        with storming(program, row, served) as storm:
            storm.wait_begun()
            cpu = served.cpu()
            with MemoryWatch(served) as memory:
                result = storm.result()
            cpu = served.cpu() - cpu
        _add(outcome, side, row, result)
        if result.stored:
            outcome.add(f"{row.title}: server CPU a blob", side, "µs", 1e6 * cpu / result.stored)
        outcome.add(f"{row.title}: peak memory", side, "MiB", memory.most)
        _end_in_mid_storm(outcome, program, side, row, server, result.seconds)


def _add(outcome: Outcome, side: str, row: Load, result: Result) -> None:
    outcome.add(f"{row.title}: stored", side, "blobs", result.stored)
    outcome.add(f"{row.title}: failed", side, "blobs", result.failed)
    outcome.add(f"{row.title}: wall", side, "s", result.seconds)
    outcome.add(f"{row.title}: tries of calls", side, "", result.tries)
    calm = result.calm["all"]
    for name, value in (("p50", calm.p50), ("p99", calm.p99), ("max", calm.most)):
        outcome.add(f"{row.title}: calm client, {name}", side, "ms", value)
    for call, latencies in result.calm.items():
        if call != "all" and latencies.calls:
            outcome.add(f"{row.title}: calm client, {call}, p99", side, "ms", latencies.p99)
    if result.causes:
        causes = ", ".join(f"{name} {count:,}" for name, count in sorted(result.causes.items()))
        outcome.notes.append(f"{side}, {row.title}: failed tries: {causes}; the last: {result.sample}")


def _end_in_mid_storm(
    outcome: Outcome, program: Path, side: str, row: Load, server: LoadedServer, usual_seconds: float
) -> None:
    """SIGTERM while the same load is on, of other blobs where it writes."""
    title = f"{row.title}: from SIGTERM in mid-storm to the end"
    # Small loads are over soon.
    seed = row.seed if row.how == "read" else row.seed + 1
    again = Load(row.how, row.clients, row.files, row.connections, row.streams, seed, row.limit)
    with storming(program, again, server.served) as storm:
        try:
            storm.wait_begun()
        except RuntimeError as error:
            # What one storm has left of it takes no other; that it ends is asked nevertheless.
            outcome.notes.append(f"{side}, {row.title}: the second load could not begin: {error}")
        time.sleep(min(_TO_SIGTERM_SECONDS, usual_seconds / 4))
        if not storm.is_on():
            outcome.notes.append(f"{side}, {row.title}: the second load was over before SIGTERM")
        seconds = server.end()
    if seconds is None:
        outcome.notes.append(
            f"{side}, {row.title}: still ran {END_SECONDS:.0f} s after SIGTERM and was killed: {server.complaint()}"
        )
    outcome.add(title, side, "s", END_SECONDS if seconds is None else seconds)


def _compare(outcome: Outcome, row: Load, peers: list[str]) -> None:
    failed, ended = (f"{row.title}: {what}" for what in ("failed", "from SIGTERM in mid-storm to the end"))
    outcome.aim(failed, outcome.median(failed, CASFS), 0, "blobs", at_most=True)
    outcome.aim(ended, outcome.median(ended, CASFS), DRAINED_SECONDS, "s", at_most=True)
    for what, most, unit in _BOUNDS:
        name = f"{row.title}: {what}"
        outcome.aim(name, outcome.median(name, CASFS), most, unit, at_most=True)
    for peer in peers:
        ratios = []
        for what in ("wall", "server CPU a blob", "peak memory", "calm client, p99"):
            ours, theirs = (outcome.find(f"{row.title}: {what}", side) for side in (CASFS, peer))
            if ours is not None and theirs is not None and theirs.median:
                ratios.append(f"{what} {ours.median / theirs.median:.2f}")
        if ratios:
            outcome.notes.append(f"{row.title}: casfs to {peer}: {', '.join(ratios)} times")
        wall = outcome.find(f"{row.title}: wall", peer)
        if wall is not None and wall.median:
            ratio = outcome.median(f"{row.title}: wall", CASFS) / wall.median
            outcome.aim(f"{row.title}: wall, level with {peer}", ratio, 1.0, "times", at_most=True)
