"""Engine kernel: what it has of its own. That it shows a tree as the others do is tested with them."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casfs import control, kernel_engine, mountpoint, overlay
from casfs.errors import MissingCapability, MountError
from casfs.mountinfo import find_mount
from casfs.overlay import Family
from casfs.tree import FIXED_MTIME_NS
from store.importing import ScanOptions
from store.repository import Store
from tests.casfs.conftest import Mounts, errno_from, wait_until
from tests.conftest import Requirements

CONTENT = b"the bytes of a blob\n" * 300
FILES = {"directory/file": CONTENT, "other": b"other"}


@pytest.fixture(autouse=True, params=["tmpfs", "image"])
def carrier(request: pytest.FixtureRequest, requires: Requirements, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the metadata layer is in; every test is made with both."""
    requires.admin()
    if request.param == "image":
        monkeypatch.setattr(kernel_engine, "TMPFS_NODES", 0)
    return str(request.param)


def casfs_mounts(mounts: Mounts) -> list[str]:
    """Where anything is mounted below the test's directory."""
    text = Path("/proc/self/mountinfo").read_text()
    return [line for line in text.splitlines() if str(mounts.base) in line.split()[4]]


@pytest.fixture
def children() -> Iterator[None]:
    """Fails the test if it leaves a child process."""
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.usefixtures("children")
def test_no_process_stays_behind_and_nothing_is_asked(mounts: Mounts) -> None:
    mounted = mounts.mount(mounts.add_files(FILES), "kernel")
    assert mounted.report.pid is None
    assert (mounted.path / "directory" / "file").read_bytes() == CONTENT
    assert not (mounted.path / "absent").exists()
    assert control.statistics(mounted.path)["upcalls"] == {"READ": 0}


