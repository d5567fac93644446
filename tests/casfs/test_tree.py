"""A mount shows exactly the tree that was put in: names, kinds, sizes, modes, times, and nothing else."""

from __future__ import annotations

import ctypes
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casfs.tree import FIXED_MTIME_NS
from store.importing import ScanOptions
from tests.casfs.conftest import Mounted, Mounts

Tree = dict[bytes, "Node"]
Node = bytes | tuple[bool, bytes] | Tree
"""A symlink's target; a file: whether it is executable, and its bytes; or a directory."""

LONG = b"n" * 255

SAMPLE: Tree = {
    b"empty": (False, b""),
    b"program": (True, b"#!/bin/sh\necho ran\n"),
    b"copy of program": (True, b"#!/bin/sh\necho ran\n"),
    b"not \xff\xfe UTF-8": (False, b"bytes"),
    b"new\nline \\ and 'quotes'": (False, b"odd"),
    LONG: (False, b"long"),
    b"large": (False, bytes(range(256)) * 4099),
    b"no files": {},
    b"a directory": {
        LONG: {b"inner": (False, b"inner")},
        b"upwards": b"../program",
        b"self": b".",
        b"deeper": {b"deepest": {b"leaf": (False, b"leaf")}},
    },
    b"dangling": b"nowhere/at all",
    b"absolute": b"/etc/hostname",
    b"long target": b"t/" * 2047 + b"t",
}


BEGAN = time.time() - 1
"""Before any mount of these tests, in seconds since the epoch."""


def write_tree(top: bytes, tree: Tree) -> None:
    for name, node in tree.items():
        path = os.path.join(top, name)
        if isinstance(node, dict):
            os.mkdir(path)
            write_tree(path, node)
        elif isinstance(node, bytes):
            os.symlink(node, path)
        else:
            executable, content = node
            with open(path, "wb") as file:
                file.write(content)
            os.chmod(path, 0o755 if executable else 0o644)


def read_tree(top: bytes) -> Tree:
    """The inverse of `write_tree`, which also checks what every node of a projection has to look like."""
    tree: Tree = {}
    with os.scandir(top) as listing:
        for entry in listing:
            status = os.lstat(entry.path)
            assert status.st_ino == entry.inode(), "the inode number in a listing is that of stat"
            assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
            assert status.st_atime_ns == status.st_mtime_ns
            # No file system lets its ctime be set: a metadata layer has that of its making.
            assert status.st_ctime_ns == status.st_mtime_ns or status.st_ctime > BEGAN
            assert entry.name not in tree
            tree[entry.name] = read_node(entry.path, status)
    return tree


def read_node(path: bytes, status: os.stat_result) -> Node:
    if stat.S_ISDIR(status.st_mode):
        assert stat.S_IMODE(status.st_mode) == 0o555
        tree = read_tree(path)
        assert status.st_nlink == 2 + sum(isinstance(node, dict) for node in tree.values())
        return tree
    assert status.st_nlink == 1
    if stat.S_ISLNK(status.st_mode):
        target = os.readlink(path)
        assert status.st_size == len(target)
        return target
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) in (0o444, 0o555)
    with open(path, "rb") as file:
        content = file.read()
    assert status.st_size == len(content)
    # What it takes, or with engine kernel what the blob takes, in whole blocks of the store's file system.
    assert (len(content) + 511) // 512 <= status.st_blocks <= (len(content) + 4095) // 4096 * 8
    return bool(status.st_mode & 0o100), content


@pytest.fixture(scope="module")
def sample(module_mounts: Mounts, module_engine: str) -> Iterator[Mounted]:
    """The sample tree, mounted by each engine in turn."""
    with tempfile.TemporaryDirectory(dir=module_mounts.base) as source:
        write_tree(os.fsencode(source), SAMPLE)
        root = module_mounts.add(Path(source))
    mounted = module_mounts.mount(root, module_engine)
    yield mounted
    mounted.unmount()


def test_the_mount_shows_exactly_the_tree(sample: Mounted) -> None:
    """Odd names, long names, executables, empty directories and dangling links are all as they were."""
    assert read_tree(os.fsencode(sample.path)) == SAMPLE


def test_the_mount_is_read_only_nosuid_nodev_and_says_which_engine(sample: Mounted, module_engine: str) -> None:
    """What `mount` shows is what was promised."""
    assert sample.report.engine == module_engine
    flags = os.statvfs(sample.path).f_flag
    wanted = os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
    assert flags & wanted == wanted


