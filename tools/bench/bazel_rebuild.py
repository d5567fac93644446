"""Bazel rebuilds 2,000 cached actions after `bazel clean`: out of casfs over gRPC and HTTP, and of its own disk cache.

    gRPC           --remote_cache=grpc://…, `casfs serve` beside it on the same cores
    gRPC, minimal  the same with --remote_download_minimal: no bytes of outputs are fetched
    HTTP           --remote_cache=http://…, the same server
    disk cache     --disk_cache=STORE/blobs: nobody is asked, the floor

Every action is one output of 4 KiB. Bazel's server stays from build to build, so that its start and its analysis don't
count; wall time is Bazel's own. That every action was a cache hit is checked each time. On the machine where the marks
of bazel-remote were measured the disk cache took 0.6 to 1.2 s.
"""

from __future__ import annotations

from store.repository import Store
from tools.bench import bazel
from tools.bench.bazel import Bazel, Built
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.server import Served, casfs_command, serving

GRPC, MINIMAL, HTTP, DISK = "gRPC", "gRPC, minimal", "HTTP", "disk cache"
_MARK_ACTIONS = 2000
_MARK_SECONDS = {GRPC: 2.1, HTTP: 2.4}
"""bazel-remote's, on a machine like ours: measured once, and not in this run."""
_BUILD = """
[genrule(
    name = "action-%d" % number,
    outs = ["output-%d" % number],
    cmd = "head -c 4000 /dev/zero > $@; echo %d >> $@" % number,
) for number in range({actions})]
filegroup(name = "all-of-them", srcs = ["action-%d" % number for number in range({actions})])
"""


def run(settings: Settings) -> Outcome:
    """Without Bazel there is nothing to measure."""
    outcome = Outcome()
    if not bazel.is_installed():
        outcome.notes.append("bazel is not installed (Debian: bazel-bootstrap)")
        return outcome
    actions = settings.size(_MARK_ACTIONS, 20)
    outcome.notes.append(f"{actions:,} actions")
    workspace, place = settings.scratch / "workspace", settings.scratch / "store"
    workspace.mkdir()
    (workspace / "WORKSPACE").touch()
    (workspace / "BUILD").write_text(_BUILD.format(actions=actions))
    Store.open(place).close()
    command = [*casfs_command(place), "--http-listen", "127.0.0.1:0"]
    with Bazel(settings.scratch, workspace, stays=True, heap="1g") as builder, serving(command) as server:
        sides = {
            GRPC: [f"--remote_cache=grpc://{server.address}"],
            MINIMAL: [f"--remote_cache=grpc://{server.address}", "--remote_download_minimal"],
            HTTP: [f"--remote_cache=http://{server.http}"],
            DISK: [f"--disk_cache={place / 'blobs'}"],
        }
        for side in (GRPC, HTTP):  # which keep their results apart
            builder.clean()
            _build(builder, sides[side], actions, hits=False)
        for _, side in alternate(list(sides), settings.rounds(5)):
            _measure(outcome, builder, server, side, sides[side], actions)
    if actions == _MARK_ACTIONS:
        for side, mark in _MARK_SECONDS.items():
            seconds = outcome.median("rebuild", side)
            outcome.aim(f"rebuild over {side}: level with bazel-remote's mark", seconds, mark, "s", at_most=True)
    return outcome


def _measure(outcome: Outcome, builder: Bazel, server: Served, side: str, options: list[str], actions: int) -> None:
    builder.clean()
    before = server.cpu()
    built = _build(builder, options, actions, hits=True)
    outcome.add("rebuild", side, "s", built.seconds)
    outcome.add("CPU of the server", side, "s", server.cpu() - before)


def _build(builder: Bazel, options: list[str], actions: int, *, hits: bool) -> Built:
    built = builder.build(*options, "//:all-of-them")
    found = built.processes.get("remote cache hit", 0)
    if built.code or found != (actions if hits else 0):
        raise RuntimeError(f"{found} of {actions} actions came from the cache:\n{built.text}")
    return built
