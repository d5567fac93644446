"""A C++ program that opens hundreds of headers, compiled with the headers of the host and out of a mount.

Each compilation through a mount is the first on a fresh mount, as a build
action's is; the host's page cache is warm. `preprocess` (g++ -E) is the part
that reads headers and does nothing else. Upcalls and daemon CPU are of one run.
"""

from __future__ import annotations

from pathlib import Path

from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import Ingested, Mounted, ingest, mounted_tree, observe, usable_engines
from tools.bench.toolchain import PROGRAM, Toolchain, compile_source, find_toolchain

_ENGINES = ("passthrough", "native", "fuse")


def run(settings: Settings) -> Outcome:
    """Raises NoCompiler."""
    outcome = Outcome()
    toolchain = find_toolchain()
    store = settings.scratch / "store"
    tree = ingest(store, toolchain.grafts(), "headers")
    outcome.notes.append(f"the tree: {tree.files:,} header files, {tree.bytes / 1e6:.0f} MB")
    engines, reasons = usable_engines(settings.scratch, _ENGINES)
    outcome.notes += reasons
    source = settings.scratch / "program.cc"
    source.write_text(PROGRAM)
    _compile(toolchain, source, None, preprocess=False)  # the first run only warms the caches
    for number, side in alternate(("host", *engines), settings.rounds(7)):
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


def _compile(toolchain: Toolchain, source: Path, mount: Path | None, preprocess: bool) -> None:
    done = compile_source(toolchain, source, source.with_suffix(""), mount=mount, preprocess=preprocess)
    if not done.ok:
        raise RuntimeError(f"the program didn't compile:\n{done.messages}")
