"""What all tests share: hygiene, a store, a sample tree, and saying what is lacking.

Hygiene: whatever a test mounts, attaches or starts has to be gone when it ends.
Each test is judged by its mounts, loop devices and children, each session by
its daemons too. What is found is named, cleaned away, and fails the test. A
worker of pytest-xdist judges only what lies below its own temporary directory,
and so does every run: others may work on the same machine.

No __init__.py in here: under it tests/store would be a package, and a rival of
`store`. For annotations: ``from tests.conftest import Requirements``.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from casfs.mountinfo import list_mounts
from casfs.syscalls import has_admin_capability
from store.blobs import pack_row, unpack_row
from store.digest import Digest
from store.index import Change, Table
from store.layout import blob_path
from store.repository import Store

_TEST_GRACE_SECONDS = 15.0
_SESSION_GRACE_SECONDS = 20.0
"""How long things that are ending anyway (a daemon after its unmount) may take."""

FORGETS = ("FORGET", "BATCH_FORGET")
"""Upcalls that come when the kernel likes: no test counts them."""

_ENDS_WITH_US = re.compile(rb"multiprocessing[./](resource_tracker|forkserver)")
"""Helpers that the standard library keeps until the interpreter ends."""


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script, or by nohup: programs that tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail where something is lacking, rather than skip")


def without_forgets(upcalls: Mapping[str, int]) -> dict[str, int]:
    """What a program's calls led to."""
    return {name: count for name, count in upcalls.items() if name not in FORGETS}


# What a test may have left behind


@dataclass(frozen=True, slots=True)
class Remains:
    """Mounts (id and place, in the order of their making), loop devices and processes (pid and what it is)."""

    mounts: dict[tuple[int, bytes], str] = field(default_factory=dict)
    loops: dict[str, str] = field(default_factory=dict)
    processes: dict[int, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.mounts or self.loops or self.processes)

    def __sub__(self, other: Remains) -> Remains:
        return Remains(
            {key: text for key, text in self.mounts.items() if key not in other.mounts},
            {key: text for key, text in self.loops.items() if key not in other.loops},
            {key: text for key, text in self.processes.items() if key not in other.processes},
        )

    def __str__(self) -> str:
        return "; ".join([*self.mounts.values(), *self.loops.values(), *self.processes.values()])


def _is_below(path: bytes, top: bytes) -> bool:
    return path == top or path.startswith(top + b"/")


def find_mounts(top: bytes) -> dict[tuple[int, bytes], str]:
    """The mounts at and below an absolute path."""
    return {
        (mount.id, mount.path): f"a {mount.kind} mount at {os.fsdecode(mount.path)}"
        for mount in list_mounts()
        if _is_below(mount.path, top)
    }


def find_loops(top: bytes) -> dict[str, str]:
    """The loop devices whose file is, or was, below an absolute path."""
    found = {}
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            file = entry.read_bytes().rstrip(b"\n")
            if _is_below(file, top):
                device = f"/dev/{entry.parent.parent.name}"
                found[device] = f"{device} on {os.fsdecode(file)}"
    return found


def find_children() -> dict[int, str]:
    """The children of this process, ended but not waited for included; none on a kernel that doesn't list them."""
    found = {}
    for entry in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for pid in map(int, entry.read_bytes().split()):
                command = _read_proc(pid, "cmdline")
                if not _ENDS_WITH_US.search(command):
                    found[pid] = _describe_process(pid, command)
    return found


def find_processes(top: bytes) -> dict[int, str]:
    """The processes that belong to an absolute path: by argument, environment or what they hold open.

    A daemon that was forked in the test's own process shows only in what it
    holds open; one that was started as a command also by its environment.
    """
    named = re.compile(re.escape(top) + rb"(?![^/\0\s:=,'\"])")
    relatives = _ancestors()
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in relatives:
            continue
        pid = int(entry)
        command = _read_proc(pid, "cmdline")
        if named.search(command) or named.search(_read_proc(pid, "environ")) or _holds(pid, top):
            found[pid] = _describe_process(pid, command)
    return found


