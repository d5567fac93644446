"""The remote cache over gRPC: calls a second, how long they take, and the server's CPU for each; ghz is the client.

    casfs          `casfs serve`, as it is by default, everything durable before it is acknowledged
    bare grpcio    a server of grpcio that does nothing: answers lie ready, requests aren't parsed

One call at a time, and 32 in flight over 4 connections; ghz has the same cores, and where it makes new blobs for each
call (Write) that costs it more than the bare server. What bazel-remote 2.x did on a machine like ours
(2 cores, 32 in flight, no compression) stands as a mark: it was measured once, and not in this run. Then the
start with an index of many blobs.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

from store.blobs import BlobRow, pack_row
from store.digest import DigestFunction
from store.index import Table
from store.repository import Store
from tools.bench.load import Generator, get_generator
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.server_calls import Call, fill, list_calls
from tools.bench.workers import Refused
from tools.server.storing_process import NAME

CASFS = "casfs"
BARE = "bare grpcio"
_IN_FLIGHT = (1, 32)
_LOOK_SECONDS = 0.25
_BARE_MARKS = {
    "FindMissingBlobs(1,000)": 2200,
    "BatchReadBlobs, 100 of 1 KB": 2800,
    "BatchUpdateBlobs, 100 new of 1 KB": 1030,
    "Read 4 MiB": 262,
}
"""Calls a second of a server of grpcio that does nothing, on the machine where the marks were measured: so the marks of
what has to be level with bazel-remote are known for a machine of another speed, too."""
_TICKS = os.sysconf("SC_CLK_TCK")
_START_SECONDS = 120.0
_START_MOST = 3.0


def run(settings: Settings) -> Outcome:
    """Without ghz only the start is measured."""
    outcome = Outcome()
    generator = random.Random(0)  # noqa: S311 - bytes that can't be compressed
    place = settings.scratch / "store"
    with Store.open(place) as store:
        filled = fill(store, generator)
    try:
        load = Generator(get_generator())
    except Refused as refused:
        outcome.notes.append(f"No load was put on the server: {refused}")
    else:
        calls = list_calls(filled, settings.size(30, 1), generator)
        _measure_calls(settings, outcome, load, calls, place)
    _measure_start(settings, outcome)
    return outcome


class Served(NamedTuple):
    """A server process."""

    address: str
    pid: int
    http: str = ""
    """Where it serves HTTP, if it does."""

    @property
    def pids(self) -> list[int]:
        """The process, and the one that stores for it; not the actions that it may run."""
        children = map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())
        return [self.pid, *(pid for pid in children if _name_of(pid) == NAME)]

    def cpu(self) -> float:
        """Seconds of CPU they have used."""
        stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.pids)
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / _TICKS

    def memory(self) -> float:
        """MiB of their own that they have in memory now; what they share with each other counts once."""
        return self._sum_of("Pss_Anon")

    def resident(self) -> float:
        """MiB they have in memory now, files that they have mapped included; what they share counts once."""
        return self._sum_of("Pss")

    def _sum_of(self, field: str) -> float:
        """0 when they have ended."""
        with suppress(OSError):
            return sum(_find_kib(Path(f"/proc/{pid}/smaps_rollup"), field) for pid in self.pids) / 1024
        return 0.0


def _name_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _find_kib(file: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", file.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


class MemoryWatch:
    """The most that a server has in memory: a context manager, in which it is asked often. `most` is in MiB."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.most = 0.0

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        self.most = max(self.most, self._served.resident())

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()


def read_addresses(process: subprocess.Popen[str], command: list[str]) -> Served:
    """Where a casfs that was just started says it serves. Raises RuntimeError."""
    lines = [process.stdout.readline() for _ in range(1 + ("--http-listen" in command))] if process.stdout else []
    grpc, http = (re.search(rf"{scheme}://(\S+)", "".join(lines)) for scheme in ("grpc", "http"))
    if grpc is None:
        raise RuntimeError(f"{' '.join(command)}: it said {lines}")
    return Served(grpc[1], process.pid, http[1] if http else "")


