"""What goes wrong behind a mount: a clear error, a line in the log, and never a wrong byte."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pytest

from casfs import control, mounting, mountpoint
from casfs.errors import BadMountPoint, Busy, MissingCapability, NotMounted
from casfs.mountinfo import find_mount
from store.digest import Digest, DigestFunction
from store.errors import MissingTree, StoreError
from store.importing import ScanOptions
from store.index import Table
from store.repository import Store
from tests.casfs.conftest import SERVED_ENGINES, Mounted, Mounts, errno_from, wait_until

CONTENT = b"what the blob holds\n" * 1000
FILES = {"directory/file": CONTENT, "other": b"other"}


@pytest.fixture(params=SERVED_ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine whose daemon can fail; the kernel's is tested in test_kernel_engine.py."""
    return str(request.param)


@pytest.fixture
def mounted(mounts: Mounts, engine: str) -> Mounted:
    return mounts.mount(mounts.add_files(FILES), engine)


def read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def forget_row(mounts: Mounts, content: bytes) -> None:
    """As after a crash between publication and the index: the blob's row is not there."""
    with Store.open(mounts.root) as store:
        store.index.update(lambda change: change.delete(Table.BLOBS, DigestFunction.BLAKE3.of(content).key))


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open; closing it may fail: with the fuse engine the daemon is told of it (FLUSH), and may be gone."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115  # `with` would raise what closing it raises
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()


# Contents


def test_a_missing_blob_is_eio_with_a_log_line_that_names_path_and_digest(mounted: Mounted, mounts: Mounts) -> None:
    mounts.blob(CONTENT).unlink()
    path = mounted.path / "directory" / "file"
    assert os.stat(path).st_size == len(CONTENT)
    assert errno_from(lambda: read(path)) == errno.EIO
    [line] = [line for line in mounts.log().splitlines() if "ERROR" in line]
    assert "directory/file" in line
    assert DigestFunction.BLAKE3.of(CONTENT).hash.hex() in line
    assert control.statistics(mounted.path)["failed_opens"] == 1
    assert read(mounted.path / "other") == b"other"


def test_a_missing_blob_that_comes_back_is_served(mounted: Mounted, mounts: Mounts) -> None:
    mounts.blob(CONTENT).unlink()
    path = mounted.path / "directory" / "file"
    assert errno_from(lambda: read(path)) == errno.EIO
    mounts.add_files({"again": CONTENT})
    assert read(path) == CONTENT


def test_a_mount_says_how_many_blobs_are_missing(mounts: Mounts, engine: str) -> None:
    root = mounts.add_files(FILES)
    mounts.blob(CONTENT).unlink()
    mounted = mounts.mount(root, engine)
    assert mounted.report.missing == control.statistics(mounted.path)["missing"] == 1


def test_a_blob_removed_after_its_first_use_may_fail_but_never_lies(mounted: Mounted, mounts: Mounts) -> None:
    path = mounted.path / "directory" / "file"
    with open(path, "rb", buffering=0) as file:
        assert file.read(10) == CONTENT[:10]
        mounts.blob(CONTENT).unlink()
        assert file.read() == CONTENT[10:], "what is open is read on"
    if mounted.report.engine == "passthrough":
        assert read(path) == CONTENT, "the kernel still holds it"
    else:
        with suppress(OSError):
            assert read(path) == CONTENT


@pytest.mark.parametrize("wrong", [b"x" * len(CONTENT), b"", CONTENT + b"more"], ids=["same size", "empty", "longer"])
def test_a_corrupt_blob_is_found_at_its_first_use_after_an_unclean_stop(
    mounts: Mounts, engine: str, wrong: bytes
) -> None:
    root = mounts.add_files(FILES)
    blob = mounts.blob(CONTENT)
    forget_row(mounts, CONTENT)
    blob.chmod(0o644)
    blob.write_bytes(wrong)
    mounted = mounts.mount(root, engine)
    assert errno_from(lambda: read(mounted.path / "directory" / "file")) == errno.EIO
    assert "directory/file" in mounts.log()
    assert not blob.exists(), "it was put into quarantine"
    assert [path.read_bytes() for path in mounts.layout.quarantine.iterdir()] == [wrong]


def test_a_good_blob_without_a_row_is_hashed_and_served(mounts: Mounts, engine: str) -> None:
    root = mounts.add_files(FILES)
    forget_row(mounts, CONTENT)
    mounted = mounts.mount(root, engine)
    assert read(mounted.path / "directory" / "file") == CONTENT
    with Store.open(mounts.root) as store:
        assert store.blobs.is_verified(DigestFunction.BLAKE3.of(CONTENT))


