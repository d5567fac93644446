"""Blobs of 64 KiB brought back from the cold tier, against `zstd -d` on the same compressed files.

    zstd -d, a process a file   what a script does; it hashes nothing, and nothing is durable
    zstd -d, one process        the same files on one command line
    casfs prefetch              the whole command; hashed, published and durable when it returns
    open, one at a time         each file opened and read through a mount for the first time
    open, eight at a time       the same by eight threads

The contents compress to about a half. Before each measure everything is moved to the cold tier again.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from store.digest import Digest
from store.layout import Layout
from store.repository import Store
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import in_child, ingest, mounted_tree, usable_engines, wait_ended

_SIZE = 64 << 10
_NAME = "cold"
_LOOP = "zstd -d, a process a file"
_PREFETCH = "casfs prefetch"
_TIMEOUT_SECONDS = 300
_WHAT = "hydration"


@dataclass(frozen=True, slots=True)
class _Tree:
    """Where the store is, and what the tree in it has."""

    store: Path
    root: Digest
    names: list[str]
    scratch: Path
    engine: str


def run(settings: Settings) -> Outcome:
    """A quick run has 50 blobs."""
    outcome = Outcome()
    engines, reasons = usable_engines(settings.scratch, ("passthrough", "native"))
    outcome.notes += reasons
    tree = _make_tree(settings, settings.size(1_000, 50), engines[0])
    sides: dict[str, Callable[[_Tree, Path], float]] = {
        _LOOP: partial(_unpack, at_once=1),
        "zstd -d, one process": partial(_unpack, at_once=len(tree.names)),
        _PREFETCH: _prefetch,
        "open, one at a time": partial(_open_all, threads=1),
        "open, eight at a time": partial(_open_all, threads=8),
    }
    if shutil.which("zstd") is None:
        del sides[_LOOP], sides["zstd -d, one process"]
        outcome.notes.append("zstd -d was left out: install the Debian package zstd")
    for number, side in alternate(list(sides), settings.rounds(5)):
        _make_cold(tree)
        seconds = sides[side](tree, settings.scratch / f"{side.replace(' ', '-')}-{number}")
        outcome.add(_WHAT, side, "blobs/s", len(tree.names) / seconds)
    if _LOOP in sides:
        for side in (_PREFETCH, "open, eight at a time"):
            ratio = outcome.median(_WHAT, side) / outcome.median(_WHAT, _LOOP)
            outcome.aim(f"{_WHAT}: {side} against {_LOOP}", ratio, 1, "", at_most=False)
    return outcome


def _make_tree(settings: Settings, count: int, engine: str) -> _Tree:
    source = settings.scratch / "source"
    source.mkdir()
    names = [f"file{number:04}" for number in range(count)]
    numbers = random.Random(0)  # noqa: S311 - the same contents every time
    for name in names:
        (source / name).write_bytes(numbers.randbytes(_SIZE // 2).hex().encode())
    store = settings.scratch / "store"
    root = ingest(store, [(b"", source)], _NAME).root
    shutil.rmtree(source)
    return _Tree(store, root, names, settings.scratch, engine)


def _make_cold(tree: _Tree) -> None:
    def work() -> None:
        with Store.open(tree.store) as store:
            store.demoter.demote(0)

    in_child(work)
    found = len(_cold_files(tree))
    if found != len(tree.names):
        raise RuntimeError(f"{found} of {len(tree.names)} blobs are in the cold tier")
    os.sync()  # what moving them has left to write shall not be in the measure


def _cold_files(tree: _Tree) -> list[str]:
    return [str(path) for path in Layout(tree.store).cold.rglob("*.zst")]


def _unpack(tree: _Tree, place: Path, *, at_once: int) -> float:
    """In so many files a process."""
    files = _cold_files(tree)
    place.mkdir()
    began = time.perf_counter()
    for first in range(0, len(files), at_once):
        _run(["zstd", "-d", "-q", "--output-dir-flat", str(place), *files[first : first + at_once]])
    seconds = time.perf_counter() - began
    shutil.rmtree(place)
    return seconds


def _prefetch(tree: _Tree, place: Path) -> float:
    began = time.perf_counter()
    _run([str(Path(sys.executable).with_name("casfs")), "--store", str(tree.store), "prefetch", _NAME])
    return time.perf_counter() - began


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_SECONDS)


def _open_all(tree: _Tree, place: Path, *, threads: int) -> float:
    with mounted_tree(tree.store, tree.root, place, tree.engine, _NAME) as mounted:
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            sizes = list(pool.map(lambda name: len((mounted.path / name).read_bytes()), tree.names))
        seconds = time.perf_counter() - began
    # What its lease holds is not moved to the cold tier again.
    if not wait_ended(mounted.pid, _TIMEOUT_SECONDS):
        raise RuntimeError("the mount's daemon doesn't end")
    if sizes != [_SIZE] * len(tree.names):
        raise RuntimeError("a file was read in part")
    return seconds
