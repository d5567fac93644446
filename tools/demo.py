"""`python -m tools.demo`: this machine's C++ compiler and headers, projected out of a store.

Ingests the directories the compiler finds its headers in and is made of, mounts
them without one header, compiles and runs a program with nothing but the mount
to include from, and says what that showed. Everything is made in a temporary
directory and taken away again, on Ctrl-C too. Exit code 0 if every claim held,
1 if one didn't, 2 where the demonstration can't be given.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from casfs.errors import CasfsError, MissingCapability
from casfs.mountinfo import list_mounts
from casfs.probes import probe_mount
from store.digest import Digest
from store.errors import StoreError
from tools.bench.scratch import (
    Sample,
    ending_on_signals,
    ingest,
    mounted_tree,
    observe,
    scratch_directory,
    wait_ended,
)
from tools.bench.toolchain import (
    LEFT_OUT,
    PROGRAM,
    PROGRAM_OUTPUT,
    SECOND_PROGRAM,
    Compilation,
    NoCompiler,
    Toolchain,
    compile_source,
    find_toolchain,
)

_RUN_SECONDS = 30


@dataclass(slots=True)
class Claims:
    """What is to be shown, each with whether it was; and the daemons that shall have ended."""

    held: list[tuple[bool, str]] = field(default_factory=list)
    daemons: list[int] = field(default_factory=list)

    def say(self, holds: bool, text: str) -> None:
        """Add one."""
        self.held.append((holds, text))

    @property
    def all_hold(self) -> bool:
        """Whether none failed."""
        return all(holds for holds, _ in self.held)

    def show(self) -> None:
        """Print them."""
        print("\nwhat this showed" if self.all_hold else "\nwhat this showed, and what it did NOT show")
        for holds, text in self.held:
            print(f"  {'ok ' if holds else 'NOT'}  {text}")


@dataclass(frozen=True, slots=True)
class Shown:
    """What happened on one mount: the engine and why it was taken, what compiling took, and what came out of it."""

    engine: str
    why: str
    pid: int
    """The daemon's."""
    sample: Sample
    compilation: Compilation
    output: str
    second: Compilation
    visible: bool
    """Whether the header that was left out could be seen in the mount."""
    same_bytes: bool
    """Whether each header read through the mount had the bytes it has on the host."""


def main(arguments: list[str] | None = None) -> int:
    """Give the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to work (default: temporary files)")
    options = parser.parse_args(arguments)
    try:
        with ending_on_signals(), scratch_directory(options.scratch, "demo") as scratch:
            claims = _demonstrate(scratch)
        mounts = [mount for mount in list_mounts() if mount.path.startswith(os.fsencode(scratch))]
        ended = all(wait_ended(pid) for pid in claims.daemons)
        claims.say(ended and not mounts and not scratch.exists(), "nothing is left: no mount, no daemon, no file")
    except SystemExit:
        print("\nended early: what was made has been taken away again", file=sys.stderr)
        raise
    except (NoCompiler, CasfsError, StoreError) as error:
        print(f"the demonstration can't be given: {error}", file=sys.stderr)
        return 2
    claims.show()
    return 0 if claims.all_hold else 1


def _demonstrate(scratch: Path) -> Claims:
    toolchain = find_toolchain()
    _check_mounting(scratch)
    on_host = toolchain.find_left_out()
    if on_host is None:
        raise NoCompiler(f"the C library's header {LEFT_OUT}, which is to be left out, isn't on this machine")
    _line("compiler", toolchain.version)
    for top in toolchain.tops():
        _line("files from", str(top))

    # The path in its graft: what an exclusion is compared with.
    top = next(top for top in toolchain.tops() if on_host.is_relative_to(top))
    left_out = os.fsencode(on_host.relative_to(top))
    store = scratch / "store"
    tree = ingest(store, toolchain.grafts(), "headers", excluded=lambda path: path == left_out)
    rate = f"{tree.files / tree.seconds:,.0f} files/s, durable"
    _line("ingested", f"{tree.files:,} files, {tree.bytes / 1e6:.0f} MB in {tree.seconds:.1f} s ({rate})")
    _line("manifest", f"'headers', without {left_out.decode()}: {tree.root}")

    program, second = scratch / "program.cc", scratch / "second.cc"
    program.write_text(PROGRAM)
    second.write_text(SECOND_PROGRAM)
    host = compile_source(toolchain, program, scratch / "host", mount=None)
    if not host.ok:
        raise NoCompiler(f"{toolchain.version} doesn't compile the program on the host:\n{host.messages}")
    host_second = compile_source(toolchain, second, None, mount=None)

    demonstration = _Demonstration(toolchain, scratch, store, tree.root, on_host)
    shown = demonstration.show_on("auto")
    # With passthrough there is something to compare it with; without, that other session was shown already.
    other = demonstration.show_on("native") if shown.engine == "passthrough" else None
    _print_upcalls(shown, other, host)

    claims = Claims(daemons=[shown.pid, *([other.pid] if other else [])])
    _claim_headers(claims, shown, host, demonstration.place_of("auto"))
    where = f"{LEFT_OUT} was left out of the manifest"
    claims.say(host_second.ok, f"{where}; it lies on the host, where a program that includes it compiles")
    missed = not shown.second.ok and f"{LEFT_OUT}: No such file" in shown.second.messages
    claims.say(missed and not shown.visible, "in the mount it doesn't exist: the same program doesn't find it")
    _claim_reads(claims, shown, other)
    return claims


class _Demonstration:
    """The same things done on one mount after the other."""

    def __init__(self, toolchain: Toolchain, scratch: Path, store: Path, root: Digest, on_host: Path) -> None:
        self._toolchain = toolchain
        self._scratch = scratch
        self._store = store
        self._root = root
        self._on_host = on_host

    def place_of(self, engine: str) -> Path:
        """Where the tree is mounted with an engine."""
        return self._scratch / f"mount-{engine}"

    def show_on(self, engine: str) -> Shown:
        """Mount, compile, run, try the program that needs what was left out, unmount."""
        began = time.perf_counter()
        place = self.place_of(engine)
        done: list[Compilation] = []
        binary = self._scratch / f"program-{engine}"
        with mounted_tree(self._store, self._root, place, engine, "headers") as mounted:
            _line("mounted", f"engine {mounted.engine}, usable after {(time.perf_counter() - began) * 1e3:.0f} ms")
            sample = observe(mounted, lambda: done.append(self._compile("program.cc", binary, place)))
            second = self._compile("second.cc", None, place)
            visible = (place / str(self._on_host)[1:]).exists()
            same = all(_is_same(header, place) for header in done[0].headers)
        _line("unmounted", str(place))
        output = ""
        if done[0].ok:
            ran = subprocess.run([str(binary)], capture_output=True, text=True, timeout=_RUN_SECONDS, check=False)
            output = ran.stdout if not ran.returncode else f"exit code {ran.returncode}"
            _line("compiled", f"{len(done[0].headers)} headers included; it ran and printed {output.strip()!r}")
        return Shown(mounted.engine, mounted.why, mounted.pid, sample, done[0], output, second, visible, same)

    def _compile(self, source: str, output: Path | None, place: Path) -> Compilation:
        return compile_source(self._toolchain, self._scratch / source, output, mount=place)


def _on_host(header: str, place: Path) -> Path:
    """Where a file below the mount came from."""
    return Path("/", os.path.relpath(header, place))


def _is_same(header: str, place: Path) -> bool:
    """Whether a file is in the mount, not behind a symbolic link that leads out of it, and has the host's bytes."""
    inside = os.path.realpath(header).startswith(f"{place}/")
    return inside and Path(header).read_bytes() == _on_host(header, place).read_bytes()


