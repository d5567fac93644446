"""What a user without any privilege gets: mounts by fusermount3, and clear words where something is lacking.

Root plays that user: a child process takes a mount namespace of its own, in
which /dev/fuse is open to everybody as distributions have it, the interpreter
can be reached, and a tmpfs is the user's home. The namespace takes it all away.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from casfs import control, mounting, mountpoint
from casfs.doctor import examine
from casfs.errors import CasfsError
from casfs.mountinfo import find_mount
from casfs.syscalls import MS_BIND, mount
from store.digest import Digest
from store.importing import ScanOptions
from store.repository import Store
from tests.conftest import Requirements
from tools.bench.ordinary_user import NOBODY, give_up_privilege, leave_namespace, make_reachable

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = Path("/mnt")
STORE = HOME / "store"
CONTENT = b"what the file holds\n" * 5000


def become_user(device_mode: int) -> None:
    """As root: leave everybody's mount namespace, arrange the new one, and give up all privilege."""
    leave_namespace(HOME)
    make_reachable([Path(sys.prefix), Path(sys.base_prefix), REPOSITORY], HOME)
    if device_mode:
        os.mknod(HOME / "fuse", stat.S_IFCHR, os.makedev(10, 229))
        os.chmod(HOME / "fuse", device_mode)
        mount(str(HOME / "fuse"), "/dev/fuse", "", MS_BIND, "")
    give_up_privilege()


