"""An action's input root: laid out, its headers read for the first time, taken away; by every way there is.

The action is a C++ source with its headers, all read once (open, read, close).
Its input root has these alone, or 11,783 or 300,000 other files beside them.
Each repetition's root was never seen before: the source and two headers differ
each time, the subtrees of the system's headers and of the other files do not.

    host                   the reads alone, in a directory that is there already
    hard links             a directory tree made of hard links to the blobs
    symbolic links, copy   the same of symbolic links, and of copies
    buildbox-fuse          BuildStream's and BuildGrid's FUSE file system, on its own local CAS
    passthrough, native    a casfs sandbox over our own FUSE session
    kernel                 a casfs sandbox over the kernel engine, as root
    kernel, ordinary user  the same without privilege

*whole* is set-up, first read and teardown together, less the host's read.
*nothing known* is the set-up of a root none of whose directories was seen
before (in the largest tree the first root of a process; else the first and
more such), all other values are those of a worker that has seen the subtrees:
two roots of each shape are not counted. What a side alone takes long for is repeated less.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.action_methods import LINKS
from tools.bench.action_tree import find_headers, inputs_read
from tools.bench.action_worker import BUILDBOX, HOST, bare_root
from tools.bench.buildbox import get_buildbox_fuse, version_of
from tools.bench.casfs_side import ENGINES, KERNEL, KERNEL_USER
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.ordinary_user import NOBODY, NOT_ROOT
from tools.bench.toolchain import find_toolchain
from tools.bench.workers import Refused, Worker, asked

_WORKER = "tools.bench.action_worker"
_WARM_UPS = 2
_FIRST = 1
"""The salt of the first root, which is the same on all sides, so that its bytes can be compared."""
_UNKNOWN = 5
_PATIENCE_SECONDS = 40.0
"""A side that has taken so long with one shape is not asked again."""
_LARGE = 100_000
CHANGED_NODES = 74
"""Nodes of the subtree that differs in each variant (`tools.bench.action_tree`)."""
_TIMES_BARE, _TIMES_BARE_UNKNOWN = 3.0, 1.6
"""The aims of 2 and 5 ms were set on a machine where the bare calls take 0.65 and 3.1 ms."""
_TOO_SLOW = ("symbolic links", "copy")
"""In a large tree: minutes a root, and their cost is proportional to the number of files."""


@dataclass(slots=True)
class _Side:
    """A worker that measures one way, and the seconds it has spent."""

    worker: Worker
    spent: float = 0.0
    first: dict[str, Any] = field(default_factory=dict)


class _Shape:
    """One tree, and all sides of it."""

    def __init__(self, outcome: Outcome, settings: Settings, headers: list[Path], padding: int) -> None:
        self._outcome = outcome
        self._settings = settings
        self._headers = headers
        self._padding = padding
        self.read = len(inputs_read(headers))
        """How many files the action reads."""
        self.count = self.read + padding
        self.label = f"{self.count:,} inputs"
        self._place = settings.scratch / f"shape-{padding}"
        self._sides: dict[str, _Side] = {}
        self._number = 0

    def measure(self, buildbox: Path | None) -> None:
        """Every side, in turns."""
        with ExitStack() as stack:
            self._start_all(stack, buildbox)
            for name in list(self._sides):
                self._warm_up(name)
            for _, name in alternate(list(self._sides), self._settings.rounds(7)):
                side = self._sides[name]
                if side.spent < _PATIENCE_SECONDS or self._outcome.find(self.whole, name) is None:
                    self._add(name, self._ask(name))
            self._measure_yardsticks()
        shutil.rmtree(self._place, ignore_errors=True)

    @property
    def whole(self) -> str:
        """The measure of everything together."""
        return f"{self.label}: whole"

    @property
    def yardstick(self) -> str:
        """The measure of bare system calls."""
        return f"{self.label}: yardstick"

    def _start_all(self, stack: ExitStack, buildbox: Path | None) -> None:
        large = self._padding >= _LARGE
        links = [kind for kind in LINKS if not (large and kind in _TOO_SLOW)]
        if large:
            self._outcome.notes.append(
                f"{self.label}: {' and '.join(_TOO_SLOW)} were not measured: they take minutes a root, as many times "
                "longer as there are more files"
            )
        self._place.mkdir()
        for name in [HOST, *links, *([BUILDBOX] if buildbox else []), *ENGINES]:
            self._start(stack, name, name, self._place / "store", buildbox)
        if os.geteuid():
            self._outcome.notes.append(f"{KERNEL_USER} was left out: {NOT_ROOT}")
            return
        home = self._place / "user"
        home.mkdir()
        os.chown(home, NOBODY, NOBODY)
        self._start(stack, KERNEL_USER, KERNEL, home / "store", None, reachable=home)

    def _start(
        self, stack: ExitStack, name: str, side: str, store: Path, buildbox: Path | None, reachable: Path | None = None
    ) -> None:
        options = {
            "side": side,
            "store": str(store),
            "place": str((reachable or self._place) / f"root-{len(self._sides)}"),
            "headers": [str(header) for header in self._headers],
            "padding": self._padding,
            "buildbox": str(buildbox),
        }
        try:
            worker = stack.enter_context(asked(_WORKER, json.dumps(options), reachable=reachable))
        except Refused as error:
            self._outcome.notes.append(f"{self.label}: {name} was left out: {error}")
        else:
            self._sides[name] = _Side(worker)

    def _ask(self, name: str, *, salt: int = 0) -> dict[str, Any]:
        """One action; with a salt the number doesn't matter."""
        side = self._sides[name]
        if not salt:
            self._number += 1
        answer = side.worker.ask(number=0 if salt else self._number, salt=salt, check=salt == _FIRST)
        side.spent += answer["set_up"] + answer["read"] + answer["tear_down"]
        if answer["size"] != side.first.get("size", answer["size"]):
            raise RuntimeError(f"{name}: the files have other sizes than before")
        return answer

    def _warm_up(self, name: str) -> None:
        """The first root, whose bytes are compared with the host's, and those that aren't counted."""
        side = self._sides[name]
        try:
            side.first = self._ask(name, salt=_FIRST)
        except Refused as error:
            self._outcome.notes.append(f"{self.label}: {name} was left out: {error}")
            del self._sides[name]
            return
        if side.first["found"] != self._sides[HOST].first["found"]:
            raise RuntimeError(f"{name}: the files have other bytes than on the host")
        if name in (HOST, BUILDBOX, *LINKS):
            return
        unknown = f"{self.label}: set-up, nothing known"
        self._outcome.add(unknown, name, "ms", side.first["set_up"] * 1e3)
        for salt in range(_FIRST + 1, _FIRST + self._settings.rounds(_UNKNOWN)):
            if self._padding < _LARGE and side.spent < _PATIENCE_SECONDS / 4:
                self._outcome.add(unknown, name, "ms", self._ask(name, salt=salt)["set_up"] * 1e3)
        for _ in range(_WARM_UPS):
            if side.spent < _PATIENCE_SECONDS:
                self._ask(name)

    def _add(self, name: str, answer: dict[str, Any]) -> None:
        outcome = self._outcome
        upcalls = answer["upcalls"]
        outcome.add(f"{self.label}: first read", name, "ms", answer["read"] * 1e3, upcalls)
        if name == HOST:
            return
        host = outcome.median(f"{self.label}: first read", HOST) / 1e3
        outcome.add(f"{self.label}: set-up", name, "ms", answer["set_up"] * 1e3)
        outcome.add(f"{self.label}: teardown", name, "ms", answer["tear_down"] * 1e3)
        whole = answer["set_up"] + answer["read"] + answer["tear_down"] - host
        outcome.add(self.whole, name, "ms", whole * 1e3)
        if answer["warm_bytes"] is not None:
            outcome.add(f"{self.label}: memory of warm layers", name, "MB", answer["warm_bytes"] / 1e6)

    def _measure_yardsticks(self) -> None:
        """In the same minutes: what set-up can't do without, by the bare system calls."""
        for number in range(self._settings.rounds(7)):
            taken = self._sides[HOST].worker.ask(yardsticks=[CHANGED_NODES, self.read], number=number)
            for name, seconds in taken.items():
                self._outcome.add(self.yardstick, name, "ms", seconds * 1e3)