def _print_upcalls(shown: Shown, other: Shown | None, host: Compilation) -> None:
    """Upcalls by opcode, a column a mount."""
    columns = [shown, other] if other else [shown]
    names = sorted({name for column in columns for name in column.sample.upcalls} | {"READ"})
    print(f"\n{'upcalls of the compilation':<28}" + "".join(f"{column.engine:>14}" for column in columns))
    for name in names:
        print(f"  {name:<26}" + "".join(f"{column.sample.upcalls.get(name, 0):>14,}" for column in columns))
    print(f"  {'together':<26}" + "".join(f"{sum(column.sample.upcalls.values()):>14,}" for column in columns))
    print(f"  {'CPU of the daemon':<26}" + "".join(f"{column.sample.daemon_seconds:>12.3f} s" for column in columns))
    times = "".join(f"{column.compilation.seconds:>12.2f} s" for column in columns)
    print(f"  {'time to compile':<26}{times}   (with the host's own headers {host.seconds:.2f} s)")


def _claim_headers(claims: Claims, shown: Shown, host: Compilation, place: Path) -> None:
    inside = [header for header in shown.compilation.headers if Path(header).is_relative_to(place)]
    outside = len(shown.compilation.headers) - len(inside)
    claims.say(
        shown.compilation.ok and bool(inside) and not outside,
        f"the compiler opened {len(inside)} headers below the mount and {outside} anywhere else",
    )
    programs = shown.compilation.programs
    own = bool(programs) and all(Path(program).is_relative_to(place) for program in programs)
    names = " and ".join(os.path.basename(program) for program in programs)
    claims.say(own, f"the compiler itself ({names}) was started from below the mount")
    # With -nostdinc the compiler doesn't include stdc-predef.h by itself, but another header does: one more then.
    opened = {os.path.realpath(_on_host(header, place)) for header in inside}
    missed = {os.path.realpath(header) for header in host.headers} - opened
    claims.say(shown.same_bytes and not missed, "they are those it opens natively, byte for byte")
    claims.say(shown.output == PROGRAM_OUTPUT, "the program it made runs, and prints what it should")


def _claim_reads(claims: Claims, shown: Shown, other: Shown | None) -> None:
    reads = shown.sample.upcalls.get("READ", 0)
    opens = shown.sample.upcalls.get("OPEN", 0)
    if shown.engine == "passthrough":
        others = f"; without passthrough it takes {other.sample.upcalls.get('READ', 0):,}" if other else ""
        claims.say(not reads, f"{opens:,} files were opened with {reads:,} READ upcalls: the kernel read them{others}")
        return
    print(f"\nREAD is {reads:,} here and not 0: engine {shown.engine}, because {shown.why}")


def _check_mounting(scratch: Path) -> None:
    """Before the work that would be for nothing. Raises MissingCapability."""
    file = scratch / "probe"
    file.write_bytes(b"probe")
    mounting = probe_mount(file)
    if not mounting.ok:
        raise MissingCapability(f"{mounting.detail}\n'casfs doctor' says what to do about it")


def _line(name: str, text: str) -> None:
    print(f"{name:<14} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
