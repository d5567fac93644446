"""``casfs run image -- ./true`` as a person starts it: the whole process, against ``bwrap … ./true``.

bwrap gets the same tree as a directory of the host, and makes the same
namespaces. *warm*: everything is in the page cache. *cold*: after dropping all
of the kernel's caches (/proc/sys/vm/drop_caches, root only), so that
the interpreter and its modules come from disk, as at the first start after a boot.
Modules lie there compiled, as those of an installed casfs do.

The parts are those of a warm run under a stopwatch (`tools.bench.run_parts`),
whose own cost is in them: *interpreter* is from fork to the first line,
*imports* all modules that ``casfs run`` needs, *run sandbox* is bubblewrap and
the command, *the rest* what else main does (arguments, configuration, the
tree's name, printing), *end* from there until the process is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import drop_caches
from tools.bench.small_image import NAME, TRUE, ingest_image
from tools.bench.workers import Refused

_CASFS, _BWRAP = "casfs run", "bwrap"
_PARTS = (
    "imports",
    "namespace",
    "open store",
    "open sandbox",
    "run sandbox",
    "capture sandbox",
    "close sandbox",
    "close store",
)


def run(settings: Settings) -> Outcome:
    """Raises Refused without bubblewrap or busybox."""
    outcome = Outcome()
    store = settings.scratch / "store"
    ingest_image(store, settings.scratch)
    environment = _compiling_once(settings.scratch / "bytecode")
    arguments = ["--store", str(store), "run", NAME, "--", *TRUE]
    commands = {
        _BWRAP: _bubblewrap(store, settings.scratch / "directory"),
        _CASFS: [str(Path(sys.executable).with_name("casfs")), *arguments],
    }
    for command in commands.values():
        _run(command, environment)
    for _, side in alternate(list(commands), settings.rounds(21)):
        outcome.add("warm", side, "ms", _run(commands[side], environment) * 1e3)
    for _ in range(settings.rounds(21)):
        _measure_parts(outcome, arguments, environment)
    outcome.aim("casfs run, warm", outcome.median("warm", _CASFS), 100, "ms", at_most=True)
    for _, side in alternate(list(commands), settings.rounds(5)):
        if not drop_caches():
            outcome.notes.append("cold was left out: only root can drop the kernel's caches")
            break
        outcome.add("cold", side, "ms", _run(commands[side], environment) * 1e3)
    return outcome


def _bubblewrap(store: Path, directory: Path) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise Refused("there is no bubblewrap: install the Debian package bubblewrap")
    _casfs("--store", str(store), "checkout", NAME, str(directory))
    words = [program, "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-net", "--die-with-parent"]
    words += ["--bind", str(directory), "/build", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108
    return [*words, "--chdir", "/build", "--", *TRUE]


def _casfs(*arguments: str) -> None:
    _run([str(Path(sys.executable).with_name("casfs")), *arguments])


def _compiling_once(directory: Path) -> dict[str, str]:
    """The environment of a Python that keeps what it compiles there, also where this one was told not to.

    A run that compiles all of casfs's modules anew takes twice as long.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(directory)}


def _run(command: list[str], environment: dict[str, str] | None = None) -> float:
    """The seconds a process takes, from before its start until it is gone."""
    began = time.monotonic()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return seconds


def _measure_parts(outcome: Outcome, arguments: list[str], environment: dict[str, str]) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe:
        began = time.monotonic()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "tools.bench.run_parts", str(writing), *arguments],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[writing],
                cwd=Path(__file__).resolve().parents[2],
                env=environment,
            )
        finally:
            os.close(writing)
        if process.wait():
            raise RuntimeError("casfs run failed under the stopwatch")
        ended = time.monotonic()
        found: dict[str, Any] = json.loads(pipe.read())
    parts: dict[str, float] = {"interpreter": found["began"] - began}
    parts |= {part: found["parts"].get(part, 0.0) for part in _PARTS}
    # No part is inside of another.
    parts["the rest"] = found["whole"] - sum(found["parts"].values())
    parts["end"] = ended - found["ended"]
    for part, seconds in parts.items():
        outcome.add("by part", part, "ms", seconds * 1e3)