def run_as_user(job: Callable[..., Any], *arguments: object, device_mode: int = 0o666, path: str | None = None) -> Any:
    """What a function of this module gives when the user calls it."""
    start = (
        "import os, sys; from tests.casfs import test_ordinary_user as t; "
        f"t.become_user({device_mode}); os.execv(sys.executable, [sys.executable, '-c', sys.argv[1], *sys.argv[2:]])"
    )
    call = (
        "import json, sys; from tests.casfs import test_ordinary_user as t; "
        f"print(json.dumps(t.{job.__name__}(*json.loads(sys.argv[1]))))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CASFS_RUNTIME_DIR": str(HOME / "run"),
        "PATH": path or os.environ["PATH"],
    }
    done = subprocess.run(
        [sys.executable, "-c", start, call, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(autouse=True)
def _can_play_a_user(requires: Requirements) -> None:
    requires.fuse()
    requires.admin()
    requires.condition(os.geteuid() == 0, "the user root, to become another one")
    requires.programs("fusermount3")


# What the user does


def add() -> Digest:
    source = HOME / "source"
    source.mkdir()
    (source / "file").write_bytes(CONTENT)
    (source / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (source / "run.sh").chmod(0o755)
    with Store.open(STORE) as store:
        return store.importer.from_directories([(b"", source)], ScanOptions()).digest


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while mountpoint.is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not mountpoint.is_running(pid)


def use(engine: str, end: str) -> dict[str, Any]:
    """Mount, look at it from all sides, and end it in one of several ways."""
    place = HOME / "place"
    place.mkdir()
    root = add()
    report = mounting.start(mounting.Request(STORE, root, place), engine=engine)
    flags = os.statvfs(place).f_flag
    seen = {
        "engine": report.engine,
        "why": report.why,
        "same": (place / "file").read_bytes() == CONTENT,
        "ran": subprocess.run([place / "run.sh"], capture_output=True, text=True, check=True).stdout,
        "flags": flags & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV),
        "owner": (place / "file").stat().st_uid,
        "upcalls": control.statistics(place)["upcalls"],
    }
    assert report.pid is not None
    if end == "umount":
        mountpoint.unmount(place)
    elif end == "SIGTERM":
        os.kill(report.pid, signal.SIGTERM)
    elif end == "SIGKILL":
        os.kill(report.pid, signal.SIGKILL)
        wait_gone(report.pid)
        report = mounting.start(mounting.Request(STORE, root, place), engine=engine)
        assert report.pid is not None
        seen["same"] = seen["same"] and (place / "file").read_bytes() == CONTENT
        os.kill(report.pid, signal.SIGKILL)
        wait_gone(report.pid)
        mountpoint.unmount(place)
    assert report.pid is not None
    wait_gone(report.pid)
    seen["mounted"] = find_mount(str(place)) is not None
    return seen


def try_to_mount(engine: str, place: str) -> str:
    """The message that trying comes to."""
    root = add()
    (HOME / "place").mkdir()
    try:
        mounting.start(mounting.Request(STORE, root, Path(place)), engine=engine)
    except CasfsError as error:
        return f"{type(error).__name__}: {error}"
    return "mounted"


def look() -> dict[str, list[Any]]:
    return {finding.name: [finding.ok, finding.detail, finding.remedy] for finding in examine(STORE)}


# What comes of it


@pytest.mark.parametrize("end", ["umount", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("engine", ["native", "fuse"])
def test_a_user_can_mount_read_and_unmount(engine: str, end: str) -> None:
    seen = run_as_user(use, engine, end)
    assert seen["engine"] == engine
    assert seen["same"]
    assert seen["ran"] == "ran\n"
    assert seen["flags"] == os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
    assert seen["owner"] == NOBODY
    assert seen["upcalls"]["READ"] >= 1
    assert not seen["mounted"]


def test_auto_takes_the_fuse_engine_for_a_user_and_says_why() -> None:
    seen = run_as_user(use, "auto", "umount")
    assert seen["engine"] == "fuse"
    assert "CAP_SYS_ADMIN" in seen["why"]


def test_passthrough_is_refused_to_a_user_with_the_reason() -> None:
    message = run_as_user(try_to_mount, "passthrough", "/mnt/place")
    assert message.startswith("MissingCapability:")
    assert "CAP_SYS_ADMIN" in message
    assert "--engine fuse" in message


@pytest.mark.parametrize("engine", ["native", "fuse"])
def test_without_fusermount3_a_user_is_told_what_to_install(engine: str) -> None:
    message = run_as_user(try_to_mount, engine, "/mnt/place", path="/nowhere")
    assert message.startswith("MissingCapability:")
    assert "fuse3" in message


@pytest.mark.parametrize("engine", ["native", "fuse", "auto"])
def test_a_user_cannot_mount_on_somebody_elses_directory(engine: str) -> None:
    message = run_as_user(try_to_mount, engine, "/media" if os.path.isdir("/media") else "/srv")
    assert message.startswith("BadMountPoint:")


@pytest.mark.parametrize("engine", ["native", "fuse", "auto"])
def test_a_device_that_a_user_cannot_open_is_named(engine: str) -> None:
    message = run_as_user(try_to_mount, engine, "/mnt/place", device_mode=0o600)
    assert message != "mounted"
    assert "/dev/fuse" in message


def test_the_doctor_tells_a_user_what_works() -> None:
    found = run_as_user(look)
    assert found["fuse device"][0]
    assert found["privilege to mount"][0] and "fusermount3" in found["privilege to mount"][1]
    assert found["mount"][0], found["mount"]
    assert not found["engine passthrough"][0] and "CAP_SYS_ADMIN" in found["engine passthrough"][1]
    assert found["engine fuse"][0]
    assert found["auto"][0] and "fuse" in found["auto"][1]


def test_the_doctor_tells_a_user_what_to_do_about_the_device() -> None:
    found = run_as_user(look, device_mode=0o600)
    assert not found["fuse device"][0]
    assert "chmod" in found["fuse device"][2]
    assert not found["mount"][0]
    assert not found["auto"][0]


def test_without_fusermount3_the_doctor_says_what_to_install() -> None:
    found = run_as_user(look, path="/nowhere")
    assert not found["privilege to mount"][0]
    assert "fuse3" in found["privilege to mount"][2]
    assert not found["auto"][0]


def stay_out(place: str) -> int:
    try:
        os.listdir(place)
    except OSError as error:
        return error.errno or -1
    return 0


def test_a_mount_made_by_root_can_be_read_by_a_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Headers and tools for everybody: allow_other, with the permissions that the modes say."""
    base = Path(f"/tmp/casfs-test-{os.getpid()}-{time.monotonic_ns()}")
    base.mkdir()
    (base / "source").mkdir()
    (base / "source" / "file").write_bytes(CONTENT)
    (base / "place").mkdir()
    try:
        with Store.open(base / "store") as store:
            root = store.importer.from_directories([(b"", base / "source")], ScanOptions()).digest
        for engine in ("auto", "native", "fuse"):
            mounting.start(mounting.Request(base / "store", root, base / "place"), engine=engine)
            try:
                assert run_as_user(stay_out, str(base / "place")) == 0
            finally:
                mountpoint.unmount(base / "place")
        assert run_as_user(stay_out, str(tmp_path_factory.getbasetemp())) == errno.EACCES, "else nothing is shown"
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", base], check=True)
