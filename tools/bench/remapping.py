"""Changing what a mount shows while it is mounted: remaps a second, and what they cost who uses it meanwhile.

The mount has 10,000 files in 100 directories, all of them looked at before each step: so each change is of a name that
the kernel has cached, or (*put beside*) has cached as missing. A remap counts once it has returned: from then on a new
open sees the new state, which is checked each time.

    one step        all files in one call: each has another blob, or is a file of the host instead, or is put beside
                    under a new name, or (what was put beside) is taken away
    a call each     one change a call, over one connection (`casfs.control.steer`)
    a connection    one change a call, each over a connection of its own (`casfs.control.remap`)
    each

*CPU* is the daemon's, a change. *Looking again* is a stat of all files after 100 of them have changed: its upcalls are
what a remap takes out of the kernel's caches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from casfs import control
from casfs.changes import Change
from store.entries import FileEntry, ReferenceEntry, Stamp
from store.repository import Store
from store.trees import get_directory, walk
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import (
    Ingested,
    Mounted,
    cpu_seconds,
    in_child,
    ingest,
    make_files,
    mounted_tree,
    observe,
    usable_engines,
)

_ENGINES = ("passthrough", "native", "fuse")
_DIRECTORIES = 100
_A_SECOND = 10_000
"""Remaps: what the project wants."""

Step = tuple[list[Change], Callable[[Path], None]]
"""Changes, and what checks that a mount shows them."""


def run(settings: Settings) -> Outcome:
    """Every round takes a fresh mount an engine."""
    outcome = Outcome()
    count = settings.size(10_000, 400)
    source = settings.scratch / "files"
    names = make_files(source, count, _DIRECTORIES)
    store = settings.scratch / "store"
    tree = ingest(store, [(b"", source)], "files")
    blobs = in_child(lambda: _blobs_of(store, tree))
    engines, reasons = usable_engines(settings.scratch, _ENGINES)
    outcome.notes += reasons
    bench = _Remapping(outcome, source, names, blobs)
    for number, side in alternate(engines, settings.rounds(5)):
        with mounted_tree(store, tree.root, settings.scratch / f"{side}-{number}", side, "files") as mounted:
            bench.measure_steps(side, mounted)
            bench.measure_calls(side, mounted, settings.size(1_000, 40))
            bench.measure_looking_again(side, mounted)
    for what in ("one step, other blobs", "a call each"):
        outcome.aim(f"{what}, {engines[0]}", outcome.median(what, engines[0]), _A_SECOND, "/s", at_most=False)
    return outcome


def _blobs_of(store: Path, tree: Ingested) -> dict[str, FileEntry]:
    with Store.open(store) as opened, opened.index.view() as view:
        found = walk(view, get_directory(view, tree.root))
        return {os.fsdecode(path): entry for path, entry in found if isinstance(entry, FileEntry)}


class _Remapping:
    """The measures, each of which leaves the mount as it was, or with other contents."""

    def __init__(self, outcome: Outcome, source: Path, names: list[str], blobs: dict[str, FileEntry]) -> None:
        self._outcome = outcome
        self._source = source
        self._names = names
        self._blobs = blobs

    def _moved(self, by: int) -> dict[str, str]:
        """For each file another one, whose contents it shall have."""
        return {name: self._names[(place + by) % len(self._names)] for place, name in enumerate(self._names)}

    def _replaced(self, by: int) -> Step:
        moved = self._moved(by)
        changes = [Change("replace", os.fsencode(name), self._put(name, other)) for name, other in moved.items()]
        return changes, lambda top: _check(top, moved)

    def _put(self, name: str, other: str) -> FileEntry:
        return self._blobs[other]._replace(name=os.fsencode(os.path.basename(name)))

    def _steps(self) -> dict[str, Step]:
        host, beside, taken = [], [], []
        for name in self._names:
            path = os.fsencode(self._source / name)
            entry = ReferenceEntry(os.fsencode(os.path.basename(name)), path, Stamp.of(os.stat(path)), False)
            host.append(Change("replace", os.fsencode(name), entry))
            other = os.fsencode(_beside(name))
            beside.append(Change("add", other, self._put(_beside(name), name)))
            taken.append(Change("remove", other))
        same = {name: name for name in self._names}
        return {
            "one step, other blobs": self._replaced(1),
            "one step, files of the host": (host, lambda top: _check(top, same)),
            "one step, put beside": (beside, lambda top: _check(top, {_beside(name): name for name in self._names})),
            "one step, taken away": (taken, lambda top: _check_missing(top, [_beside(name) for name in self._names])),
        }

    def measure_steps(self, side: str, mounted: Mounted) -> None:
        """All files at once."""
        for what, (changes, check) in self._steps().items():
            self._look(mounted.path)

            def remap(changes: list[Change] = changes) -> None:
                control.remap(mounted.path, changes)

            self._measure(what, side, mounted, len(changes), remap)
            check(mounted.path)

    def measure_calls(self, side: str, mounted: Mounted, calls: int) -> None:
        """One change after the other."""
        for by, what, connected in ((2, "a call each", True), (3, "a connection each", False)):
            changes, _ = self._replaced(by)
            chosen = changes[:: max(1, len(changes) // calls)][:calls]
            self._look(mounted.path)
            with ExitStack() as stack:
                connection = stack.enter_context(control.steer(mounted.path)) if connected else None

                def remap(chosen: list[Change] = chosen, connection: control.Connection | None = connection) -> None:
                    for change in chosen:
                        if connection is None:
                            control.remap(mounted.path, [change])
                        else:
                            connection.remap([change])

                self._measure(what, side, mounted, len(chosen), remap)
            moved = self._moved(by)
            _check(mounted.path, {os.fsdecode(change.path): moved[os.fsdecode(change.path)] for change in chosen})

    def measure_looking_again(self, side: str, mounted: Mounted) -> None:
        """What a step makes the kernel ask for again: 100 changes, spread over all directories."""
        self._look(mounted.path)
        changes, _ = self._replaced(4)
        control.remap(mounted.path, changes[:: len(changes) // _DIRECTORIES])
        sample = observe(mounted, lambda: self._look(mounted.path, missing=False))
        self._outcome.add("looking again", side, "µs", sample.seconds / len(self._names) * 1e6, sample.upcalls)

    def _measure(self, what: str, side: str, mounted: Mounted, changes: int, remap: Callable[[], None]) -> None:
        cpu = cpu_seconds(mounted.pid)
        began = time.perf_counter()
        remap()
        seconds = time.perf_counter() - began
        cpu = cpu_seconds(mounted.pid) - cpu
        self._outcome.add(what, side, "/s", changes / seconds)
        self._outcome.add(f"{what}, CPU", side, "µs", cpu / changes * 1e6)

    def _look(self, top: Path, *, missing: bool = True) -> None:
        """Have the kernel cache every name, and that those beside are missing."""
        for name in self._names:
            os.stat(f"{top}/{name}")
            if missing:
                os.access(f"{top}/{_beside(name)}", os.F_OK)


def _beside(name: str) -> str:
    return f"{name}.new"


def _check(top: Path, contents: dict[str, str]) -> None:
    """Raise RuntimeError unless each file has the path of that other one in it."""
    for name, other in contents.items():
        with open(f"{top}/{name}", "rb", buffering=0) as file:
            if file.read() != other.encode():
                raise RuntimeError(f"{name} doesn't show what it was remapped to")


def _check_missing(top: Path, names: list[str]) -> None:
    for name in names:
        if os.access(f"{top}/{name}", os.F_OK):
            raise RuntimeError(f"{name} is there after it was taken away")
