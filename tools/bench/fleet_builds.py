"""Cold builds of several real Bazels at once, all of whose files a fresh `casfs serve --execute` has to take.

Each client has a workspace of its own with thousands of small files, all of them inputs of each of four actions that do
nothing: so the build is an upload. Bazel begins all uploads at once, over up to 100 connections. The second case has
one client and a server that is held to a tenth of a core by a control group. At the end the server gets SIGTERM; one
that still runs after 60 s is killed.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from store.kernel import raise_open_files
from tools.bench import bazel
from tools.bench.bazel import Bazel, Built
from tools.bench.fleet_servers import DRAINED_SECONDS, END_SECONDS, LoadedServer, loaded_server
from tools.bench.measuring import Outcome, Settings
from tools.bench.scratch import stop
from tools.bench.server import CASFS, MemoryWatch
from tools.bench.workers import Refused

_ACTIONS = 4
_DIRECTORIES = 200
_LIMIT_SECONDS = 540.0
_END_OF_BAZEL_SECONDS = 60.0
_BUILD = """
sources = glob(["src/**"])
[genrule(
    name = "action-%d" % number,
    srcs = sources,
    outs = ["output-%d" % number],
    cmd = "echo %d > $@" % number,
) for number in range({actions})]
filegroup(name = "everything", srcs = ["action-%d" % number for number in range({actions})])
"""


class Case(NamedTuple):
    """So many clients, the files of each, and what of a core the server may use (None: all there is)."""

    clients: int
    files: int
    core_percent: int | None = None

    @property
    def title(self) -> str:
        """Such as "4 x 20,000 files"."""
        held = f", {self.core_percent}% of a core" if self.core_percent else ""
        return f"{self.clients} x {self.files:,} files{held}"


def run(settings: Settings) -> Outcome:
    """Without Bazel there is nothing to measure."""
    outcome = Outcome()
    if not bazel.is_installed():
        outcome.notes.append("bazel is not installed (Debian: bazel-bootstrap)")
        return outcome
    raise_open_files()
    for case in _choose_cases(settings):
        for _ in range(settings.rounds(3)):
            try:
                _measure(settings, outcome, case)
            except Refused as refused:
                outcome.notes.append(f"{case.title}: skipped: {refused}.")
                break
        else:
            _aim(outcome, case)
    return outcome


def _aim(outcome: Outcome, case: Case) -> None:
    succeeded, ended = (f"{case.title}: {what}" for what in ("builds that succeeded", "from SIGTERM to the end"))
    outcome.aim(succeeded, outcome.median(succeeded, CASFS), case.clients, "", at_most=False)
    outcome.aim(ended, outcome.median(ended, CASFS), DRAINED_SECONDS, "s", at_most=True)


def _choose_cases(settings: Settings) -> list[Case]:
    cases = [Case(2, 50), Case(1, 50, 50)] if settings.quick else [Case(4, 20_000), Case(1, 12_350, 10)]
    asked = settings.fleet
    if asked == type(asked)():
        return cases
    return [Case(asked.clients or cases[0].clients, asked.files or cases[0].files, asked.core_percent)]


def _measure(settings: Settings, outcome: Outcome, case: Case) -> None:
    place = settings.scratch / "server"
    options = ("--execute", "--host-root", "--jobs", "2")
    with ExitStack() as stack:
        server = stack.enter_context(loaded_server(CASFS, place, core_percent=case.core_percent, options=options))
        builders = [_make_client(settings.scratch, number, case.files) for number in range(case.clients)]
        for builder in builders:
            stack.callback(builder.forget)
        began = time.monotonic()
        cpu = server.served.cpu()
        with MemoryWatch(server.served) as memory:
            built = _build_all(builders, server)
        outcome.add(f"{case.title}: wall", CASFS, "s", time.monotonic() - began)
        outcome.add(f"{case.title}: CPU of the server", CASFS, "s", server.served.cpu() - cpu)
        outcome.add(f"{case.title}: peak memory", CASFS, "MiB", memory.most)
        _judge(outcome, case, built)
        seconds = server.end()
        if seconds is None:
            outcome.notes.append(f"{case.title}: still ran {END_SECONDS:.0f} s after SIGTERM: {server.complaint()}")
        outcome.add(f"{case.title}: from SIGTERM to the end", CASFS, "s", END_SECONDS if seconds is None else seconds)


def _judge(outcome: Outcome, case: Case, built: Sequence[Built]) -> None:
    done = [one for one in built if one.code == 0 and one.processes.get("remote") == _ACTIONS]
    outcome.add(f"{case.title}: builds that succeeded", CASFS, "", len(done))
    for one in built:
        if one not in done:
            errors = [line for line in one.text.splitlines() if "ERROR" in line] or one.text.strip().splitlines()[-1:]
            outcome.notes.append(f"{case.title}: a build failed with {one.code}: {' '.join(errors[:1])[:300]}")


def _make_client(scratch: Path, number: int, files: int) -> Bazel:
    """A workspace whose files no other client has. Later rounds find it there."""
    place = scratch / f"client-{number}-of-{files}-files"
    workspace = place / "workspace"
    if not workspace.exists():
        for file in range(files):
            directory = workspace / "src" / f"d{file % _DIRECTORIES:03}"
            directory.mkdir(parents=True, exist_ok=True)
            text = f"// {number} {file}\n" + f"int x{file};\n" * (5 + file % 40)
            (directory / f"f{file:06}.h").write_text(text)
        (workspace / "WORKSPACE").touch()
        (workspace / "BUILD").write_text(_BUILD.format(actions=_ACTIONS))
    return Bazel(place, workspace, heap="1g")


def _build_all(builders: Sequence[Bazel], server: LoadedServer) -> list[Built]:
    """All at once; what takes too long is ended."""
    deadline = time.monotonic() + _LIMIT_SECONDS
    options = ["--jobs=2", f"--remote_executor=grpc://{server.served.address}", "--spawn_strategy=remote"]
    options += ["--noremote_accept_cached", "--experimental_convenience_symlinks=ignore"]
    started = [builder.start("build", *options, "//:everything") for builder in builders]
    with ThreadPoolExecutor(len(started)) as threads:
        return list(threads.map(lambda process: _wait_built(process, deadline), started))


def _wait_built(process: subprocess.Popen[str], deadline: float) -> Built:
    try:
        text, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.terminate()
        stop(process, _END_OF_BAZEL_SECONDS)
        text, _ = process.communicate()
    return Built(process.returncode, text)