def run(settings: Settings) -> Outcome:
    """A quick run has fewer files beside. Raises NoCompiler."""
    outcome = Outcome()
    headers = find_headers(find_toolchain(), settings.scratch / "action")
    try:
        found = get_buildbox_fuse(settings.scratch, install=not settings.quick)
        outcome.notes.append(version_of(found))
        buildbox: Path | None = found
    except Refused as error:
        buildbox = None
        outcome.notes.append(f"{BUILDBOX} is not compared to: {error}")
    shapes = []
    for padding in (0, settings.size(11_783, 200), settings.size(300_000, 600)):
        shape = _Shape(outcome, settings, headers, padding)
        shape.measure(buildbox)
        shapes.append(shape)
    _set_aims(outcome, *shapes)
    return outcome


def _set_aims(outcome: Outcome, small: _Shape, middle: _Shape, large: _Shape) -> None:
    _compare(outcome, small.whole, KERNEL, BUILDBOX, 1 / 6)
    _compare(outcome, small.whole, KERNEL, "hard links", 1)
    _compare(outcome, middle.whole, KERNEL, "hard links", 1 / 25)
    for shape in (small, middle, large):
        _compare(outcome, shape.whole, KERNEL_USER, KERNEL, 1.2)
        _limit(outcome, f"{shape.label}: set-up", 2)
        _limit_to_bare(outcome, shape, "set-up", CHANGED_NODES, _TIMES_BARE)
    _limit(outcome, f"{small.label}: set-up, nothing known", 5)
    _limit_to_bare(outcome, small, "set-up, nothing known", small.read, _TIMES_BARE_UNKNOWN)


def _compare(outcome: Outcome, what: str, side: str, other: str, limit: float) -> None:
    ours, theirs = outcome.find(what, side), outcome.find(what, other)
    if ours is not None and theirs is not None:
        outcome.aim(f"{what}: {side} against {other}", ours.median / theirs.median, limit, "", at_most=True)


def _limit_to_bare(outcome: Outcome, shape: _Shape, what: str, entries: int, limit: float) -> None:
    """The same aim for a machine of any speed."""
    measure = outcome.find(f"{shape.label}: {what}", KERNEL)
    bare = outcome.find(shape.yardstick, bare_root(entries))
    if measure is not None and bare is not None:
        outcome.aim(
            f"{measure.what}, {KERNEL}, against {bare.side}", measure.median / bare.median, limit, "", at_most=True
        )


def _limit(outcome: Outcome, what: str, milliseconds: float) -> None:
    measure = outcome.find(what, KERNEL)
    if measure is not None:
        outcome.aim(f"{what}, {KERNEL}", measure.median, milliseconds, "ms", at_most=True)