def _ancestors() -> set[int]:
    """This process and those above it: who named our directory on a command line is no leftover."""
    found = {0}
    pid = os.getpid()
    while pid not in found:
        found.add(pid)
        fields = _read_proc(pid, "stat").rpartition(b")")[2].split()
        pid = int(fields[1]) if fields else 0
    return found


def _read_proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _holds(pid: int, top: bytes) -> bool:
    links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
    with suppress(OSError):
        links += [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        with suppress(OSError):
            if _is_below(os.readlink(os.fsencode(link)), top):
                return True
    return False


def _describe_process(pid: int, command: bytes) -> str:
    return f"process {pid} ({os.fsdecode(command).replace(chr(0), ' ').strip()[:200] or 'ended, not waited for'})"


def find_remains(top: Path) -> Remains:
    """Everything of ours that lies below `top`, and our children."""
    below = os.fsencode(top)
    return Remains(find_mounts(below), find_loops(below), find_children() | find_processes(below))


def find_test_remains(top: Path) -> Remains:
    """The part of `find_remains` that is quick enough to look for after every test."""
    below = os.fsencode(top)
    return Remains(find_mounts(below), find_loops(below), find_children())


def wait_gone(find: Callable[[], Remains], grace: float) -> Remains:
    """What is left when nothing is, or when the grace (seconds) is over."""
    deadline = time.monotonic() + grace
    while (remains := find()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return remains


def clean_up(remains: Remains) -> None:
    """Unmount lazily, kill, detach; what fails is left, and is named by the failure anyway."""
    unmount = ["umount", "-l"] if has_admin_capability() else ["fusermount3", "-uz"]
    for _, path in reversed(remains.mounts):
        subprocess.run([*unmount, "--", path], stderr=subprocess.DEVNULL, check=False)
    for pid in remains.processes:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        with suppress(OSError):
            os.waitpid(pid, 0)
    for device in remains.loops:
        subprocess.run(["losetup", "-d", device], stderr=subprocess.DEVNULL, check=False)


def clean_up_after_killed_runs(top: Path) -> None:
    """What runs that were killed left below their temporary directories, siblings of the one `top` is in.

    Before pytest removes these trees: it would walk into what is mounted there.
    """
    mine = next((path for path in (top, *top.parents) if path.parent.name.startswith("pytest-of-")), None)
    if mine is None:
        return
    for directory in mine.parent.glob("pytest-*"):
        if directory == mine or directory.is_symlink():
            continue
        try:
            owner = int((directory / ".lock").read_text())
        except (OSError, ValueError):
            owner = 0
        if not owner or not Path(f"/proc/{owner}").exists():
            clean_up(find_remains(directory) - Remains(processes=find_children()))


@pytest.fixture(scope="session", autouse=True)
def _clean_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The session touches nothing of this user's, and leaves nothing running."""
    top = tmp_path_factory.getbasetemp()
    before = Remains(processes=find_children())
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        clean_up_after_killed_runs(top)
    with pytest.MonkeyPatch.context() as patch:
        # Also what marks the processes that are started, see find_processes.
        patch.setenv("CASFS_RUNTIME_DIR", str(top / "run"))
        patch.setenv("XDG_CACHE_HOME", str(top / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(top / "config"))
        patch.delenv("CASFS_STORE", raising=False)
        patch.delenv("CASFS_CONFIG", raising=False)
        yield
    remains = wait_gone(lambda: find_remains(top) - before, _SESSION_GRACE_SECONDS)
    if remains:
        clean_up(remains)
        pytest.fail(f"the tests left behind (cleaned up now): {remains}", pytrace=False)


@pytest.fixture(autouse=True)
def _clean_test(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Iterator[None]:
    """The test leaves nothing mounted, attached or unwaited for.

    Asks for tmp_path to end before it: pytest removes that tree, and must not
    walk into what is mounted there. What fixtures of a wider scope hold was
    there before, and is theirs.
    """
    top = tmp_path_factory.getbasetemp()
    before = find_test_remains(top)
    yield
    remains = wait_gone(lambda: find_test_remains(top) - before, _TEST_GRACE_SECONDS)
    if remains:
        clean_up(remains)
        pytest.fail(f"the test left behind (cleaned up now): {remains}", pytrace=False)


# What tests may need


class Requirements:
    """Skips the test that asks for what this machine lacks, and says what that is."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict

    def lacking(self, what: str) -> NoReturn:
        """End the test: `what` is lacking."""
        if self._strict:
            pytest.fail(f"lacking: {what}", pytrace=False)
        pytest.skip(f"lacking: {what}")

    def condition(self, met: object, what: str) -> None:
        """End the test unless `met`; `what` says what is lacking."""
        if not met:
            self.lacking(what)

    def programs(self, *names: str) -> None:
        """These can be started."""
        for name in names:
            self.condition(shutil.which(name), f"the program {name}")

    def admin(self) -> None:
        """This process may mount."""
        self.condition(has_admin_capability(), "the privilege CAP_SYS_ADMIN")

    def fuse(self) -> None:
        """FUSE file systems can be mounted, with privilege or with fusermount3."""
        try:
            os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            self.lacking(f"the device /dev/fuse: {error.strerror}")
        if not has_admin_capability():
            self.programs("fusermount3")

    def loop_devices(self) -> None:
        """Images can be mounted."""
        self.admin()
        self.programs("losetup", "mount")
        self.condition(Path("/dev/loop-control").exists(), "loop devices: there is no /dev/loop-control")


@pytest.fixture(scope="session")
def requires(pytestconfig: pytest.Config) -> Requirements:
    """To say what a test needs: ``requires.fuse()``."""
    return Requirements(strict=bool(pytestconfig.getoption("--no-skips")))


# What tests work on


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store in tmp_path / "store", closed afterwards."""
    with Store.open(tmp_path / "store") as opened:
        yield opened


def count_views(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each view of the index from now on."""
    views: list[int] = []
    view = store.index.view

    def counted() -> object:
        views.append(1)
        return view()

    monkeypatch.setattr(store.index, "view", counted)
    return views


def set_age(store: Store, digest: Digest, seconds: int) -> None:
    """Pretend that the blob was last used so long ago."""
    then = int(time.time()) - seconds

    def work(change: Change) -> None:
        value = change.get(Table.BLOBS, digest.key)
        assert value is not None
        change.put(Table.BLOBS, digest.key, pack_row(unpack_row(value)._replace(used=then)))

    store.index.update(work)
    os.utime(store.layout.blobs / blob_path(digest), (then, then))


@pytest.fixture
def sample_tree(tmp_path: Path) -> Path:
    """A directory with a bit of everything, the same every time: modes, times, bytes."""
    return make_sample_tree(tmp_path / "sample")


def make_sample_tree(top: Path) -> Path:
    """The sample tree, at a place that isn't there yet."""
    _write_sample_files(top)
    _write_sample_links(top)
    # From the leaves up: writing into a directory changes its time.
    for directory, _, files in os.walk(os.fsencode(top), topdown=False):
        for name in files:
            os.utime(os.path.join(directory, name), (1_000_000_000, 1_000_000_000), follow_symlinks=False)
        os.chmod(directory, 0o755)
        os.utime(directory, (1_000_000_000, 1_000_000_000))
    return top


def _write_sample_files(top: Path) -> None:
    files = {
        b"README.txt": b"A sample.\n",
        b"empty": b"",
        b"run.sh": b"#!/bin/sh\necho ran\n",
        b"a name with spaces": b"spaces\n",
        b"caf\xe9": b"a name that is not UTF-8\n",
        b"n" * 255: b"a name as long as can be\n",
        b"include/linux/mtd/onenand/flash.h": b"#pragma once\n",
        b"include/twin.h": b"the same bytes twice\n",
        b"src/twin.c": b"the same bytes twice\n",
        b"src/big.bin": random.Random(0).randbytes(3 << 20),
    }
    files |= {b"many/%03d.txt" % number: b"number %d\n" % number for number in range(200)}
    for name, content in files.items():
        path = top / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755 if path.suffix == ".sh" else 0o644)
    (top / "hollow").mkdir()


def _write_sample_links(top: Path) -> None:
    links = {
        "links/to-file": "../README.txt",
        "links/to-directory": "../include/linux",
        "links/absolute": "/etc/passwd",
        "links/dangling": "nowhere/to/be found",
    }
    (top / "links").mkdir()
    for name, target in links.items():
        (top / name).symlink_to(target)
