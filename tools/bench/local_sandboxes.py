"""Bazel builds on this machine: its own sandbox of symbolic links, `casfs sandboxfs` in its place, and no sandbox.

    linux-sandbox  a directory of symbolic links for each action
    casfs          --experimental_use_sandboxfs: one overlay mount for each action
    no sandbox     actions run in the source tree

*small*: actions that read all of their inputs, the headers that a C++ source of this machine includes. *large*: actions
that read as many out of 12,000. Each has a file of its own that is new in every build. Bazel's server stays, its
analysis doesn't count; two actions run at a time. Wall time is Bazel's own; CPU is that of its server, of all that it
started, and of `casfs sandboxfs`. What a sandbox adds is against no sandbox, and the part of symbolic links is the
yardstick. Then a sandbox by itself, without Bazel: from a request sent to its answer, for each mapping.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from casfs.syscalls import has_admin_capability
from tools.bench import bazel
from tools.bench.action_tree import find_headers
from tools.bench.bazel import Bazel
from tools.bench.bazel_shapes import Shape, made, make_actions
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import scratch_directory
from tools.bench.toolchain import find_toolchain
from tools.bench.volumes import journaled

CASFS, LINKS, NONE = "casfs", "linux-sandbox", "no sandbox"
_REPOSITORY = Path(__file__).resolve().parents[2]
_BAZEL_SCRATCH = Path("/var/tmp")  # noqa: S108 - a directory of our own is made there
"""Not below /tmp: Bazel's sandbox binds an output base there, and so has it without the mounts in it."""
_PART = 1 / 3
"""Of what symbolic links add to no sandbox."""
_MAPPING_MOST = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")


def run(settings: Settings) -> Outcome:
    """Without Bazel, or the privilege to mount, there is nothing to measure."""
    outcome = Outcome()
    if shutil.which(bazel.PROGRAM) is None:
        outcome.notes.append(f"{bazel.PROGRAM} is not installed")
        return outcome
    if not has_admin_capability():
        outcome.notes.append("this user may not mount")
        return outcome
    headers = find_headers(find_toolchain(), made(settings.scratch / "action"))
    shapes = [
        make_actions(settings, "small", headers, settings.size(500, 4), 0),
        make_actions(settings, "large", headers, settings.size(60, 2), settings.size(11_783, 100)),
    ]
    program = _make_program(settings.scratch)
    for shape in shapes:
        _measure(outcome, settings, shape, program)
        _set_aims(outcome, shape)
    for shape in shapes:
        _measure_alone(outcome, settings, shape, program)
    return outcome


def _make_program(directory: Path) -> Path:
    """`casfs-sandboxfs`, as installing makes it, of this source."""
    program = directory / "casfs-sandboxfs"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{_REPOSITORY}" exec "{sys.executable}" -m tools.sandboxfs "$@"\n')
    program.chmod(0o755)
    return program


def _measure(outcome: Outcome, settings: Settings, shape: Shape, program: Path) -> None:
    sides = {
        LINKS: ["--spawn_strategy=linux-sandbox"],
        CASFS: [
            "--spawn_strategy=linux-sandbox",
            "--experimental_use_sandboxfs",
            f"--experimental_sandboxfs_path={program}",
        ],
        NONE: ["--spawn_strategy=local"],
    }
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_directory(_BAZEL_SCRATCH, "bench"))
        if not settings.quick:
            scratch = stack.enter_context(journaled(scratch))
        builders = {
            side: stack.enter_context(
                Bazel(made(scratch / side.replace(" ", "-")), shape.workspace, stays=True, heap="1g")
            )
            for side in sides
        }
        number = 0
        for side, builder in builders.items():
            shape.renew(number := number + 1)
            _build(builder, sides[side], side)
            builder.clean()
        for _, side in alternate(list(sides), settings.rounds(5)):
            shape.renew(number := number + 1)
            os.sync()
            began = _cpu(builders[side])
            seconds = _build(builders[side], sides[side], side)
            outcome.add(f"{shape.name}: wall", side, "s", seconds)
            outcome.add(f"{shape.name}: CPU", side, "s", _cpu(builders[side]) - began)
            builders[side].clean()


