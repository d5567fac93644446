"""Bazel rebuilds 2,000 cached actions after `bazel clean`: out of casfs over gRPC and HTTP, and of its own disk cache.

    gRPC           --remote_cache=grpc://…, `casfs serve` beside it on the same cores
    gRPC, minimal  the same with --remote_download_minimal: no bytes of outputs are fetched
    bare grpcio    the same results and outputs in the memory of a server that does no more than this: gRPC's floor
    HTTP           --remote_cache=http://…, the server of the first
    nginx          the files of the store, by nginx: HTTP's floor
    disk cache     --disk_cache=STORE/blobs: nobody is asked, the floor of all

Every action is one output of 4 KiB. Bazel's server stays from build to build, so that its start and its analysis don't
count; wall time is Bazel's own. That every action was a cache hit is checked each time. The marks of bazel-remote were
measured once, on a machine where bare grpcio took 1.6 s and the disk cache 0.6 to 1.2 s; so of a machine of another
speed what is told is how many times as long as bare grpcio something takes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from store.repository import Store
from tools.bench import bazel
from tools.bench.bazel import Bazel, Built
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.server import BARE, Served, casfs_command, serving
from tools.bench.server_http import NGINX, serving_by_nginx

GRPC, MINIMAL, HTTP, DISK = "gRPC", "gRPC, minimal", "HTTP", "disk cache"
_MARK_ACTIONS = 2000
_MARK_SECONDS = {GRPC: 2.1, HTTP: 2.4}
"""bazel-remote's."""
_BARE_MARK_SECONDS = 1.6
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
    with ExitStack() as stack:
        builder = stack.enter_context(Bazel(settings.scratch, workspace, stays=True, heap="1g"))
        casfs = stack.enter_context(serving(command))
        for option in (_over_grpc(casfs), _over_http(casfs)):  # which keep their results apart
            builder.clean()
            _build(builder, [option], actions, hits=False)
        bare = stack.enter_context(serving(["tools.bench.bare_cache", str(place / "blobs")]))
        sides = {
            GRPC: _Side(casfs, (_over_grpc(casfs),)),
            MINIMAL: _Side(casfs, (_over_grpc(casfs), "--remote_download_minimal")),
            BARE: _Side(bare, (_over_grpc(bare),)),
            HTTP: _Side(casfs, (_over_http(casfs),)),
            DISK: _Side(casfs, (f"--disk_cache={place / 'blobs'}",)),
        }
        if shutil.which(NGINX) is None:
            outcome.notes.append(f"{NGINX} is not installed (Debian: {NGINX})")
        else:
            nginx = stack.enter_context(serving_by_nginx(settings.scratch, place / "blobs"))
            sides[NGINX] = _Side(nginx, (_over_http(nginx),))
        for _, side in alternate(list(sides), settings.rounds(5)):
            _measure(outcome, builder, side, sides[side], actions)
    _compare(outcome, actions)
    return outcome


class _Side(NamedTuple):
    """The server whose CPU counts, and what Bazel is told."""

    server: Served
    options: Sequence[str]


def _over_grpc(server: Served) -> str:
    return f"--remote_cache=grpc://{server.address}"


def _over_http(server: Served) -> str:
    return f"--remote_cache=http://{server.http}"


def _measure(outcome: Outcome, builder: Bazel, name: str, side: _Side, actions: int) -> None:
    builder.clean()
    before = side.server.cpu()
    built = _build(builder, side.options, actions, hits=True)
    outcome.add("rebuild", name, "s", built.seconds)
    outcome.add("CPU of the server", name, "s", side.server.cpu() - before)


def _compare(outcome: Outcome, actions: int) -> None:
    floors = {GRPC: BARE, HTTP: NGINX}
    for side, floor in floors.items():
        if (measured := outcome.find("rebuild", floor)) is not None:
            times = outcome.median("rebuild", side) / measured.median
            outcome.notes.append(f"{side} takes {times:.2f} times as long as {floor}")
    if actions != _MARK_ACTIONS:
        return
    for side, mark in _MARK_SECONDS.items():
        seconds = outcome.median("rebuild", side)
        outcome.aim(f"rebuild over {side}: level with bazel-remote's mark", seconds, mark, "s", at_most=True)
        outcome.aim(
            f"rebuild over {side}: as near to bare grpcio as bazel-remote's mark is to its own",
            seconds / outcome.median("rebuild", BARE),
            mark / _BARE_MARK_SECONDS,
            "times",
            at_most=True,
        )


def _build(builder: Bazel, options: Sequence[str], actions: int, *, hits: bool) -> Built:
    built = builder.build(*options, "//:all-of-them")
    found = built.processes.get("remote cache hit", 0)
    if built.code or found != (actions if hits else 0):
        raise RuntimeError(f"{found} of {actions} actions came from the cache:\n{built.text}")
    return built
