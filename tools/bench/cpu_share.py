"""A control group that holds processes to a part of one core: version 1 or 2, whichever this machine has."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.bench.workers import Refused
from tools.worker.limits import cgroup_mounts, own_groups

_PERIOD_MICROSECONDS = 100_000
_EMPTY_SECONDS = 10.0


class CpuShare:
    """The group. Whatever a member starts later is born in it."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def take(self, pid: int) -> None:
        """Move a process in there, with all its threads."""
        (self._place / "cgroup.procs").write_text(str(pid))


@contextmanager
def cpu_share(percent: int) -> Iterator[CpuShare]:
    """A new group that may use so much of one core. Its processes have to end before the context does.

    Raises Refused where no control group for the CPU can be made.
    """
    place = _make_group(percent)
    try:
        yield CpuShare(place)
    finally:
        _remove(place)


def _make_group(percent: int) -> Path:
    quota = _PERIOD_MICROSECONDS * percent // 100
    try:
        own = own_groups(Path("/proc/self/cgroup").read_text())
        mounts = cgroup_mounts(Path("/proc/self/mountinfo").read_text())
        if "cpu" in own and "cpu" in mounts:
            place = _new_below(mounts["cpu"] / own["cpu"].lstrip("/"))
            (place / "cpu.cfs_period_us").write_text(str(_PERIOD_MICROSECONDS))
            (place / "cpu.cfs_quota_us").write_text(str(quota))
            return place
        if "" in own and "" in mounts:
            place = _new_below(_dividing_group(mounts[""], own[""]))
            (place / "cpu.max").write_text(f"{quota} {_PERIOD_MICROSECONDS}")
            return place
    except OSError as error:
        raise Refused(f"no control group for the CPU can be made here: {error}") from error
    raise Refused("no control group for the CPU can be made here: the controller isn't mounted")


def _new_below(parent: Path) -> Path:
    place = parent / f"casfs-bench-{os.getpid()}"
    place.mkdir(exist_ok=True)
    return place


def _dividing_group(mount: Path, own: str) -> Path:
    """The nearest group of version 2, from our own upwards, that divides the CPU among the groups below it.

    A group that has processes of its own can't, except the root (cgroups(7), "no internal processes").
    """
    group = mount / own.lstrip("/")
    while True:
        control = group / "cgroup.subtree_control"
        if "cpu" in control.read_text().split():
            return group
        try:
            control.write_text("+cpu")
            return group
        except OSError:
            if group == mount:
                raise
        group = group.parent


def _remove(place: Path) -> None:
    deadline = time.monotonic() + _EMPTY_SECONDS
    while True:
        try:
            place.rmdir()
            return
        except OSError:
            # A process leaves its group a moment after it was waited for.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
