"""10,000 files of 4 KiB in 100 directories: walked, looked at, opened and read.

    walk          os.scandir through the tree with an lstat of every file, as `find -ls` does
    stat          os.stat of every path, the paths known beforehand
    open+read     os.open, os.read of all 4 KiB, os.close, on names the kernel knows

*cold* is the first time on a fresh mount: nothing in the kernel's caches of that
mount, the blobs in the host's page cache. *warm* is the same once more. The
host's own directory has no cold state without a reboot and is always warm.
Microseconds per file; upcalls are those of all files together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import Ingested, Mounted, ingest, mounted_tree, observe, usable_engines

_ENGINES = ("passthrough", "native", "fuse")
_DIRECTORIES = 100
_SIZE = 4096


def run(settings: Settings) -> Outcome:
    """Every round takes two fresh mounts an engine: one begins with the walk, one with the stats."""
    outcome = Outcome()
    count = settings.size(10_000, 1_000)
    source = settings.scratch / "files"
    names = _make_files(source, count)
    store = settings.scratch / "store"
    tree = ingest(store, [(b"", source)], "files")
    engines, reasons = usable_engines(settings.scratch, _ENGINES)
    outcome.notes += reasons
    phases = _Phases(outcome, names)
    for number, side in alternate(("host", *engines), settings.rounds(5)):
        place = source if side == "host" else settings.scratch / f"{side}-{number}"
        for sequence in (phases.beginning_with_walk, phases.beginning_with_stat):
            _on(side, store, tree, place, sequence)
    return outcome


_Sequence = Callable[[str, Path, Mounted | None], None]


def _on(side: str, store: Path, tree: Ingested, place: Path, sequence: _Sequence) -> None:
    if side == "host":
        sequence(side, place, None)
        return
    with mounted_tree(store, tree.root, place, side, "files") as mounted:
        sequence(side, place, mounted)


def _make_files(top: Path, count: int) -> list[str]:
    """Files with different contents; their paths relative to `top`."""
    names = []
    for directory in range(_DIRECTORIES):
        (top / f"d{directory:02}").mkdir(parents=True)
        for file in range(count // _DIRECTORIES):
            name = f"d{directory:02}/file{file:03}.h"
            (top / name).write_bytes(name.encode().ljust(_SIZE, b"."))
            names.append(name)
    os.sync()  # what is written back later would be measured with the first sides
    return names


class _Phases:
    """The sequences of work on one mount, each phase measured per file."""

    def __init__(self, outcome: Outcome, names: list[str]) -> None:
        self._outcome = outcome
        self._names = names

    def beginning_with_walk(self, side: str, place: Path, mounted: Mounted | None) -> None:
        """Names and attributes come from listings."""
        paths = [f"{place}/{name}" for name in self._names]
        self._measure("walk, cold", side, mounted, lambda: _walk(place))
        self._measure("walk, warm", side, mounted, lambda: _walk(place))
        self._measure("open+read+close, cold", side, mounted, lambda: _read_all(paths))
        self._measure("open+read+close, warm", side, mounted, lambda: _read_all(paths))

    def beginning_with_stat(self, side: str, place: Path, mounted: Mounted | None) -> None:
        """Names are looked up one by one."""
        paths = [f"{place}/{name}" for name in self._names]
        self._measure("stat, cold", side, mounted, lambda: _stat_all(paths))
        self._measure("stat, warm", side, mounted, lambda: _stat_all(paths))

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


def _read_all(paths: list[str]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        data = os.read(descriptor, 2 * _SIZE)
        os.close(descriptor)
        if len(data) != _SIZE:
            raise RuntimeError(f"{path} was read with {len(data)} bytes")
