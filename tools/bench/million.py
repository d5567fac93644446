"""A manifest of 1,000,000 entries beside one of 1,000: built, mounted, looked at.

*Build* is everything from entries in memory to a durable, interned tree
(`TreeBuilder.add_paths`, nothing is hashed but Directory messages); *import*
does the same from the manifest's text (`Importer.from_text`), parsing included.
All files share one real blob, so no contents are hashed and none are missing.

*First stat* runs from the call of `casfs.mounting.start` (probing the kernel,
forking the daemon, opening the store) to the answer of an os.stat of a file
three levels down. The daemon's memory is its peak RSS as getrusage has it, then
RSS, PSS and anonymous memory from smaps_rollup. Pages of the index that it has
looked at are in RSS and PSS though they are page cache, which other daemons
share and the kernel takes back when it needs them; *anonymous* is its own.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from store.digest import Digest, DigestFunction
from store.entries import FileEntry
from store.manifest_text import format_manifest
from store.repository import Store
from store.treebuilder import TreeBuilder
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import Mounted, in_child, mounted_tree, observe, usable_engines

_SMALL = 1_000
_WIDTH = 100
"""Entries per directory."""
_IMPORTS = 2
"""Rounds that import, as that takes a while."""


def run(settings: Settings) -> Outcome:
    """A quick run has 20,000 entries for a million."""
    outcome = Outcome()
    large = settings.size(1_000_000, 20_000)
    engines, reasons = usable_engines(settings.scratch, ("auto",))
    outcome.notes += reasons
    roots = {}
    for number, side in alternate((str(large), str(_SMALL)), settings.rounds(3)):
        count = int(side)
        store = settings.scratch / f"store-{count}-{number}"
        roots[count] = store, _measure_build(outcome, store, count)
        if number < _IMPORTS:
            _measure_import(outcome, settings.scratch / f"import-{count}-{number}", count)
    rate = outcome.median("build", _label(large))
    outcome.aim(f"build of {large:,} entries", rate, 100_000, "entries/s", at_most=False)
    for number, side in alternate((str(large), str(_SMALL)), settings.rounds(7)):
        count = int(side)
        store, root = roots[count]
        _measure_mount(outcome, store, root, count, settings.scratch / f"mount-{count}-{number}", engines[0])
    outcome.aim(f"first stat, {large:,} entries", outcome.median("first stat", _label(large)), 0.3, "s", at_most=True)
    _measure_walk(outcome, *roots[large], large, settings.scratch / "walked", engines[0])
    for what in ("daemon memory after the first stat, peak RSS", "daemon memory after a walk of everything, anonymous"):
        outcome.aim(f"{what}, {large:,} entries", outcome.median(what, _label(large)), 100, "MB", at_most=True)
    return outcome


def _label(count: int) -> str:
    return f"{count:,} entries"


def _entries(count: int, digest: Digest) -> Iterator[tuple[bytes, FileEntry]]:
    """Files in two levels of directories, every directory different, in path order."""
    for number in range(count):
        upper, middle = divmod(number // _WIDTH, _WIDTH)
        name = b"file%07d.h" % number
        yield b"d%03d/d%03d/%s" % (upper, middle, name), FileEntry(name, digest, False)


def _last_path(count: int) -> str:
    digest = Digest(DigestFunction.BLAKE3, bytes(32), 0)
    *_, (path, _) = _entries(count, digest)
    return os.fsdecode(path)


def _add_blob(store: Store) -> Digest:
    with store.ingest() as ingest:
        return ingest.add_bytes(b"#pragma once\n", DigestFunction.BLAKE3)


def _measure_build(outcome: Outcome, root: Path, count: int) -> Digest:
    def work() -> tuple[Digest, float, float]:
        with Store.open(root) as store:
            items = list(_entries(count, _add_blob(store)))
            began = time.perf_counter()
            with store.ingest() as ingest:
                builder = TreeBuilder(store.index, ingest, DigestFunction.BLAKE3)
                directory = builder.finish(builder.add_paths(items))
            built = time.perf_counter()
            store.manifests.put("entries", directory.digest, "a benchmark", replace=True)
            return directory.digest, built - began, time.perf_counter() - built

    digest, seconds, naming = in_child(work)
    outcome.add("build", _label(count), "entries/s", count / seconds)
    outcome.add("naming the manifest (counts missing blobs)", _label(count), "s", naming)
    return digest


def _measure_import(outcome: Outcome, root: Path, count: int) -> None:
    def work() -> float:
        with Store.open(root) as store:
            lines = list(format_manifest(_entries(count, _add_blob(store)), DigestFunction.BLAKE3))
            began = time.perf_counter()
            store.importer.from_text(lines, "a benchmark")
            return time.perf_counter() - began

    outcome.add("import from text", _label(count), "entries/s", count / in_child(work))


def _measure_mount(outcome: Outcome, store: Path, root: Digest, count: int, place: Path, engine: str) -> None:
    path = place / _last_path(count)
    place.mkdir()
    began = time.perf_counter()
    with mounted_tree(store, root, place, engine, "entries") as mounted:
        os.stat(path)
        outcome.add("first stat", _label(count), "s", time.perf_counter() - began, dict(mounted.upcalls()))
        _add_memory(outcome, mounted, count, "the first stat")


def _measure_walk(outcome: Outcome, store: Path, root: Digest, count: int, place: Path, engine: str) -> None:
    """Lists everything once: the index is then mapped as far as it will ever be."""

    def work() -> None:
        files = sum(len(files) for _, _, files in os.walk(place))
        if files != count:
            raise RuntimeError(f"{files} files were found in place of {count}")

    with mounted_tree(store, root, place, engine, "entries") as mounted:
        sample = observe(mounted, work)
        outcome.add("walk of everything", _label(count), "s", sample.seconds, sample.upcalls)
        _add_memory(outcome, mounted, count, "a walk of everything")


def _add_memory(outcome: Outcome, mounted: Mounted, count: int, when: str) -> None:
    what = f"daemon memory after {when}"
    outcome.add(f"{what}, peak RSS", _label(count), "MB", mounted.peak_memory() / 1e6)
    for field, name in (("Rss", "RSS"), ("Pss", "PSS"), ("Anonymous", "anonymous")):
        outcome.add(f"{what}, {name}", _label(count), "MB", _memory(mounted.pid, field) / 1e6)


def _memory(pid: int, field: str) -> int:
    """A field of smaps_rollup, in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"smaps_rollup has no {field}")
    return int(found[1]) << 10
