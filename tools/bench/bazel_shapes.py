"""Workspaces for Bazel whose actions have many inputs, all of them declared: what two benchmarks build."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.bench.measuring import Settings

_ACTIONS = """
filegroup(name = "read", srcs = glob(["read/**"]))
filegroup(name = "beside", srcs = glob(["beside/**"]))
[genrule(
    name = "action-%d" % number,
    srcs = ["new/%d" % number, ":read"{beside}],
    outs = ["output-%d" % number],
    cmd = "cat $(location new/%d) $(locations :read) | cksum > $@" % number,
) for number in range({actions})]
filegroup(name = "everything", srcs = ["action-%d" % number for number in range({actions})])
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """A workspace to build: `renew` makes every action new, given a number never used before."""

    name: str
    workspace: Path
    renew: Callable[[int], None]


def made(directory: Path) -> Path:
    """A new directory, for use in an expression."""
    directory.mkdir()
    return directory


def make_actions(settings: Settings, name: str, headers: list[Path], actions: int, beside: int) -> Shape:
    """So many actions that read all headers, each with a file of its own and `beside` inputs that nobody opens."""
    workspace = settings.scratch / name
    for number, header in enumerate(headers):
        place = workspace / "read" / f"{number % 20:02}" / f"{number}-{header.name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(header, place)
    for number in range(beside):
        place = workspace / "beside" / f"{number // 100:03}" / f"{number}.h"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"never opened, number {number}\n")
    (workspace / "WORKSPACE").touch()
    (workspace / "BUILD").write_text(_ACTIONS.format(actions=actions, beside=', ":beside"' if beside else ""))
    (workspace / "new").mkdir()

    def renew(number: int) -> None:
        for action in range(actions):
            (workspace / "new" / str(action)).write_text(f"{number}, action {action}\n")

    return Shape(f"{actions} with {len(headers) + beside + 1:,} inputs", workspace, renew)
