"""10,000 files of 4 KiB in 100 directories: walked, looked at, opened and read.

    walk          os.scandir through the tree with an lstat of every file, as `find -ls` does
    stat          os.stat of every path, the paths known beforehand
    missing       os.access of as many names that don't exist
    open+read     os.open, os.read of all 4 KiB, os.close

*cold* is after dropping all of the kernel's caches (/proc/sys/vm/drop_caches, root
only), on every side: blobs and the host's files come from disk. *first* is the
first time on a fresh mount with the host's caches warm, as after an ingest or in
a build's next action; the host itself has no such state, its *first* is warm.
open+read then knows the names already. *warm* is the same once more.
Microseconds per file; upcalls are those of all files together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import (
    Ingested,
    Mounted,
    drop_caches,
    ingest,
    make_files,
    mounted_tree,
    observe,
    usable_engines,
)

_ENGINES = ("passthrough", "native", "fuse")
_DIRECTORIES = 100
_SIZE = 4096


def run(settings: Settings) -> Outcome:
    """Every round takes two fresh mounts an engine: one begins with the walk, one with the stats.

    A quick run leaves out what is cold: others may be using the machine's caches.
    """
    outcome = Outcome()
    count = settings.size(10_000, 1_000)
    source = settings.scratch / "files"
    names = make_files(source, count, _DIRECTORIES, _SIZE)
    store = settings.scratch / "store"
    tree = ingest(store, [(b"", source)], "files")
    engines, reasons = usable_engines(settings.scratch, _ENGINES)
    outcome.notes += reasons
    phases = _Phases(outcome, names)
    for number, side in alternate(("host", *engines), settings.rounds(5)):
        place = source if side == "host" else settings.scratch / f"{side}-{number}"
        for sequence in (phases.beginning_with_walk, phases.beginning_with_stat):
            _on(side, store, tree, place, sequence)
    # Last, and in fewer rounds: it takes what the other measures want to find in the caches.
    if settings.quick or not drop_caches():
        outcome.notes.append("nothing cold was measured: caches are dropped by root only, and not in a quick run")
        return outcome
    for number, side in alternate(("host", *engines), settings.rounds(3)):
        place = source if side == "host" else settings.scratch / f"{side}-{number}"
        _on(side, store, tree, place, phases.cold)
    return outcome


_Sequence = Callable[[str, Path, Mounted | None], None]


def _on(side: str, store: Path, tree: Ingested, place: Path, sequence: _Sequence) -> None:
    if side == "host":
        sequence(side, place, None)
        return
    with mounted_tree(store, tree.root, place, side, "files") as mounted:
        sequence(side, place, mounted)


class _Phases:
    """The sequences of work on one mount, each phase measured per file."""

    def __init__(self, outcome: Outcome, names: list[str]) -> None:
        self._outcome = outcome
        self._names = names

    def beginning_with_walk(self, side: str, place: Path, mounted: Mounted | None) -> None:
        """Names and attributes come from listings."""
        paths = [f"{place}/{name}" for name in self._names]
        self._twice("walk", side, mounted, lambda: _walk(place))
        self._twice("open+read+close", side, mounted, lambda: _read_all(paths))

    def beginning_with_stat(self, side: str, place: Path, mounted: Mounted | None) -> None:
        """Names are looked up one by one."""
        paths = [f"{place}/{name}" for name in self._names]
        self._twice("stat", side, mounted, lambda: _stat_all(paths))
        self._twice("missing", side, mounted, lambda: _miss_all(paths))

    def cold(self, side: str, place: Path, mounted: Mounted | None) -> None:
        """Each after dropping the caches, the mount's own included."""
        paths = [f"{place}/{name}" for name in self._names]
        for what, work in (
            ("walk", lambda: _walk(place)),
            ("stat", lambda: _stat_all(paths)),
            ("open+read+close", lambda: _read_all(paths)),
        ):
            drop_caches()
            self._measure(f"{what}, cold", side, mounted, work)

    def _twice(self, what: str, side: str, mounted: Mounted | None, work: Callable[[], None]) -> None:
        self._measure(f"{what}, first", side, mounted, work)
        self._measure(f"{what}, warm", side, mounted, work)

    def _measure(self, what: str, side: str, mounted: Mounted | None, work: Callable[[], None]) -> None:
        sample = observe(mounted, work)
        self._outcome.add(what, side, "µs", sample.seconds / len(self._names) * 1e6, sample.upcalls)


def _walk(top: Path) -> None:
    pending = [str(top)]
    while pending:
        with os.scandir(pending.pop()) as listing:
            for entry in listing:
                entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def _stat_all(paths: list[str]) -> None:
    for path in paths:
        os.stat(path)


def _miss_all(paths: list[str]) -> None:
    for path in paths:
        if os.access(f"{path}.missing", os.F_OK):
            raise RuntimeError(f"{path}.missing was found")


def _read_all(paths: list[str]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        data = os.read(descriptor, 2 * _SIZE)
        os.close(descriptor)
        if len(data) != _SIZE:
            raise RuntimeError(f"{path} was read with {len(data)} bytes")
