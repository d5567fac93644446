"""libfuse's own low-level examples in C, compiled from the sources that its Debian package brings, and mounted."""

from __future__ import annotations

import gzip
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from casfs.mountinfo import find_mount
from tools.bench.scratch import stop

SOURCES = Path("/usr/share/doc/libfuse3-dev/examples")
_START_SECONDS = 10.0
_TIMEOUT_SECONDS = 120


class NoExample(Exception):
    """The sources, the compiler or the library is missing."""


def build(names: tuple[str, ...], target: Path) -> dict[str, Path]:
    """Compile the examples into `target`, optimised. Raises NoExample."""
    if not SOURCES.is_dir():
        raise NoExample("libfuse's examples are not here: install the Debian package libfuse3-dev")
    target.mkdir()
    for source in SOURCES.iterdir():
        if source.name.endswith((".c", ".h", ".c.gz", ".h.gz")):
            data = source.read_bytes()
            packed = source.suffix == ".gz"
            (target / source.name.removesuffix(".gz")).write_bytes(gzip.decompress(data) if packed else data)
    try:
        flags = shlex.split(_run(["pkg-config", "--cflags", "--libs", "fuse3"]))
        for name in names:
            # The warnings are about code that isn't ours.
            _run(["gcc", "-O2", "-w", str(target / f"{name}.c"), "-o", str(target / name), *flags])
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoExample(f"libfuse's examples can't be compiled: {getattr(error, 'stderr', '') or error}") from error
    return {name: target / name for name in names}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    return done.stdout


@contextmanager
def mounted_example(program: Path, place: Path, options: str) -> Iterator[int]:
    """The example, in the foreground and single-threaded, serving `place`; gives its process id."""
    place.mkdir(exist_ok=True)
    command = [str(program), "-f", "-s", *(["-o", options] if options else []), str(place)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while find_mount(str(place)) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise NoExample(f"{program.name} didn't mount")
            time.sleep(0.005)
        os.stat(place)  # answered, so INIT is over
        yield process.pid
    finally:
        if find_mount(str(place)) is not None:
            helper = shutil.which("fusermount3")
            unmount = [helper, "-u"] if helper and os.geteuid() else ["umount"]
            subprocess.run([*unmount, str(place)], capture_output=True, timeout=_TIMEOUT_SECONDS, check=False)
            if find_mount(str(place)) is not None:
                lazily = [helper, "-u", "-z"] if helper and os.geteuid() else ["umount", "-l"]
                subprocess.run([*lazily, str(place)], capture_output=True, timeout=_TIMEOUT_SECONDS, check=False)
        stop(process)
