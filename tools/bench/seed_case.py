"""The case casfs was asked for: an action that opens 440 files and reads them with 630 reads, as upcalls by kind.

    host                        the files themselves
    passthrough                 blobs of a store, which the kernel reads itself
    passthrough, by reference   files that stay where they are, on the same engine
    native, fuse                the same blobs without passthrough: reads go through the daemon
    kernel                      engine kernel: a metadata layer and overlayfs
    sandboxfs                   `casfs sandboxfs`: files that stay where they are, an overlay for the action

The files are in 20 directories; 250 are read with one read, 190 of 160 KiB with two. *first* is on a fresh mount, the
host's caches warm; *next* is the same action once more on that mount, as where actions share one. Upcalls are of the
whole action. Behind `kernel` and `sandboxfs` there is nobody who could be asked: it is checked that no file system of
theirs is one of FUSE.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from casfs import mounting
from casfs.errors import CasfsError
from casfs.mountinfo import list_mounts
from casfs.sandboxfs import Sandboxfs
from casfs.sandboxfs_protocol import map_path
from casfs.syscalls import has_admin_capability
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import Ingested, Mounted, ingest, mounted_tree, observe, unmount, usable_engines

HOST, KERNEL, SANDBOXFS = "host", "kernel", "sandboxfs"
REFERENCE = "passthrough, by reference"
FILES, READS, DIRECTORIES = 440, 630, 20
_AT_ONCE = 128 << 10
_LARGE = 160 << 10


def run(settings: Settings) -> Outcome:
    """The same sizes in a quick run."""
    outcome = Outcome()
    source = settings.scratch / "files"
    names = make_files(source)
    store = settings.scratch / "store"
    blobs = ingest(store, [(b"", source)], "files")
    referring = ingest(store, [(b"", source)], "referring", reference=True)
    engines, reasons = usable_engines(settings.scratch, ("passthrough", "native", "fuse"))
    outcome.notes += reasons
    sides: dict[str, tuple[str, Ingested]] = {HOST: (HOST, blobs)}
    for engine in engines:
        sides[engine] = (engine, blobs)
        if engine == "passthrough":
            sides[REFERENCE] = (engine, referring)
    if has_admin_capability():
        sides |= {KERNEL: (KERNEL, blobs), SANDBOXFS: (SANDBOXFS, referring)}
    else:
        outcome.notes.append(f"{KERNEL} and {SANDBOXFS} were left out: this user may not mount")
    for number, side in alternate(list(sides), settings.rounds(7)):
        engine, tree = sides[side]
        place = settings.scratch / f"{side.replace(', ', '-').replace(' ', '-')}-{number}"
        with _showing(engine, store, tree, source, names, place) as (top, mounted):
            for which in ("first", "next"):
                sample = observe(mounted, lambda top=top: _act(top, names))  # type: ignore[misc]
                # READ is what it is about, so it is shown where there is none.
                counts = {"READ": 0, **sample.upcalls} if mounted else {}
                outcome.add(f"{which} action", side, "ms", sample.seconds * 1e3, counts)
                if mounted:
                    outcome.add(f"{which} action, daemon CPU", side, "ms", sample.daemon_seconds * 1e3)
    _set_aims(outcome, list(sides))
    return outcome


def _set_aims(outcome: Outcome, sides: list[str]) -> None:
    for side in sides:
        found = outcome.find("first action", side)
        counts = (found.upcalls if found else None) or {}
        if side.startswith("passthrough"):
            outcome.aim(f"READ upcalls of the action, {side}", counts["READ"], 0, "", at_most=True)
        elif side in (KERNEL, SANDBOXFS):
            outcome.aim(f"upcalls of the action, {side}", sum(counts.values()), 0, "", at_most=True)


def make_files(top: Path) -> list[str]:
    """The action's inputs, all different; their paths relative to `top`."""
    names = []
    for number in range(FILES):
        name = f"lib{number % DIRECTORIES:02}/file{number:03}.h"
        size = _LARGE if number % 44 < 19 else 2_000 + 37 * number
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(name.encode().ljust(size, b"."))
        names.append(name)
    os.sync()  # what is written back later would be measured, too
    return names


def _act(top: Path, names: list[str]) -> None:
    """As a compiler does: open, ask for the size, read that much, close. Raises RuntimeError for wrong contents."""
    reads = 0
    for name in names:
        file = os.open(f"{top}/{name}", os.O_RDONLY)
        left = os.fstat(file).st_size
        wanted = name.encode()
        while left > 0:
            data = os.read(file, _AT_ONCE)
            reads += 1
            left -= len(data)
            if not data or not data.startswith(wanted):
                raise RuntimeError(f"{name} has other bytes than it should")
            wanted = b""
        os.close(file)
    if reads != READS:
        raise RuntimeError(f"the action made {reads} reads, not {READS}")


@contextmanager
def _showing(
    engine: str, store: Path, tree: Ingested, source: Path, names: list[str], place: Path
) -> Iterator[tuple[Path, Mounted | None]]:
    """Where the action finds its inputs, and the mount whose daemon is to be asked, if there is one."""
    if engine == HOST:
        yield source, None
    elif engine == KERNEL:
        place.mkdir()
        try:
            report = mounting.start(mounting.Request(store, tree.root, place), engine=KERNEL)
            if report.pid is not None:
                raise RuntimeError("there is a daemon behind a mount of engine kernel")
            _check_nobody_is_asked(place)
            yield place, None
        finally:
            unmount(place)
    elif engine == SANDBOXFS:
        place.mkdir()
        umask = os.umask(0)
        try:
            with Sandboxfs(place) as sandboxfs:
                scratch = place.with_name(f"{place.name}-scratch")
                scratch.mkdir()
                mappings = [map_path(os.fsencode(name), os.fsencode(source / name), False) for name in names]
                sandboxfs.create("0", [map_path(b"", os.fsencode(scratch), True), *mappings])
                _check_nobody_is_asked(place)
                yield place / "0", None
        finally:
            os.umask(umask)
    else:
        with mounted_tree(store, tree.root, place, engine) as mounted:
            yield place, mounted


def _check_nobody_is_asked(place: Path) -> None:
    """Raise CasfsError if a file system there is one that a process answers for."""
    top = os.fsencode(place)
    kinds = {mount.kind for mount in list_mounts() if mount.path == top or mount.path.startswith(top + b"/")}
    if not kinds <= {"overlay", "tmpfs"}:
        raise CasfsError(f"there are file systems {', '.join(sorted(kinds))} at {place}")