@contextmanager
def serving(command: list[str]) -> Iterator[Served]:
    """A process that says where it serves, and ends with SIGTERM."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    try:
        yield read_addresses(process, command)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_START_SECONDS)
        if process.stdout is not None:
            process.stdout.close()


def casfs_command(store: Path) -> list[str]:
    """What serves a store, anywhere on this machine."""
    return ["tools.main", "serve", "--store", str(store), "--listen", "127.0.0.1:0"]


def _measure_calls(settings: Settings, outcome: Outcome, load: Generator, calls: list[Call], store: Path) -> None:
    for call in calls:
        answers = settings.scratch / "answers.json"
        answers.write_text(json.dumps({call.method.path: (call.bare[0].hex(), call.bare[1])}))
        commands = {CASFS: casfs_command(store), BARE: ["tools.bench.bare_grpc", str(answers)]}
        for _, side in alternate(list(commands), settings.rounds(3)):
            with serving(commands[side]) as server:
                for in_flight in _IN_FLIGHT:
                    _measure(outcome, load, call, side, server, in_flight)
        rate = outcome.median(_title(call, 32), CASFS)
        outcome.aim(f"{call.what}: level with bazel-remote's mark", rate, call.mark, "/s", at_most=False)
        if call.what in _BARE_MARKS:
            outcome.aim(
                f"{call.what}: as near to bare grpcio as bazel-remote's mark is to its own",
                rate / outcome.median(_title(call, 32), BARE),
                call.mark / _BARE_MARKS[call.what],
                "",
                at_most=False,
            )


def _measure(outcome: Outcome, load: Generator, call: Call, side: str, server: Served, in_flight: int) -> None:
    data = call.data(call.calls)
    before = server.cpu()
    done = load.run(server.address, call.method, data, calls=call.calls, in_flight=in_flight)
    cpu = server.cpu() - before
    outcome.add(_title(call, in_flight), side, "/s", done.rate)
    outcome.add(f"{_title(call, in_flight)}, p50", side, "ms", done.p50)
    outcome.add(f"{_title(call, in_flight)}, p99", side, "ms", done.p99)
    outcome.add(f"{_title(call, in_flight)}, server CPU", side, "ms", 1000 * cpu / call.calls)


def _title(call: Call, in_flight: int) -> str:
    return f"{call.what}, {in_flight} in flight"


def _measure_start(settings: Settings, outcome: Outcome) -> None:
    """How long a server takes to its first answer, with an index of many blobs and with an empty one."""
    many = settings.size(10_000_000, 10_000)
    for rows, side in ((0, "no blobs"), (many, f"{many:,} blobs")):
        place = settings.scratch / f"store-of-{rows}"
        with Store.open(place) as store:
            fill_index(store, rows)
        for _ in range(settings.rounds(3)):
            began = time.perf_counter()
            with serving(casfs_command(place)) as server:
                seconds = time.perf_counter() - began
                memory = server.memory()
            outcome.add("start of the server", side, "s", seconds)
            outcome.add("memory of the server at its start", side, "MiB", memory)
    slower = outcome.median("start of the server", f"{many:,} blobs") / outcome.median(
        "start of the server", "no blobs"
    )
    outcome.aim(f"start with {many:,} blobs, to that with none", slower, _START_MOST, "times", at_most=True)


def fill_index(store: Store, rows: int) -> None:
    """Rows for so many blobs whose files don't exist."""
    value = pack_row(BlobRow(1024, int(time.time()), executable=False))
    step = (1 << 64) // max(rows, 1)
    first = bytes((DigestFunction.SHA256,))
    keys = (first + (number * step).to_bytes(8, "big") + bytes(24) for number in range(rows))
    store.index.update(lambda change: change.append(Table.BLOBS, ((key, value) for key in keys)))
