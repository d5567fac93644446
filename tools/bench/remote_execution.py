"""Bazel builds with remote execution through casfs, beside its own sandbox and without any.

    casfs          --remote_executor: `casfs serve --execute` on the same cores, every action in a sandbox of its own
    linux-sandbox  Bazel's own sandbox: a directory of symbolic links for each action
    no sandbox     actions run in the source tree

*small*: actions that read all of their inputs, the headers that a C++ source of this machine includes. *large*: actions
that read as many out of 12,000. Each has a file of its own that is new in every build, so no input root was ever seen
before. *project*: the C library c-ares, over sixty translation units, and three programs; built from nothing each time.
Bazel's server stays, its analysis doesn't count; two actions run at a time. Wall time is Bazel's own. What an action
took on the worker comes from its log, by stage: fetch (its command, its inputs, its sandbox), run, upload (outputs,
result).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from contextlib import ExitStack
from pathlib import Path

from tools.bench import bazel
from tools.bench.action_tree import find_headers
from tools.bench.bazel import Bazel
from tools.bench.bazel_shapes import Shape, made, make_actions
from tools.bench.c_project import EVERYTHING, make_workspace
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.server import Served, casfs_command, serving
from tools.bench.toolchain import find_toolchain
from tools.bench.workers import Refused

CASFS, SANDBOX, NONE = "casfs", "linux-sandbox", "no sandbox"
_STAGES = ("fetch", "run", "upload")
_AIMS = {"fetch": 3.0, "run": 22.0, "upload": 2.0}
"""Milliseconds."""
_CPU_MOST = 10.0
_JOBS = 4
"""Actions that Bazel has in flight with remote execution: two run, the others are on their way there or back."""


def run(settings: Settings) -> Outcome:
    """Without Bazel or bubblewrap there is nothing to measure."""
    outcome = Outcome()
    for program in (bazel.PROGRAM, "bwrap"):
        if shutil.which(program) is None:
            outcome.notes.append(f"{program} is not installed")
            return outcome
    headers = find_headers(find_toolchain(), settings.scratch / "action")
    shapes = [
        make_actions(settings, "small", headers, settings.size(200, 4), 0),
        make_actions(settings, "large", headers, settings.size(100, 2), settings.size(11_783, 100)),
    ]
    try:
        if settings.quick:
            raise Refused("a quick run builds nothing large")
        shapes.append(Shape("project", make_workspace(made(settings.scratch / "project")), lambda number: None))
    except Refused as refused:
        outcome.notes.append(f"project isn't built: {refused}")
    for shape in shapes:
        _measure(outcome, settings, shape)
    _set_aims(outcome, shapes)
    return outcome


def _measure(outcome: Outcome, settings: Settings, shape: Shape) -> None:
    scratch = settings.scratch / f"{shape.workspace.name}-bazel"
    scratch.mkdir()
    log = scratch / "actions.jsonl"
    store = scratch / "store"
    with ExitStack() as stack:
        command = [*casfs_command(store), "--execute", "--host-root", "--action-log", str(log)]
        server = stack.enter_context(serving(command))
        sides = {
            CASFS: [f"--remote_executor=grpc://{server.address}", "--noremote_accept_cached", f"--jobs={_JOBS}"],
            SANDBOX: ["--spawn_strategy=linux-sandbox", "--jobs=2"],
            NONE: ["--spawn_strategy=local", "--jobs=2"],
        }
        builders = {
            side: stack.enter_context(
                Bazel(made(scratch / side.replace(" ", "-")), shape.workspace, stays=True, heap="1g")
            )
            for side in sides
        }
        number = 0
        for side, builder in builders.items():
            number += 1
            # What a build needs once: the compiler found, inputs uploaded, subtrees seen.
            for _ in range(2 if side == CASFS else 1):
                shape.renew(number := number + 1)
                _build(builder, sides[side], side)
                builder.clean()
        for _, side in alternate(list(sides), settings.rounds(5)):
            shape.renew(number := number + 1)
            os.sync()  # what the side before has left to write is not this one's
            _measure_build(outcome, shape, builders[side], sides[side], side, server, log)
            builders[side].clean()
        outcome.add(f"{shape.name}: memory of server and worker", CASFS, "MiB", server.memory())


def _build(builder: Bazel, options: list[str], side: str) -> tuple[float, int]:
    """Seconds, and how many actions ran."""
    built = builder.build(*options, EVERYTHING, local=False)
    kind = {CASFS: "remote", SANDBOX: "linux-sandbox", NONE: "local"}[side]
    ran = built.processes.get(kind, 0)
    if built.code or not ran or built.processes.keys() - {kind, "internal"}:
        raise RuntimeError(f"{side}: {built.processes}\n{built.text}")
    return built.seconds, ran


def _measure_build(
    outcome: Outcome, shape: Shape, builder: Bazel, options: list[str], side: str, server: Served, log: Path
) -> None:
    cpu, seen = server.cpu(), _size(log)
    seconds, ran = _build(builder, options, side)
    outcome.add(f"{shape.name}: wall", side, "s", seconds)
    if side != CASFS:
        return
    with log.open("rb") as file:
        file.seek(seen)
        actions = [json.loads(line) for line in file]
    if len(actions) != ran or any(action["exit_code"] for action in actions):
        raise RuntimeError(f"{ran} actions ran, the log has {len(actions)}: {actions[-1:]}")
    for stage in _STAGES:
        taken = statistics.median(action[f"{stage}_seconds"] for action in actions)
        outcome.add(f"{shape.name}: an action on the worker", stage, "ms", taken * 1e3)
    outcome.add(
        f"{shape.name}: nodes laid out for an action", CASFS, "", statistics.median(a["laid_out"] for a in actions)
    )
    upcalls = sum(action["upcalls"] for action in actions)
    outcome.add(f"{shape.name}: upcalls of all actions", CASFS, "", upcalls)
    outcome.add(f"{shape.name}: CPU of server and worker for an action", CASFS, "ms", (server.cpu() - cpu) / ran * 1e3)


def _size(path: Path) -> int:
    return os.stat(path).st_size if path.exists() else 0


def _set_aims(outcome: Outcome, shapes: list[Shape]) -> None:
    for shape in shapes:
        wall = f"{shape.name}: wall"
        ours = outcome.median(wall, CASFS)
        if shape.workspace.name == "workspace":
            outcome.aim(f"{wall}: against no sandbox", ours / outcome.median(wall, NONE), 1.1, "", at_most=True)
            continue
        outcome.aim(f"{wall}: against linux-sandbox", ours / outcome.median(wall, SANDBOX), 1, "", at_most=True)
        for stage, most in _AIMS.items():
            what = f"{shape.name}: an action on the worker"
            outcome.aim(f"{what}: {stage}", outcome.median(what, stage), most, "ms", at_most=True)
        cpu = f"{shape.name}: CPU of server and worker for an action"
        outcome.aim(cpu, outcome.median(cpu, CASFS), _CPU_MOST, "ms", at_most=True)
