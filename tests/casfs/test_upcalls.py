"""What a program costs in upcalls, as exact counts: the number of upcalls is the cost model.

RELEASE comes after the close that causes it, so it isn't counted here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from store.digest import Digest
from tests.casfs.conftest import Mounted, Mounts, wait_until

FILES = 10_000


def read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def small_tree() -> dict[str, bytes]:
    return {f"directory/file{number}": b"%d" % number * 5000 for number in range(20)} | {"top": b"top" * 100_000}


@pytest.fixture
def small(mounts: Mounts, engine: str) -> Mounted:
    """Twenty files in a directory, one above."""
    return mounts.mount(mounts.add_files(small_tree()), engine)


@pytest.fixture
def passed(mounts: Mounts) -> Mounted:
    """The same, passed through."""
    return mounts.mount(mounts.add_files(small_tree()), "passthrough")


@pytest.fixture(scope="module")
def many(module_mounts: Mounts) -> tuple[Mounts, dict[str, Digest]]:
    """Two trees of 10,000 files by name of shape: in 100 directories, and in one."""
    wide = module_mounts.add_empty_files(f"{number:05d}.h" for number in range(FILES))
    deep = module_mounts.add_empty_files(f"{number // 100:02d}/{number % 100:02d}.h" for number in range(FILES))
    return module_mounts, {"one directory": wide, "100 directories": deep}


def find_ls(top: Path) -> int:
    done = subprocess.run(["find", top, "-ls"], capture_output=True, check=True)
    return done.stdout.count(b"\n")


@pytest.mark.parametrize("shape", ["one directory", "100 directories"])
def test_find_ls_of_10000_files_costs_at_most_an_upcall_per_25_files(
    many: tuple[Mounts, dict[str, Digest]], shape: str, engine: str, request: pytest.FixtureRequest
) -> None:
    """Listings bring the attributes along; a second find costs next to nothing where listings are cached."""
    mounts, roots = many
    mounted = mounts.mount(roots[shape], engine)
    request.addfinalizer(mounted.unmount)
    directories = 100 if shape == "100 directories" else 0
    with mounted.counting() as first:
        assert find_ls(mounted.path) == FILES + 1 + directories
    with mounted.counting() as second:
        assert find_ls(mounted.path) == FILES + 1 + directories
    print(f"find -ls, {shape}, {engine}: first {dict(first)}, second {dict(second)}")
    # pyfuse3 needs its OPENDIR (session_pyfuse3), so for many small directories it has two upcalls more of each.
    budget = FILES / 25 + (2 * directories if engine == "fuse" else 0)
    assert first.total() <= budget
    assert first["LOOKUP"] <= 1
    assert first["GETXATTR"] + first["LISTXATTR"] <= 1
    if engine != "fuse":
        assert first["OPENDIR"] <= 1
        assert second.total() <= 1 + directories
        assert not second["LOOKUP"] + second["READDIRPLUS"]


def test_passthrough_never_reads(passed: Mounted) -> None:
    """read, pread, mmap, sendfile and a program: READ stays 0, from the mount on."""
    top = passed.path / "top"
    for _ in range(2):
        for path in (top, *sorted((passed.path / "directory").iterdir())):
            assert read(path)
    with open(top, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[-3:] == b"top"
    with open(top, "rb") as file, open(os.devnull, "wb") as null:
        assert os.sendfile(null.fileno(), file.fileno(), 0, 1000) == 1000
    subprocess.run(["md5sum", top], check=True, capture_output=True)
    counts = passed.upcalls()
    assert counts["READ"] == 0
    assert "READ" in passed_statistics(passed), "shown though it is 0"


def passed_statistics(mounted: Mounted) -> dict[str, int]:
    from casfs.control import statistics

    counts: dict[str, int] = statistics(mounted.path)["upcalls"]
    return counts


def test_warm_stats_and_lookups_cost_nothing_misses_too(small: Mounted) -> None:
    """What was looked up once is the kernel's, and so is what doesn't exist."""
    paths = [small.path / "directory" / f"file{number}" for number in range(20)]
    missing = [small.path / "directory" / f"absent{number}" for number in range(20)]

    def look() -> None:
        for path in paths:
            os.stat(path)
            os.access(path, os.R_OK)
        for path in missing:
            with contextlib.suppress(FileNotFoundError):
                os.stat(path)
            assert not path.exists()

    with small.counting() as cold:
        look()
    assert cold["LOOKUP"] == (0 if small.report.engine == "kernel" else 1 + 20 + 20)
    assert cold["GETATTR"] <= 1
    assert set(cold) <= {"LOOKUP", "GETATTR"}
    with small.counting() as warm:
        for _ in range(3):
            look()
    assert warm == Counter()


def test_after_a_listing_stats_cost_nothing(small: Mounted) -> None:
    """READDIRPLUS has entered every name and its attributes."""
    list((small.path / "directory").iterdir())
    with small.counting() as spent:
        for number in range(20):
            os.stat(small.path / "directory" / f"file{number}")
    assert spent == Counter()


def test_a_repeated_listing_costs_at_most_one_upcall(small: Mounted, engine: str) -> None:
    """The kernel keeps listings, where OPENDIR need not be asked for."""
    os.listdir(small.path / "directory")
    for _ in range(3):
        with small.counting() as spent:
            assert len(os.listdir(small.path / "directory")) == 20
        if engine == "fuse":
            # A listing of its own each time: OPENDIR, then two pages, as the second says that there is no more.
            assert spent.total() <= 3, spent
        else:
            assert spent.total() <= 1, spent


def test_reading_does_not_make_attributes_be_asked_for_again(small: Mounted) -> None:
    """Reads through passthrough would invalidate the access time, were the mount not read-only."""
    path = small.path / "top"
    read(path)
    with small.counting() as spent:
        os.stat(path)
        os.stat(path)
    assert spent == Counter()


def test_an_open_costs_one_upcall_and_no_flush_nor_xattr(passed: Mounted) -> None:
    """open, read, fstat, close: one OPEN each time, nothing else; listxattr is asked for once at most."""
    path = passed.path / "top"
    read(path)
    with passed.counting() as spent:
        for _ in range(10):
            read(path)
    assert spent == Counter(OPEN=10)
    with passed.counting() as spent:
        for name in ("user.a", "security.capability", "system.posix_acl_access"):
            for number in range(5):
                with contextlib.suppress(OSError):
                    os.getxattr(passed.path / "directory" / f"file{number}", name)
    assert spent["GETXATTR"] <= 1
    with passed.counting() as spent:
        subprocess.run(["ls", "-lR", passed.path], check=True, capture_output=True)
    assert not spent["GETXATTR"]
    assert spent["LISTXATTR"] <= 1


def test_a_link_is_read_once(mounts: Mounts, engine: str, tmp_path: Path) -> None:
    """The kernel keeps the targets of symbolic links."""
    for number in range(5):
        (tmp_path / f"link{number}").symlink_to("target")
    (tmp_path / "target").write_bytes(b"target")
    mounted = mounts.mount(mounts.add(tmp_path), engine)
    with mounted.counting() as spent:
        for _ in range(4):
            for number in range(5):
                assert os.readlink(mounted.path / f"link{number}") == "target"
                assert (mounted.path / f"link{number}").is_file()
    assert spent["READLINK"] <= (5 if engine != "fuse" else 40)


@pytest.mark.parametrize("engine", ["native", "fuse"])
def test_a_second_read_of_a_file_costs_no_read(mounts: Mounts, engine: str) -> None:
    """Where the daemon reads, it reads once: the kernel keeps the pages between opens."""
    mounted = mounts.mount(mounts.add_files({"file": b"bytes" * 200_000}), engine)
    with mounted.counting() as first:
        read(mounted.path / "file")
    assert 1 <= first["READ"] <= 9
    with mounted.counting() as second:
        for _ in range(3):
            assert read(mounted.path / "file") == b"bytes" * 200_000
        with open(mounted.path / "file", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:5] == b"bytes"
    assert not second["READ"]
    assert second["OPEN"] == 4


def test_a_large_file_is_read_in_large_requests(mounts: Mounts) -> None:
    """Without passthrough 16 MiB take at most an upcall per 128 KiB."""
    size = 16 << 20
    mounted = mounts.mount(mounts.add_files({"file": bytes(size)}), "native")
    with mounted.counting() as spent:
        assert len(read(mounted.path / "file")) == size
    print(f"16 MiB read: {dict(spent)}")
    assert spent["READ"] <= size >> 17


def test_every_open_is_released(small: Mounted) -> None:
    """The daemon's books balance when all is closed: no open is left over."""
    from casfs.control import statistics

    for _ in range(3):
        for path in (small.path / "directory").iterdir():
            read(path)

    def balanced() -> bool:
        counts = statistics(small.path)["upcalls"]
        return bool(counts.get("OPEN", 0) == counts.get("RELEASE", 0))

    wait_until(balanced, "the last RELEASE")
    backing = statistics(small.path).get("backing_ids", {"open": 0})
    assert backing["open"] == 0


def test_the_statistics_do_not_cost_upcalls(small: Mounted) -> None:
    """Looking at the counts doesn't change them."""
    before = small.upcalls()
    for _ in range(5):
        assert small.upcalls() == before
