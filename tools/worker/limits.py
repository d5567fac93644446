"""What one command may take of the machine: memory and processes, by a control group where there can be one.

A control group bounds all of a command's processes together. It is of version
2 where our own group lets us divide it (a service with ``Delegate=yes``), of
version 1 for root where that is mounted. Else rlimits have to do: memory is
then bounded for each process, and processes only for who isn't root.

Each thread that runs commands has a group, which it keeps. Moving a process
from one group to another takes the kernel many milliseconds, so where a thread
can be in a group alone (version 1) it goes there once, and what it starts is
born there. The names have our process id, so that groups of the dead are found
and removed. Threads may share `Limits`.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("casfs.worker")

_PREFIX = "casfs-action-"
_OURS = "casfs-worker"
"""The group that we move into where our own is divided: one with groups below it may have no processes."""
_EMPTY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one command: bytes of memory, and processes (threads count). 0 for no bound."""

    memory: int = 0
    processes: int = 4096


@dataclass(frozen=True, slots=True)
class Groups:
    """Where groups can be made: their parents by controller, and the names of files there."""

    parents: Mapping[str, Path]
    memory_limit: str
    memory_peak: str
    kills: str
    """A file with a line ``oom_kill NUMBER``."""
    threads: str = ""
    """A file that takes threads, if a group does."""


def find_groups(root: Path = Path("/"), companions: Iterable[int] = ()) -> Groups | None:
    """Where this process can make control groups for memory and processes, or None.

    `companions`: processes that go where this one has to go.
    """
    try:
        own = own_groups((root / "proc/self/cgroup").read_text())
        mounts = cgroup_mounts((root / "proc/self/mountinfo").read_text())
    except OSError:
        return None
    if "" in own and "" in mounts:
        place = mounts[""] / own[""].lstrip("/")
        if _divide(place, [os.getpid(), *companions]):
            return Groups({"": place}, "memory.max", "memory.peak", "memory.events")
    if all(name in own and name in mounts for name in ("memory", "pids")):
        parents = {name: mounts[name] / own[name].lstrip("/") for name in ("memory", "pids")}
        if all(os.access(place, os.W_OK) for place in parents.values()):
            return Groups(parents, "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control", "tasks")
    return None


