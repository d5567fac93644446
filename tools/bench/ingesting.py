"""The header tree of this machine brought into a fresh store, against what else one does with so many files.

    casfs           hash, copy, publish, durable when it returns; into an empty store
    casfs, again    the same tree unchanged into the same store (stamps are compared, nothing is read)
    cp -r && sync   a copy that is durable too: `cp -r`, then `sync -f` of its file system
    cp -r           a copy that is only in the page cache when it returns
    b3sum           every file hashed and nothing written, with all cores

Sources are in the page cache. Everything that is to be written back from one
side is written back before the next begins. MB/s are of the files' contents.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import ingest

_TIMEOUT_SECONDS = 600
_SOURCE = Path("/usr/include")
_QUICK_SOURCE = Path("/usr/include/linux")


def run(settings: Settings) -> Outcome:
    """A quick run takes a part of the tree."""
    outcome = Outcome()
    source = _QUICK_SOURCE if settings.quick and _QUICK_SOURCE.is_dir() else _SOURCE
    sides = ["casfs", "cp -r && sync", "cp -r", "b3sum"]
    if shutil.which("b3sum") is None:
        sides.remove("b3sum")
        outcome.notes.append("b3sum was left out: it is not installed")
    listing = settings.scratch / "listing"
    files, size = _list_files(source, listing)
    outcome.notes.append(f"the tree: {files:,} files, {size / 1e6:.0f} MB")
    for number, side in alternate(sides, settings.rounds(5)):
        target = settings.scratch / f"target-{number}"
        os.sync()
        if side == "casfs":
            first = ingest(target, [(b"", source)], "headers")
            again = ingest(target, [(b"", source)], "headers")
            if (first.files, first.root) != (files, again.root):
                raise RuntimeError(f"{first.files} of {files} files were added, or not the same ones again")
            _add(outcome, "casfs", files, size, first.seconds)
            _add(outcome, "casfs, again", files, size, again.seconds)
        else:
            _add(outcome, side, files, size, _time(_commands(side, source, target, listing)))
        shutil.rmtree(target, ignore_errors=True)
    return outcome


def _add(outcome: Outcome, side: str, files: int, size: int, seconds: float) -> None:
    outcome.add("ingest, files", side, "files/s", files / seconds)
    outcome.add("ingest, bytes", side, "MB/s", size / seconds / 1e6)


def _list_files(source: Path, listing: Path) -> tuple[int, int]:
    """Writes the paths, each ended by a NUL, into `listing`; returns how many there are and their bytes."""
    files = size = 0
    with open(listing, "wb") as out:
        for directory, _, names in os.walk(os.fsencode(source)):
            for name in names:
                path = os.path.join(directory, name)
                if not os.path.islink(path):
                    files += 1
                    size += os.stat(path).st_size
                    out.write(path + b"\0")
                    with open(path, "rb") as file:
                        file.read()  # into the page cache
    return files, size


def _commands(side: str, source: Path, target: Path, listing: Path) -> Callable[[], None]:
    if side == "b3sum":
        # A file name at a time costs a process each; xargs fills its command lines, as a person would.
        return lambda: _run(["xargs", "-0", "-a", str(listing), "b3sum"])

    def copy() -> None:
        _run(["cp", "-r", str(source), str(target)])
        if side.endswith("sync"):
            _run(["sync", "-f", str(target)])

    return copy


def _time(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=_TIMEOUT_SECONDS)
