"""Mounts that can be written, over every engine: POSIX as the kernel has it, and inputs stay as they were."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from casfs import control, mounting
from casfs.errors import MissingCapability, MountError
from casfs.mountinfo import list_mounts
from store.digest import Digest
from store.repository import SourceOptions
from tests.casfs.conftest import Mounted, Mounts, errno_from

FILES = {"directory/file": b"bytes of a blob\n" * 1000, "other": b"other", "directory/deep/x": b"x"}

MountWritable = Callable[..., Mounted]


@pytest.fixture
def scratch(mounts: Mounts) -> Path:
    return mounts.base / "scratch"


@pytest.fixture
def mount(mounts: Mounts, engine: str, scratch: Path) -> MountWritable:
    """Mount a tree over which can be written: ``mount(root)``."""
    mounts.requires.admin()

    def start(root: Digest, volatile: bool = True) -> Mounted:
        mounts.require(engine)
        place = mounts.place()
        request = mounting.Request(
            mounts.root, root, place, sources=SourceOptions(), writable=scratch, volatile=volatile
        )
        return Mounted(place, mounting.start(request, engine=engine))

    return start


def test_what_is_written_is_in_the_upper_layer_and_inputs_never_change(
    mounts: Mounts, mount: MountWritable, engine: str, scratch: Path
) -> None:
    mounted = mount(mounts.add_files(FILES))
    top = mounted.path
    (top / "new").write_bytes(b"new")
    with open(top / "directory" / "file", "ab") as file:
        file.write(b"more")
    (top / "other").unlink()
    (top / "made").mkdir()
    os.chmod(top / "directory" / "deep" / "x", 0o700)
    assert (top / "directory" / "file").read_bytes() == FILES["directory/file"] + b"more"
    assert not (top / "other").exists()
    assert sorted(os.listdir(top)) == ["directory", "made", "new"]
    assert control.statistics(top)["engine"] == engine
    mounted.unmount()
    upper = scratch / "upper"
    assert (upper / "new").read_bytes() == b"new"
    assert (upper / "directory" / "file").read_bytes() == FILES["directory/file"] + b"more"
    assert os.stat(upper / "other").st_rdev == 0 and not (upper / "other").is_file(), "a whiteout"
    assert (upper / "directory" / "deep" / "x").read_bytes() == b"x", "copied up whole"
    for content in FILES.values():
        assert mounts.blob(content).read_bytes() == content
    assert mounts.leases() == 0


def test_it_is_posix(mounts: Mounts, mount: MountWritable) -> None:
    top = mount(mounts.add_files(FILES)).path
    with open(top / "directory" / "file", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:5] = b"BYTES"
    assert (top / "directory" / "file").read_bytes().startswith(b"BYTES of")
    with open(top / "gone", "w+b") as file:
        (top / "gone").unlink()
        file.write(b"still")
        file.seek(0)
        assert file.read() == b"still"
    os.link(top / "other", top / "linked")
    os.rename(top / "linked", top / "directory" / "renamed")
    os.symlink("renamed", top / "directory" / "link")
    assert (top / "directory" / "link").read_bytes() == b"other"
    os.truncate(top / "other", 2)
    os.utime(top / "other", (1, 2))
    assert (os.stat(top / "other").st_size, os.stat(top / "other").st_mtime) == (2, 2)


def test_what_was_written_is_there_again_when_it_is_mounted_again(mounts: Mounts, mount: MountWritable) -> None:
    root = mounts.add_files(FILES)
    for volatile in (True, False, True):
        mounted = mount(root, volatile)
        with open(mounted.path / "log", "a") as file:
            file.write("line\n")
        assert ("volatile" in _options(mounted.path)) == volatile
        mounted.unmount()
    assert (mount(root).path / "log").read_text() == "line\n" * 3


def _options(path: Path) -> str:
    text = Path("/proc/self/mountinfo").read_text()
    return next(line for line in text.splitlines() if f" {path} " in line)


def test_nothing_else_is_mounted_and_one_unmount_is_enough(mounts: Mounts, mount: MountWritable) -> None:
    mounted = mount(mounts.add_files(FILES))
    below = [found for found in list_mounts() if found.path.startswith(os.fsencode(mounts.base))]
    assert [found.kind for found in below] == ["overlay"]
    mounted.unmount()
    assert not [found for found in list_mounts() if found.path.startswith(os.fsencode(mounts.base))]


def test_a_full_scratch_disk_is_enospc_for_the_tool(mounts: Mounts, mount: MountWritable, scratch: Path) -> None:
    scratch.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", scratch], check=True)
    try:
        mounted = mount(mounts.add_files(FILES))
        done = subprocess.run(
            ["dd", "if=/dev/zero", f"of={mounted.path}/big", "bs=64k", "count=64"], capture_output=True, check=False
        )
        assert done.returncode == 1 and b"No space left" in done.stderr
        mounted.unmount()
    finally:
        subprocess.run(["umount", scratch], check=True)


@pytest.mark.parametrize("engine", ["kernel", "native"])
def test_scratch_that_cannot_be_used_is_named_and_nothing_stays_mounted(
    mounts: Mounts, mount: MountWritable, scratch: Path
) -> None:
    root = mounts.add_files(FILES)
    scratch.write_bytes(b"a file")
    assert errno_from(lambda: os.listdir(scratch))
    with pytest.raises((MountError, MissingCapability), match="scratch"):
        mount(root)
    assert not [found for found in list_mounts() if found.path.startswith(os.fsencode(mounts.base))]
    assert mounts.leases() == 0
