"""Where control groups can be made, and what is left of them; the kernel's files are ordinary ones here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tools.worker import worker
from tools.worker.limits import Bounds, Groups, Limits, clear_leftovers, find_groups

DEAD = 999_999_999
"""No process has such a number."""


def make_root(top: Path, own: str, mounts: str) -> Path:
    """A root with what /proc says of our groups and of mounts."""
    (top / "proc/self").mkdir(parents=True)
    (top / "proc/self/cgroup").write_text(own)
    (top / "proc/self/mountinfo").write_text(mounts)
    return top


def test_version_2_is_divided_and_left_to_its_groups(tmp_path: Path) -> None:
    place = tmp_path / "unified/svc"
    place.mkdir(parents=True)
    (place / "cgroup.controllers").write_text("cpu memory pids\n")
    (place / "cgroup.subtree_control").write_text("pids\n")
    root = make_root(tmp_path, "0::/svc\n", f"30 1 0:26 / {tmp_path}/unified rw - cgroup2 cgroup2 rw\n")
    groups = find_groups(root)
    assert groups is not None and dict(groups.parents) == {"": place} and not groups.threads
    assert (place / "casfs-worker/cgroup.procs").read_text() == str(os.getpid())
    assert (place / "cgroup.subtree_control").read_text() == "+memory"


def test_whoever_belongs_to_the_worker_moves_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "svc"
    place.mkdir()
    (place / "cgroup.controllers").write_text("memory pids\n")
    (place / "cgroup.subtree_control").write_text("\n")
    moved = []
    write = Path.write_text

    def noting(path: Path, text: str) -> int:
        if path.name == "cgroup.procs":
            moved.append((path.parent.name, int(text)))
            if int(text) == DEAD:
                raise ProcessLookupError
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", noting)
    root = make_root(tmp_path, "0::/svc\n", f"30 1 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    assert find_groups(root, companions=[4711]) is not None
    assert moved == [("casfs-worker", os.getpid()), ("casfs-worker", 4711)]
    # Where it can't be done, nobody stays there.
    moved.clear()
    (place / "cgroup.subtree_control").write_text("\n")
    assert find_groups(root, companions=[4711, DEAD]) is None
    assert moved[-2:] == [("svc", os.getpid()), ("svc", 4711)]


def test_as_many_run_at_a_time_as_there_are_cores_and_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for memory, jobs in ((64 << 30, 8), (5 << 30, 5), (512 << 20, 1)):
        monkeypatch.setattr(worker, "machine_memory", lambda memory=memory: memory)
        assert worker.default_jobs() == jobs


def test_version_1_takes_threads(tmp_path: Path) -> None:
    for name in ("memory", "pids"):
        (tmp_path / name / "svc").mkdir(parents=True)
    mounts = "".join(
        f"3{number} 1 0:2{number} / {tmp_path}/{name} rw - cgroup cgroup rw,{name}\n"
        for number, name in enumerate(("memory", "pids"))
    )
    groups = find_groups(make_root(tmp_path, "4:memory:/svc\n8:pids:/svc\n0::/\n", mounts))
    assert groups is not None and groups.threads == "tasks"
    assert dict(groups.parents) == {name: tmp_path / name / "svc" for name in ("memory", "pids")}


def test_without_controllers_there_are_none(tmp_path: Path) -> None:
    place = tmp_path / "unified"
    place.mkdir()
    (place / "cgroup.controllers").write_text("cpu\n")
    root = make_root(tmp_path, "0::/\n", f"30 1 0:26 / {place} rw - cgroup2 cgroup2 rw\n")
    assert find_groups(root) is None
    assert find_groups(tmp_path / "nowhere") is None


def test_groups_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    for name in (f"casfs-action-{DEAD}-1", f"casfs-action-{os.getpid()}-1", "another"):
        (tmp_path / name).mkdir()
    clear_leftovers(Groups({"": tmp_path}, "memory.max", "memory.peak", "memory.events"))
    assert sorted(os.listdir(tmp_path)) == ["another", f"casfs-action-{os.getpid()}-1"]


def test_a_thread_keeps_its_group_and_gets_another_where_that_is_gone(tmp_path: Path) -> None:
    limits = Limits(Bounds(), Groups({"": tmp_path}, "memory.max", "memory.peak", "memory.events"))
    first = limits.enter()
    assert first.leave() == [] and limits.enter() is first
    shutil.rmtree(first.places[0])
    second = limits.enter()
    assert second is not first and second.places[0].is_dir()
    limits.close()
    assert not os.listdir(tmp_path)