def test_times_are_the_fixed_one_where_none_was_kept(sample: Mounted) -> None:
    """Equal trees look equal, whenever they were added."""
    for directory, names, files in os.walk(sample.path):
        for name in (*names, *files):
            assert os.lstat(os.path.join(directory, name)).st_mtime_ns == FIXED_MTIME_NS
    assert os.stat(sample.path).st_mtime_ns == FIXED_MTIME_NS


def test_equal_files_at_two_paths_are_two_inodes(sample: Mounted) -> None:
    """Tools that compare device and inode must not take them for hard links; no number comes twice."""
    numbers = [os.lstat(sample.path).st_ino]
    for directory, names, files in os.walk(os.fsencode(sample.path)):
        numbers += [os.lstat(os.path.join(directory, name)).st_ino for name in (*names, *files)]
    assert len(numbers) == len(set(numbers)) > len(SAMPLE)


def test_kept_times_are_shown_to_the_nanosecond(mounts: Mounts, engine: str, tmp_path: Path) -> None:
    """With `keep_mtime` files and links have the times they had, before 1970 and after 2038 too."""
    times = {"old": -86_400 * 10**9 + 7, "now": 1_700_000_000_123_456_789, "late": 5_000_000_000 * 10**9 + 1, "nil": 0}
    for name, time_ns in times.items():
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(time_ns, time_ns))
    os.symlink("now", tmp_path / "link")
    os.utime(tmp_path / "link", ns=(42, 42), follow_symlinks=False)
    mounted = mounts.mount(mounts.add(tmp_path, ScanOptions(keep_mtime=True)), engine)
    listed = {name: os.lstat(mounted.path / name).st_mtime_ns for name in sorted(os.listdir(mounted.path))}
    assert listed == {**times, "link": 42}


def test_an_empty_tree_can_be_mounted(mounts: Mounts, engine: str, tmp_path: Path) -> None:
    """Nothing in, nothing shown."""
    mounted = mounts.mount(mounts.add(tmp_path), engine)
    assert os.listdir(mounted.path) == []
    assert os.stat(mounted.path).st_nlink == 2


def test_undeclared_paths_do_not_exist(sample: Mounted) -> None:
    """Not for open, stat, access, readlink or realpath, below files (ENOTDIR) or far down."""
    for name in ("absent", "no files/absent", "a directory/deeper/absent/more", "etc", "casfs.log", "store", "PROGRAM"):
        path = sample.path / name
        for attempt in (os.lstat, os.stat, os.readlink, os.listdir, lambda p: os.open(p, os.O_RDONLY)):
            with pytest.raises(FileNotFoundError):
                attempt(path)
        assert not os.access(path, os.F_OK)
    with pytest.raises(NotADirectoryError):
        os.stat(sample.path / "program" / "below")
    with pytest.raises(OSError, match=r"File name too long|No such file"):
        os.stat(sample.path / ("n" * 256))


def test_paths_inside_stay_inside(sample: Mounted) -> None:
    """realpath, `..` and relative links end within the mount; `..` of the root is the host's parent as anywhere."""
    top = os.path.realpath(sample.path)
    assert os.path.realpath(sample.path / "a directory" / "upwards") == f"{top}/program"
    assert os.path.realpath(sample.path / "a directory" / "self" / "deeper" / ".." / "upwards") == f"{top}/program"
    assert os.path.samefile(sample.path / "..", sample.path.parent)
    assert os.path.samefile(sample.path / "a directory" / "deeper" / ".." / "..", sample.path)
    below = os.open(sample.path / "a directory" / "deeper", os.O_RDONLY)
    try:
        assert os.path.samestat(os.stat("../..", dir_fd=below), os.stat(sample.path))
    finally:
        os.close(below)


def test_listings_agree_with_inode_numbers_of_dot_and_dot_dot(sample: Mounted) -> None:
    """A raw listing names the directory itself and its parent; checked through find, which looks at both."""
    assert os.stat(sample.path / "a directory" / ".").st_ino == os.stat(sample.path / "a directory").st_ino
    assert os.stat(sample.path / "a directory" / "..").st_ino == os.stat(sample.path).st_ino


def test_inode_numbers_are_the_same_after_remounting_and_in_every_engine(mounts: Mounts, tmp_path: Path) -> None:
    """A node's number follows from the tree alone: a new daemon gives the same ones."""
    write_tree(os.fsencode(tmp_path), SAMPLE)
    root = mounts.add(tmp_path)

    def numbers(engine: str) -> dict[bytes, int]:
        mounted = mounts.mount(root, engine)
        top = os.fsencode(mounted.path)
        found = {}
        for directory, names, files in os.walk(top):
            for name in (*names, *files):
                path = os.path.join(directory, name)
                found[path.removeprefix(top)] = os.lstat(path).st_ino
        mounted.unmount()
        return found

    first, again, native, fuse = (numbers(engine) for engine in ("passthrough", "passthrough", "native", "fuse"))
    assert first == again == native == fuse
    assert len(first) > len(SAMPLE)