def own_groups(text: str) -> dict[str, str]:
    """Our group's path by controller; version 2 has an empty name."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            found[name] = path
    return found


def cgroup_mounts(text: str) -> dict[str, Path]:
    """Where each controller is mounted, out of a mountinfo; version 2 has an empty name."""
    found: dict[str, Path] = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        place = Path(before.split(" ")[4])
        if kind == "cgroup2":
            found.setdefault("", place)
        elif kind == "cgroup":
            for name in options.split(","):
                found.setdefault(name, place)
    return found


def _divide(place: Path, ours: Iterable[int]) -> bool:
    """Have the groups below `place` bounded by themselves; our processes move into one of them if need be."""
    moved = []
    try:
        if not {"memory", "pids"} <= set((place / "cgroup.controllers").read_text().split()):
            return False
        wanted = {"memory", "pids"} - set((place / "cgroup.subtree_control").read_text().split())
        if wanted:
            (place / _OURS).mkdir(exist_ok=True)
            for process in ours:
                (place / _OURS / "cgroup.procs").write_text(str(process))
                moved.append(process)
            (place / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(wanted)))
        return os.access(place, os.W_OK)
    except OSError:
        # Others are there, too, who can't be moved.
        with suppress(OSError):
            for process in moved:
                (place / "cgroup.procs").write_text(str(process))
            (place / _OURS).rmdir()
        return False


def clear_leftovers(groups: Groups) -> None:
    """Remove the groups of processes that are gone."""
    for parent in groups.parents.values():
        for place in parent.glob(f"{_PREFIX}*"):
            match = re.fullmatch(rf"{_PREFIX}(\d+)-\d+", place.name)
            if match and not Path(f"/proc/{match[1]}").exists():
                with suppress(OSError):
                    place.rmdir()


@dataclass(eq=False, slots=True)
class Slot:
    """The limits of one command at a time."""

    owner: Limits
    places: list[Path] = field(default_factory=list)
    kills: int = 0
    inherited: bool = False
    """This thread is in the groups itself."""

    def take(self, process: int) -> None:
        """Bound a process and all that it will start. Raises OSError."""
        bounds = self.owner.bounds
        for place in () if self.inherited else self.places:
            (place / "cgroup.procs").write_text(str(process))
        limits = {resource.RLIMIT_CORE: 0}
        if not self.places:
            if bounds.memory:
                limits[resource.RLIMIT_DATA] = bounds.memory
            if bounds.processes:
                limits[resource.RLIMIT_NPROC] = bounds.processes
        for kind, value in limits.items():
            _, hard = resource.prlimit(process, kind)
            least = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.prlimit(process, kind, (least, least))

    def peak(self) -> int:
        """Bytes of memory that were in use at most, the page cache included; 0 where nobody knows."""
        if not self.places or self.owner.groups is None:
            return 0
        return _read_number(self.places[0] / self.owner.groups.memory_peak)

    def leave(self) -> list[str]:
        """The command has ended. Returns what has to be said of its limits."""
        return self.owner.leave(self)


class Limits:
    """Gives each command the same bounds."""

    def __init__(self, bounds: Bounds, groups: Groups | None = None) -> None:
        self.bounds = bounds
        self.groups = groups
        self._mine = threading.local()
        self._lock = threading.Lock()
        # Under `_lock`:
        self._slots: list[Slot] = []
        if groups is not None:
            clear_leftovers(groups)

    def enter(self) -> Slot:
        """Limits for this thread's next command. Where a group can't be made it goes without, and the log says so."""
        slot: Slot | None = getattr(self._mine, "slot", None)
        # Somebody may have removed a group that looked empty.
        if slot is not None and all(place.is_dir() for place in slot.places):
            self._set_peak(slot)
            return slot
        slot = Slot(self)
        with self._lock:
            self._slots.append(slot)
            name = f"{_PREFIX}{os.getpid()}-{len(self._slots)}"
        if self.groups is not None:
            try:
                slot.places = self._make(self.groups, name)
                slot.inherited = self._enter_thread(self.groups, slot.places)
            except OSError as error:
                log.warning("no control group for commands: %s", error)
                slot.places = []
        slot.kills = self._count_kills(slot)
        self._mine.slot = slot
        return slot

    @staticmethod
    def _enter_thread(groups: Groups, places: Iterable[Path]) -> bool:
        if not groups.threads:
            return False
        for place in places:
            (place / groups.threads).write_text(str(threading.get_native_id()))
        return True

    def _make(self, groups: Groups, name: str) -> list[Path]:
        places = [parent / name for parent in groups.parents.values()]
        values = {groups.memory_limit: self.bounds.memory, "pids.max": self.bounds.processes}
        for place in places:
            place.mkdir(exist_ok=True)
            for file, value in values.items():
                if value and (place / file).exists():
                    (place / file).write_text(str(value))
        return places

    def _set_peak(self, slot: Slot) -> None:
        """Have the largest use counted from now on, where the kernel can."""
        if slot.places and self.groups is not None:
            with suppress(OSError):
                (slot.places[0] / self.groups.memory_peak).write_text("0")

    def _count_kills(self, slot: Slot) -> int:
        if not slot.places or self.groups is None:
            return 0
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)", (slot.places[0] / self.groups.kills).read_text(), re.MULTILINE)
            return int(found[1]) if found else 0
        return 0

    def leave(self, slot: Slot) -> list[str]:
        """See `Slot.leave`."""
        before, slot.kills = slot.kills, self._count_kills(slot)
        if slot.kills == before:
            return []
        return [
            f"the command ran out of the {self.bounds.memory >> 20:,} MiB of memory that it may have, and was ended"
        ]

    def close(self) -> None:
        """Remove the groups; the threads that had them must have ended."""
        for slot in self._slots:
            _remove(slot.places)
        self._slots.clear()


def _remove(places: Iterable[Path]) -> None:
    deadline = time.monotonic() + _EMPTY_SECONDS
    for place in places:
        while time.monotonic() < deadline:
            try:
                place.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                _empty(place)
                time.sleep(0.01)


def _empty(place: Path) -> None:
    """Take our own threads out of a group, those that were begun by one in it, and end whoever else is there."""
    with suppress(OSError):
        for thread in (place / "tasks").read_text().split() if (place / "tasks").exists() else ():
            if Path(f"/proc/self/task/{thread}").exists():
                (place.parent / "tasks").write_text(thread)
    with suppress(OSError):
        for process in (place / "cgroup.procs").read_text().split():
            if int(process) != os.getpid():
                os.kill(int(process), signal.SIGKILL)


def _read_number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