def _build(builder: Bazel, options: list[str], side: str) -> float:
    built = builder.build(*options, "--jobs=2", "//:everything", local=False)
    kind = "local" if side == NONE else LINKS
    if built.code or not built.processes.get(kind) or built.processes.keys() - {kind, "internal"}:
        raise RuntimeError(f"{side}: {built.processes}\n{built.text}")
    return built.seconds


def _cpu(builder: Bazel) -> float:
    """Seconds that Bazel's server has used, with the children it has waited for and those that run."""
    server = int(next(builder.output.glob("*/server/server.pid.txt")).read_text())
    ticks = sum(_times(server))
    for name in os.listdir(f"/proc/{server}/task"):
        for child in Path(f"/proc/{server}/task/{name}/children").read_text().split():
            ticks += sum(_times(int(child))[:2])
    return ticks / _TICKS


def _times(process: int) -> list[int]:
    """utime, stime, cutime, cstime."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return [0, 0, 0, 0]
    return [int(word) for word in text.rpartition(")")[2].split()[11:15]]


def _set_aims(outcome: Outcome, shape: Shape) -> None:
    for what in ("wall", "CPU"):
        name = f"{shape.name}: {what}"
        none = outcome.median(name, NONE)
        ours, links = (outcome.median(name, side) - none for side in (CASFS, LINKS))
        outcome.add(f"{name} added to no sandbox", LINKS, "s", links)
        outcome.add(f"{name} added to no sandbox", CASFS, "s", ours)
        if links > 0:
            aim = f"{name} added: part of what symbolic links add"
            outcome.aim(aim, ours / links, _PART, "", at_most=True)


def _measure_alone(outcome: Outcome, settings: Settings, shape: Shape, program: Path) -> None:
    """Create and destroy as Bazel does, one sandbox at a time; each has one file that no other has."""
    files = sorted(
        path for name in ("read", "beside") for path in shape.workspace.glob(f"{name}/**/*") if path.is_file()
    )
    directories = {path: str(number) for number, path in enumerate(sorted({file.parent for file in files}), 1)}
    mappings = [
        {"x": int(directories[file.parent]), "p": file.name, "y": int(directories[file.parent]), "u": file.name}
        for file in files
    ]
    prefixes = {number: str(path) for path, number in directories.items()}
    what = f"a sandbox of {len(files) + 2:,} mappings"
    scratch = made(settings.scratch / f"{shape.workspace.name}-alone")
    with _asking(program, made(scratch / "mnt")) as ask:
        ask(b'{"C":{"i":"empty"}}')  # as Bazel does: until then it starts
        later = settings.rounds(20) + 2
        for turn in range(later + settings.rounds(5)):
            if turn == later:
                for file in files[50::100]:
                    file.write_bytes(file.read_bytes() + b"// changed\n")
            upper = made(scratch / str(turn))
            own = {"p": "own", "u": str(shape.workspace / "new" / str(turn % 2))}
            request = {"i": str(turn), "m": [{"p": "/", "u": str(upper), "w": True}, *mappings, own], "q": prefixes}
            # As Bazel writes it: without spaces.
            text = json.dumps({"C": request}, separators=(",", ":")).encode()
            began = time.perf_counter()
            ask(text)
            seconds = time.perf_counter() - began
            # All inputs are new, then all are known for the first time, then most are ready; at last some have changed.
            state = ("first", "second")[turn] if turn < 2 else "later" if turn < later else "1% changed"
            outcome.add(f"{what}, each", state, "µs", seconds * 1e6 / len(request["m"]))
            began = time.perf_counter()
            ask(json.dumps({"D": str(turn)}).encode())
            outcome.add(f"{what}: destroyed", state, "ms", (time.perf_counter() - began) * 1e3)
    outcome.aim(f"{what}, each", outcome.median(f"{what}, each", "later"), _MAPPING_MOST, "µs", at_most=True)


@contextmanager
def _asking(program: Path, place: Path) -> Iterator[Any]:
    process = subprocess.Popen([program, "--allow=self", place], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        stdin, stdout = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)

        def ask(request: bytes) -> None:
            stdin.write(request)
            stdin.flush()
            answer = json.loads(stdout.readline())
            if answer["error"]:
                raise RuntimeError(answer["error"])

        try:
            yield ask
        finally:
            process.terminate()
