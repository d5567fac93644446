"""Clones beside projection, on a tree that moves: set-up, first read, and again after 1% of the files changed.

The tree has about 12,000 files: a C++ source with its headers, all read once
by the action (open, read, close), and files of the same sizes beside them. The
second action's tree has other contents in every hundredth file, so in nearly
every directory: engine kernel lays those files out over what it has kept of the
first tree.

    kernel, passthrough       a casfs sandbox over that engine
    reflink, hardlink, copy   `casfs checkout --mode` of that name, its Python API; taken away by `rm -rf`
    snapshot                  a btrfs snapshot of a checkout, made for the first action; in the second action's
                              what changed is replaced, which it gets to know for nothing

On new volumes of btrfs and XFS on loop devices (direct I/O) with the blobs on
the same volume; as *two volumes*, the blobs are where temporary files are made,
and the action runs on a btrfs. The first action of a round finds nothing of an
earlier one but the blobs in the page cache. *Disk taken* is what the volume
gained by set-up and reading.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casfs.sandbox import enter_namespace
from store.repository import Store
from tools.bench.action_tree import find_headers, inputs_read
from tools.bench.casfs_side import KERNEL
from tools.bench.clone_tree import Moving, make_moving
from tools.bench.clone_worker import CHECKOUTS, SNAPSHOT
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.scratch import in_child
from tools.bench.toolchain import find_toolchain
from tools.bench.volumes import mounted_volume
from tools.bench.workers import Refused, asked

_WORKER = "tools.bench.clone_worker"
_VOLUME_BYTES = 4 << 30
_QUICK_VOLUME_BYTES = 400 << 20
"""XFS takes no less than 300 MB."""
_ENGINES = (KERNEL, "passthrough")
_FILES = 12_000
_WHOLE = "both actions, whole"


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the action reads, and where it is on this machine."""

    headers: list[Path]
    scratch: Path
    beside: int

    def add_to(self, store: Path) -> Moving:
        """Both trees, in a new store."""

        def work() -> Moving:
            with Store.open(store) as opened:
                return make_moving(opened, self.headers, self.scratch, self.beside)

        return in_child(work)


class _Place:
    """One pair of volumes, that of the blobs and that of the action, and all ways on it."""

    def __init__(self, outcome: Outcome, settings: Settings, label: str) -> None:
        self._outcome = outcome
        self._settings = settings
        self._label = label
        self._found: list[str] = []
        """A hash of what each action read, which is the same for all."""

    def measure(self, inputs: _Inputs, store: Path, volume: Path, ways: list[str]) -> None:
        """All ways, in turns."""
        moving = inputs.add_to(store)
        note = f"{moving.files:,} files of {moving.bytes / 1e6:.0f} MB in all; {moving.changed} change"
        if note not in self._outcome.notes:
            self._outcome.notes.append(note)
        options = {
            "store": str(store),
            "volume": str(volume),
            "roots": [str(moving.first), str(moving.second)],
            "read": [os.fsdecode(path) for path in inputs_read(inputs.headers)],
        }
        refused: set[str] = set()
        with asked(_WORKER, json.dumps(options)) as worker:
            # The first round is the one whose bytes are compared: after the reading that is timed.
            for number, way in alternate(ways, self._settings.rounds(3)):
                if way in refused:
                    continue
                try:
                    actions = worker.ask(way=way, check=number == 0)["actions"]
                except Refused as error:
                    self._outcome.notes.append(f"{self._label}: {way} is refused: {error}")
                    refused.add(way)
                    continue
                if number == 0:
                    self._compare(way, [action["found"] for action in actions])
                self._add(way, actions)

    def _compare(self, way: str, found: list[str]) -> None:
        self._found = self._found or found
        if found != self._found or len(set(found)) != len(found):
            raise RuntimeError(f"{self._label}: {way} has other bytes than the others")

    def _add(self, way: str, actions: list[dict[str, Any]]) -> None:
        whole = 0.0
        for which, action in zip(("first", "second"), actions, strict=True):
            for what, key in (("set-up", "set_up"), ("read", "read"), ("teardown", "tear_down")):
                self._outcome.add(f"{self._label}: {which} action, {what}", way, "ms", action[key] * 1e3)
                whole += action[key]
            self._outcome.add(f"{self._label}: {which} action, disk taken", way, "MB", action["used"] / 1e6)
        self._outcome.add(f"{self._label}: {_WHOLE}", way, "ms", whole * 1e3)


def run(settings: Settings) -> Outcome:
    """A quick run has few files beside those that are read. Raises NoCompiler."""
    outcome = Outcome()
    if os.geteuid():
        outcome.notes.append("everything was left out: only root can mount volumes")
        return outcome
    enter_namespace()  # the volumes are seen by nobody else, and end with this process and its workers
    scratch = settings.scratch / "action"
    headers = find_headers(find_toolchain(), scratch)
    read = len(inputs_read(headers))
    inputs = _Inputs(headers, scratch, settings.size(max(_FILES - read, 0), 100))
    size = settings.size(_VOLUME_BYTES, _QUICK_VOLUME_BYTES)
    for label, kind, apart in (("btrfs", "btrfs", False), ("XFS", "xfs", False), ("two volumes", "btrfs", True)):
        ways = [*_ENGINES, *CHECKOUTS, *([SNAPSHOT] if kind == "btrfs" else [])]
        place = settings.scratch / label.replace(" ", "-")
        place.mkdir()
        try:
            with mounted_volume(place / "volume", kind, size) as volume:
                store = (place if apart else volume) / "store"
                _Place(outcome, settings, label).measure(inputs, store, volume, ways)
        except Refused as error:
            outcome.notes.append(f"{label} was left out: {error}")
    return outcome