def test_a_directory_of_many_entries_is_listed_whole_and_can_be_sought_in(
    mounts: Mounts, engine: str, tmp_path: Path
) -> None:
    """Several pages, with subdirectories between (their cookies jump): each name once, also after telldir/seekdir."""
    names = {f"{number:05d}{'x' * (number % 190)}" for number in range(1500)}
    for number, name in enumerate(sorted(names)):
        if number % 50 == 7:
            (tmp_path / name).mkdir()
            for inner in range(number % 4):
                (tmp_path / name / str(inner)).write_text(name)
        else:
            (tmp_path / name).write_text("same")
    mounted = mounts.mount(mounts.add(tmp_path), engine)
    for _ in range(2):
        listed = os.listdir(mounted.path)
        assert len(listed) == len(names)
        assert set(listed) == names
    first = os.scandir(mounted.path)
    early = [next(first).name for _ in range(10)]
    assert set(os.listdir(mounted.path)) == names, "a second listing beside one that is under way"
    assert {*early, *(entry.name for entry in first)} == names


libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long


class Listing:
    """A directory as C programs read it: what Python's listings don't offer."""

    def __init__(self, path: Path) -> None:
        self._stream = ctypes.c_void_p(libc.opendir(os.fsencode(path)))

    def read(self) -> bytes | None:
        """The next name."""
        entry = libc.readdir(self._stream)
        # struct dirent: inode, offset, length, type, name
        return ctypes.string_at(entry + 19) if entry else None

    def read_all(self) -> list[bytes]:
        return list(iter(self.read, None))

    def tell(self) -> int:
        return int(libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        libc.seekdir(self._stream, ctypes.c_long(position))

    def rewind(self) -> None:
        libc.rewinddir(self._stream)

    def close(self) -> None:
        libc.closedir(self._stream)


def test_listings_can_be_rewound_and_gone_on_with_from_any_place(mounts: Mounts, engine: str, tmp_path: Path) -> None:
    """rewinddir, telldir and seekdir, forth and back over several pages; the first listing fills the kernel's cache."""
    for number in range(700):
        (tmp_path / f"{number:04d}{'x' * (number % 200)}").write_bytes(b"")
    mounted = mounts.mount(mounts.add(tmp_path), engine)
    listing = Listing(mounted.path)
    try:
        everything = listing.read_all()
        assert everything[:2] == [b".", b".."] or engine == "fuse"
        assert len(everything) == len(set(everything)) == 700 + (0 if engine == "fuse" else 2)
        for _ in range(2):
            listing.rewind()
            places = []
            for name in everything:
                places.append(listing.tell())
                assert listing.read() == name
            for index in (len(everything) - 1, 3, 350, 1, 0, 699, 2):
                listing.seek(places[index])
                assert listing.read_all() == everything[index:]
    finally:
        listing.close()


names = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.sampled_from([LONG, b" ", b"...", b"-rf", b"\xff", b"a", b"b", b"~"]),
).filter(lambda name: name not in (b".", b"..") and b"/" not in name and b"\0" not in name)
targets = st.binary(min_size=1, max_size=60).filter(lambda target: b"\0" not in target)
contents = st.one_of(st.binary(max_size=40), st.integers(0, 300_000).map(lambda n: b"%d " % n * (n // 7)))
nodes = st.recursive(
    st.one_of(st.tuples(st.booleans(), contents), targets),
    lambda inner: st.dictionaries(names, inner, max_size=6),
    max_leaves=25,
)
trees = st.dictionaries(names, nodes, max_size=8)


def check_projection(mounts: Mounts, engine: str, tree: Tree) -> None:
    with tempfile.TemporaryDirectory(dir=mounts.base) as source:
        write_tree(os.fsencode(source), tree)
        root = mounts.add(Path(source))
    mounted = mounts.mount(root, engine)
    try:
        assert read_tree(os.fsencode(mounted.path)) == tree
    finally:
        mounted.unmount()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=trees)
def test_a_random_tree_projected_is_the_tree_itself(module_mounts: Mounts, module_engine: str, tree: Tree) -> None:
    """Whatever the names, kinds and bytes: what goes in is what is shown."""
    check_projection(module_mounts, module_engine, tree)


@pytest.mark.long
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=trees)
def test_hundreds_of_random_trees_projected_are_the_trees_themselves(
    module_mounts: Mounts, module_engine: str, tree: Tree
) -> None:
    """The same, for as many trees as one has patience."""
    check_projection(module_mounts, module_engine, tree)