def test_the_socket_of_a_killed_daemon_is_not_taken_for_one_that_serves(
    mounts: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device numbers are used again, and sockets are named by them."""
    runtime = mounts.base / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("CASFS_RUNTIME_DIR", str(runtime))
    for minor in range(1, 2000):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(runtime / f"0-{minor}.sock"))
    mounted = mounts.mount(mounts.add_files(FILES), "kernel")
    assert control.statistics(mounted.path)["why"] == "no process serves this mount"


def test_the_mount_itself_holds_the_lease(mounts: Mounts) -> None:
    mounted = mounts.mount(mounts.add_files(FILES), "kernel")
    mounts.age()
    with Store.open(mounts.root) as store:
        assert [lease.holder for lease in store.leases.living()] == [str(mounted.path)]
        store.collector.collect(0, 0)  # the image may go: the mount keeps it
    assert all(mounts.blob(content).exists() for content in FILES.values())
    assert (mounted.path / "directory" / "file").read_bytes() == CONTENT
    mounted.unmount()
    with Store.open(mounts.root) as store:
        assert store.leases.living() == []
        assert store.collector.collect(0, 0).removed_blobs >= 2
    assert not list(mounts.layout.leases.iterdir())


def test_an_empty_file_needs_no_blob(mounts: Mounts) -> None:
    root = mounts.add_files({"empty": b"", "other": b"other"})
    mounts.blob(b"").unlink(missing_ok=True)
    mounted = mounts.mount(root, "kernel")
    assert (mounted.path / "empty").read_bytes() == b""


def test_with_a_blob_missing_somebody_is_behind_the_mount_who_ends_with_it(mounts: Mounts) -> None:
    root = mounts.add_files(FILES)
    kept = mounts.blob(CONTENT).rename(mounts.base / "kept")
    mounted = mounts.mount(root, "kernel")
    assert mounted.report.missing == 1
    assert (mounted.path / "other").read_bytes() == b"other"
    assert errno_from(lambda: os.open(mounted.path / "directory" / "file", os.O_RDONLY)) == errno.EIO
    kept.rename(mounts.blob(CONTENT))
    assert (mounted.path / "directory" / "file").read_bytes() == CONTENT
    pid = mounted.pid
    mounted.unmount()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the process to end", 60)
    assert mounts.leases() == 0


def test_when_who_fetches_is_killed_what_is_here_goes_on_and_the_rest_is_an_error(mounts: Mounts) -> None:
    root = mounts.add_files(FILES)
    mounts.blob(CONTENT).unlink()
    mounted = mounts.mount(root, "kernel")
    os.kill(mounted.pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{mounted.pid}").exists(), "the process to end")
    assert (mounted.path / "other").read_bytes() == b"other"
    assert errno_from(lambda: os.open(mounted.path / "directory" / "file", os.O_RDONLY)) in (
        errno.ENOTCONN,
        errno.ECONNABORTED,
    )
    assert mounts.leases() == 1, "the mount holds it"
    mounted.unmount()


def test_files_by_reference_are_refused_with_the_engine_that_can(mounts: Mounts, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    root = mounts.add(tmp_path, ScanOptions(reference=True))
    with pytest.raises(MissingCapability, match=r"by reference.*--engine passthrough"):
        mounts.mount(root, "kernel")
    assert mounts.leases() == 0


def test_a_blob_without_a_row_is_hashed_before_the_mount(mounts: Mounts) -> None:
    """As after a crash, or where Bazel put it: nobody would hash it when it is opened."""
    root = mounts.add_files(FILES)
    blob = mounts.blob(CONTENT)
    blob.chmod(0o644)
    blob.write_bytes(b"x" * len(CONTENT))
    with Store.open(mounts.root) as store:
        from store.index import Table

        store.index.update(lambda change: change.clear(Table.BLOBS))
    mounted = mounts.mount(root, "kernel")
    assert errno_from(lambda: os.open(mounted.path / "directory" / "file", os.O_RDONLY)) == errno.EIO
    assert [path.name for path in mounts.layout.quarantine.iterdir()]


def test_a_mount_that_would_serve_zeros_is_noticed(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """With xattrs of the other family the kernel shows empty files of the right size."""
    root = mounts.add_files(FILES)
    real = overlay.stack

    def mismatched(layers: list[int], data: list[int], family: Family, *rest: Any) -> int:
        other = Family.TRUSTED if family is Family.USER else Family.USER
        return real(layers, data, other, *rest)

    monkeypatch.setattr(kernel_engine, "stack", mismatched)
    with pytest.raises(MountError):
        mounts.mount(root, "kernel")
    assert not casfs_mounts(mounts)
    assert mounts.leases() == 0


@pytest.mark.parametrize("family", Family)
def test_both_families_of_xattrs_show_the_tree(mounts: Mounts, monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    monkeypatch.setattr(kernel_engine, "find_family", lambda: family)
    mounted = mounts.mount(mounts.add_files(FILES), "kernel")
    assert (mounted.path / "directory" / "file").read_bytes() == CONTENT
    assert (mounted.path / "other").read_bytes() == b"other"


def test_where_overlayfs_cannot_it_says_so(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(family: Family) -> bool:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(overlay, "_serves", fail)
    overlay.find_family.cache_clear()
    with pytest.raises(MissingCapability, match=r"data-only layers.*Invalid argument.*--engine passthrough"):
        mounts.mount(mounts.add_files(FILES), "kernel")
    assert mounts.leases() == 0


def test_a_blob_cannot_be_written_through_the_mount(mounts: Mounts) -> None:
    mounted = mounts.mount(mounts.add_files(FILES), "kernel")
    with pytest.raises(OSError, match="Read-only"):
        os.open(mounted.path / "directory" / "file", os.O_RDWR)
    assert mounts.blob(CONTENT).read_bytes() == CONTENT


def test_it_is_found_by_its_source_and_unmounted_like_any_other(mounts: Mounts) -> None:
    mounted = mounts.mount(mounts.add_files(FILES), "kernel")
    found = find_mount(str(mounted.path))
    assert found is not None and found.is_of_kernel_engine
    mountpoint.unmount(mounted.path)
    assert find_mount(str(mounted.path)) is None


def _nodes(top: Path) -> dict[str, tuple[object, ...]]:
    """Every path below with what it shows, and what is in it."""
    found: dict[str, tuple[object, ...]] = {}
    for path in top.rglob("*"):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        executable = path.is_file() and bool(status.st_mode & 0o100)
        size = None if path.is_dir() and not path.is_symlink() else status.st_size
        found[str(path.relative_to(top))] = (path.is_dir(), executable, size, content)
    return found


def test_the_mount_shows_what_the_directory_has(mounts: Mounts, sample_tree: Path) -> None:
    mounted = mounts.mount(mounts.add(sample_tree), "kernel")
    assert _nodes(mounted.path) == _nodes(sample_tree)
    assert {path.lstat().st_mtime for path in mounted.path.rglob("*")} == {FIXED_MTIME_NS / 1e9}


def test_times_of_files_are_those_of_the_manifest(mounts: Mounts, sample_tree: Path) -> None:
    mounted = mounts.mount(mounts.add(sample_tree, ScanOptions(keep_mtime=True)), "kernel")
    for path in sample_tree.rglob("*"):
        if path.is_symlink() or path.is_file():
            assert (mounted.path / path.relative_to(sample_tree)).lstat().st_mtime_ns == path.lstat().st_mtime_ns