def test_a_verified_blob_of_the_wrong_size_is_found(mounts: Mounts, engine: str) -> None:
    root = mounts.add_files(FILES)
    blob = mounts.blob(CONTENT)
    blob.chmod(0o644)
    blob.write_bytes(CONTENT[:-1])
    mounted = mounts.mount(root, engine)
    assert errno_from(lambda: read(mounted.path / "directory" / "file")) == errno.EIO
    assert not blob.exists()


def change_bytes(path: Path) -> None:
    path.write_bytes(b"CHANGED!")


def change_bytes_and_restore_the_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"CHANGED!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_size(path: Path) -> None:
    path.write_bytes(b"longer than it was")


def replace(path: Path) -> None:
    before = path.stat()
    path.with_name("new").write_bytes(b"original")
    os.utime(path.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("new").replace(path)


def remove(path: Path) -> None:
    path.unlink()


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = [
    change_bytes,
    change_bytes_and_restore_the_time,
    change_size,
    replace,
    remove,
    replace_by_link,
    replace_by_fifo,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("used", [False, True], ids=["never opened", "opened before"])
def test_a_changed_file_by_reference_is_stale_and_named_in_the_log(
    mounts: Mounts, engine: str, tmp_path: Path, change: Callable[[Path], None], used: bool
) -> None:
    original = tmp_path / "original"
    original.write_bytes(b"original")
    mounted = mounts.mount(mounts.add(tmp_path, ScanOptions(reference=True)), engine)
    if used:
        assert read(mounted.path / "original") == b"original"
    change(original)
    for _ in range(2):
        assert errno_from(lambda: read(mounted.path / "original")) == errno.ESTALE
    lines = [line for line in mounts.log().splitlines() if "ERROR" in line]
    assert lines and str(original) in lines[0]


def test_a_file_by_reference_on_another_volume_is_served(mounts: Mounts, engine: str, tmp_path: Path) -> None:
    volume = Path(f"/dev/shm/casfs-test-{os.getpid()}-{time.monotonic_ns()}")
    if not volume.parent.is_dir() or volume.parent.stat().st_dev == tmp_path.stat().st_dev:
        mounts.requires.lacking("a second volume at /dev/shm")
    volume.mkdir()
    try:
        (volume / "file").write_bytes(CONTENT)
        mounted = mounts.mount(mounts.add(volume, ScanOptions(reference=True)), engine)
        assert read(mounted.path / "file") == CONTENT
        mounted.unmount()
    finally:
        (volume / "file").unlink(missing_ok=True)
        volume.rmdir()


# Daemons that end


DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
"""From a mount whose daemon is gone; the second from what was asked as it went."""


def kill(mounted: Mounted) -> None:
    os.kill(mounted.pid, signal.SIGKILL)
    wait_until(lambda: not mountpoint.is_running(mounted.pid), "the daemon to die")


def test_after_a_kill_no_client_hangs_and_unmount_clears_the_place(mounted: Mounted) -> None:
    kill(mounted)
    assert errno_from(lambda: os.listdir(mounted.path)) in DEAD
    assert errno_from(lambda: read(mounted.path / "other")) in DEAD
    mountpoint.unmount(mounted.path)
    assert find_mount(str(mounted.path)) is None
    assert os.listdir(mounted.path) == []


def test_after_a_kill_the_next_mount_clears_the_place(mounted: Mounted, mounts: Mounts, engine: str) -> None:
    root = Digest.parse(control.statistics(mounted.path)["root"])
    kill(mounted)
    again = mounts.mount(root, engine, place=mounted.path)
    assert read(again.path / "directory" / "file") == CONTENT
    again.unmount()
    assert find_mount(str(mounted.path)) is None


def test_after_a_kill_with_files_open_unmount_says_busy_and_lazy_helps(mounted: Mounted) -> None:
    with opened(mounted.path / "other"):
        kill(mounted)
        with pytest.raises(Busy, match="--lazy"):
            mountpoint.unmount(mounted.path)
        mountpoint.unmount(mounted.path, lazy=True)
    assert find_mount(str(mounted.path)) is None


def test_what_is_open_in_passthrough_outlives_the_daemon(mounts: Mounts) -> None:
    mounted = mounts.mount(mounts.add_files(FILES), "passthrough")
    with open(mounted.path / "directory" / "file", "rb", buffering=0) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        kill(mounted)
        assert file.read() == CONTENT
        with mapped:
            assert mapped[:] == CONTENT
        assert errno_from(lambda: read(mounted.path / "other")) in DEAD


READER = """
import sys
sys.stdin.readline()
try:
    print(len(open(sys.argv[1], "rb").read()), flush=True)
except OSError as error:
    print(error.errno, flush=True)
"""


def test_a_client_that_waits_for_a_daemon_gets_an_error_when_it_is_killed(mounted: Mounted) -> None:
    """The daemon is stopped, so the request lies unanswered; then it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", READER, mounted.path / "directory" / "file"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        try:
            os.kill(mounted.pid, signal.SIGSTOP)
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
            time.sleep(0.2)
            assert client.poll() is None, "the client waits"
            kill(mounted)
            out, _ = client.communicate(timeout=30)
        finally:
            client.kill()
    assert int(out) in DEAD


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_told_to_end_unmounts(mounted: Mounted, mounts: Mounts, number: signal.Signals) -> None:
    os.kill(mounted.pid, number)
    wait_until(lambda: not mountpoint.is_running(mounted.pid), "the daemon to end")
    assert find_mount(str(mounted.path)) is None
    assert f"unmounted {mounted.path}" in mounts.log()
    assert not list(mounts.layout.leases.iterdir()), "the lease is given back"


def test_a_daemon_told_to_end_serves_open_files_for_a_while_and_then_ends(
    mounts: Mounts, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mountpoint, "GRACE_SECONDS", 0.5)
    mounted = mounts.mount(mounts.add_files(FILES), engine)
    with opened(mounted.path / "directory" / "file") as file:
        assert file.read(5) == CONTENT[:5]
        os.kill(mounted.pid, signal.SIGTERM)
        wait_until(lambda: find_mount(str(mounted.path)) is None, "the name to be gone")
        assert file.read(5) == CONTENT[5:10]
        wait_until(lambda: not mountpoint.is_running(mounted.pid), "the daemon to end")


def test_unmounting_waits_until_the_daemon_has_let_go(mounted: Mounted, mounts: Mounts) -> None:
    mountpoint.unmount(mounted.path)
    assert not mountpoint.is_running(mounted.pid)
    assert not list(mounts.layout.leases.iterdir())
    with pytest.raises(NotMounted):
        mountpoint.unmount(mounted.path)


def test_a_busy_mount_is_not_unmounted_and_goes_on(mounted: Mounted) -> None:
    with open(mounted.path / "other", "rb", buffering=0) as file:
        with pytest.raises(Busy, match="fuser"):
            mountpoint.unmount(mounted.path)
        assert file.read() == b"other"
        assert read(mounted.path / "directory" / "file") == CONTENT
    mounted.unmount()


def test_a_lazy_unmount_of_a_busy_mount_lets_open_files_be_read_on(mounted: Mounted) -> None:
    with open(mounted.path / "directory" / "file", "rb", buffering=0) as file:
        mountpoint.unmount(mounted.path, lazy=True)
        assert os.listdir(mounted.path) == []
        assert file.read() == CONTENT
    wait_until(lambda: not mountpoint.is_running(mounted.pid), "the daemon to end")


# Places and requests that can't be mounted


def test_a_place_that_cannot_be_mounted_on_is_named(mounts: Mounts, tmp_path: Path) -> None:
    root = mounts.add_files(FILES)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for name, why in (("absent", "does not exist"), ("file", "not a directory"), ("full", "not empty")):
        with pytest.raises(BadMountPoint, match=why):
            mounting.start(mounting.Request(mounts.root, root, tmp_path / name))
    mounted = mounts.mount(root, "native")
    with pytest.raises(BadMountPoint, match="already"):
        mounting.start(mounting.Request(mounts.root, root, mounted.path))
    assert read(mounted.path / "other") == b"other"


def test_a_root_or_store_that_is_not_there_leaves_nothing_mounted(mounts: Mounts, engine: str) -> None:
    root = mounts.add_files(FILES)
    place = mounts.place()
    mounts.require(engine)
    with pytest.raises(MissingTree, match="not in the index"):
        mounting.start(mounting.Request(mounts.root, Digest(root.function, bytes(32), 5), place), engine=engine)
    with pytest.raises((StoreError, MissingCapability)):
        mounting.start(mounting.Request(mounts.base / "nothing", root, place), engine=engine)
    assert find_mount(str(place)) is None
    assert not list(mounts.layout.leases.iterdir())


def test_an_engine_that_does_not_exist_is_refused(mounts: Mounts) -> None:
    with pytest.raises(MissingCapability, match="passthrough"):
        mounting.choose_engine("fast", mounts.root)


def test_unmounting_what_is_no_mount_of_ours_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent", Path("/proc")):
        with pytest.raises(NotMounted):
            mountpoint.unmount(place)
