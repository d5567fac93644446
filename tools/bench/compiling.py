"""A C++ program that opens hundreds of headers, compiled with the headers of the host and out of a mount.

Each compilation through a mount is the first on a fresh mount, as a build
action's is; the host's page cache is warm. The compiler itself (cc1plus, its start
files) comes out of the mount too. *preprocess* (g++ -E) is the part that reads
headers and does nothing else. Upcalls and daemon CPU are of one run.
"""

from __future__ import annotations

import os
from pathlib import Path

from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import Ingested, Mounted, ingest, mounted_tree, observe, usable_engines
from tools.bench.toolchain import PROGRAM, Compilation, Toolchain, compile_source, find_toolchain

_ENGINES = ("passthrough", "native", "fuse")


def run(settings: Settings) -> Outcome:
    """A quick run has only the files in its tree that are needed, and only preprocesses. Raises NoCompiler."""
    outcome = Outcome()
    toolchain = find_toolchain()
    source = settings.scratch / "program.cc"
    source.write_text(PROGRAM)
    warmed = _compile(toolchain, source, None, preprocess=settings.quick)
    store = settings.scratch / "store"
    grafts = toolchain.grafts()
    if settings.quick:
        tree = ingest(store, grafts, "headers", excluded=toolchain.exclude_unneeded(warmed))
    else:
        tree = ingest(store, grafts, "headers")
    outcome.notes.append(
        f"the tree: {tree.files:,} files of the compiler and its headers, {tree.bytes / 1e6:.0f} MB, "
        f"of which the program includes {len(set(map(os.path.realpath, warmed.headers)))}"
    )
    engines, reasons = usable_engines(settings.scratch, _ENGINES)
    outcome.notes += reasons
    for number, side in alternate(("host", *engines), settings.rounds(5)):
        for what, preprocess in (("compile and link", False), ("preprocess only", True)):
            if settings.quick and not preprocess:
                continue
            place = settings.scratch / f"{side}-{number}-{preprocess}"
            _measure(outcome, toolchain, source, store, tree, side, place, what, preprocess)
    return outcome


def _measure(
    outcome: Outcome,
    toolchain: Toolchain,
    source: Path,
    store: Path,
    tree: Ingested,
    side: str,
    place: Path,
    what: str,
    preprocess: bool,
) -> None:
    def work(mounted: Mounted | None) -> None:
        sample = observe(mounted, lambda: _compile(toolchain, source, place if mounted else None, preprocess))
        outcome.add(f"{what}, wall", side, "s", sample.seconds, sample.upcalls)
        if mounted is not None:
            outcome.add(f"{what}, daemon CPU", side, "s", sample.daemon_seconds)

    if side == "host":
        work(None)
        return
    with mounted_tree(store, tree.root, place, side, "headers") as mounted:
        work(mounted)


def _compile(toolchain: Toolchain, source: Path, mount: Path | None, preprocess: bool) -> Compilation:
    done = compile_source(toolchain, source, source.with_suffix(""), mount=mount, preprocess=preprocess)
    if not done.ok:
        raise RuntimeError(f"the program didn't compile:\n{done.messages}")
    if mount is not None and not all(Path(used).is_relative_to(mount) for used in (*done.headers, *done.programs)):
        raise RuntimeError("the compiler used a file that is not in the mount")
    return done
