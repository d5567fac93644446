"""A thousand sandboxes, one after the other: opened on a tree of 100 files, `true` run in each, captured, closed.

The command comes from the tree (a static busybox). *bwrap alone* is the same
command line of bubblewrap that the sandbox starts, started on a sandbox that is
open already; *overhead* is all of the sandbox's time less that. Each of these
values is the median of 200 sandboxes. Then as many by two threads of a process,
and by two processes. Then sandboxes for as long as patience lasts, 10,000 at
most: what the process and the kernel hold in the first quarter of them and in
the last.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tools.bench.casfs_side import KERNEL, KERNEL_USER
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.ordinary_user import NOBODY, NOT_ROOT
from tools.bench.sandbox_worker import PARTS
from tools.bench.small_image import ingest_image
from tools.bench.workers import Worker, asked

_WORKER = "tools.bench.sandbox_worker"
_PATIENCE_SECONDS = 240.0
_MOST = 10_000
_WHOLE_MACHINE = "of the whole machine"


def run(settings: Settings) -> Outcome:
    """A quick run opens some dozens. Raises Refused without busybox."""
    outcome = Outcome()
    store = settings.scratch / "store"
    root = str(ingest_image(store, settings.scratch).root)
    with ExitStack() as stack:

        def start(place: Path, reachable: Path | None = None) -> Worker:
            options = {"store": str(place), "root": root, "engine": KERNEL}
            return stack.enter_context(asked(_WORKER, json.dumps(options), reachable=reachable))

        workers = {KERNEL: start(store)}
        if os.geteuid():
            outcome.notes.append(f"{KERNEL_USER} was left out: {NOT_ROOT}")
        else:
            home = _give_store(store, settings.scratch / "user")
            workers[KERNEL_USER] = start(home / store.name, home)
        _measure_parts(outcome, settings, workers, start(store))
        _measure_together(outcome, settings, workers[KERNEL], start(store))
        _measure_growth(outcome, settings, workers[KERNEL])
    return outcome


def _give_store(store: Path, home: Path) -> Path:
    """A copy of the store in a directory that is the ordinary user's."""
    home.mkdir()
    shutil.copytree(store, home / store.name)
    for directory, names, files in os.walk(home):
        for path in (directory, *(os.path.join(directory, name) for name in names + files)):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    return home


def _measure_parts(outcome: Outcome, settings: Settings, workers: dict[str, Worker], bare: Worker) -> None:
    count = settings.size(200, 8)
    for worker in workers.values():
        worker.ask(many=3, threads=1)  # what is made once
    for _, side in alternate(list(workers), settings.rounds(5)):
        alone = statistics.median(bare.ask(bare=max(count // 4, 2))["seconds"])
        outcome.add("bwrap alone", "bwrap", "ms", alone * 1e3)
        parts = workers[side].ask(many=count, threads=1)["parts"]
        for part, seconds in zip(PARTS, zip(*parts, strict=True), strict=True):
            outcome.add(part, side, "ms", statistics.median(seconds) * 1e3)
        outcome.add("overhead", side, "ms", (statistics.median(map(sum, parts)) - alone) * 1e3)
    for side in workers:
        outcome.aim(f"overhead of a sandbox, {side}", outcome.median("overhead", side), 8, "ms", at_most=True)


def _measure_together(outcome: Outcome, settings: Settings, one: Worker, other: Worker) -> None:
    count = settings.size(200, 8)
    other.ask(many=3, threads=1)

    def in_processes() -> None:
        for worker in (one, other):
            worker.tell(many=count // 2, threads=1)
        for worker in (one, other):
            worker.answer()

    sides: dict[str, Callable[[], object]] = {
        "one thread": lambda: one.ask(many=count, threads=1),
        "two threads": lambda: one.ask(many=count, threads=2),
        "two processes": in_processes,
    }
    for _, side in alternate(list(sides), settings.rounds(3)):
        began = time.perf_counter()
        sides[side]()
        outcome.add("sandboxes", side, "/s", count / (time.perf_counter() - began))


def _measure_growth(outcome: Outcome, settings: Settings, worker: Worker) -> None:
    """In chunks, with a look at what is held after each."""
    most, chunk = settings.size(_MOST, 16), settings.size(100, 2)
    samples: list[dict[str, float]] = []
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while len(samples) * chunk < most and (time.monotonic() < deadline or len(samples) < 4):
        worker.ask(many=chunk, threads=1)
        samples.append(worker.ask())
    quarter = len(samples) // 4
    done = len(samples) * chunk
    for what in samples[0]:
        unit = "" if what in ("descriptors", "mounts") else "MB"
        for when, part in (("first quarter", samples[:quarter]), ("last quarter", samples[-quarter:])):
            for sample in part:
                outcome.add(what, when, unit, sample[what])
        before, after = outcome.median(what, "first quarter"), outcome.median(what, "last quarter")
        if unit == "":
            outcome.aim(f"{what} gained in {done:,} sandboxes", after - before, 0, "", at_most=True)
        elif _WHOLE_MACHINE not in what:
            outcome.aim(f"{what}, last quarter of {done:,} against the first", after / before, 1.05, "", at_most=True)
    reason = "" if done == most else f": {most:,} would have taken longer than {_PATIENCE_SECONDS:.0f} s"
    outcome.notes.append(f"growth is over {done:,} sandboxes{reason}")
