"""EROFS images of trees: read back by a reader of our own, by erofs-utils, and by the kernel."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casfs import syscalls
from casfs.erofs import write_image
from casfs.overlay import Family
from store.digest import Digest, DigestFunction
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, SymlinkEntry
from store.importing import ScanOptions
from store.layout import blob_path
from store.repository import Store
from store.trees import Row, list_entries
from tests.conftest import Requirements

FIXED = 946_684_800 * 10**9
GIB = 1 << 30


class File(NamedTuple):
    size: int
    executable: bool = False
    mtime_ns: int | None = None
    redirect: bytes = b"/blob"


class Link(NamedTuple):
    target: bytes
    mtime_ns: int | None = None


Tree = dict[bytes, "File | Link | Tree"]


class Shown(NamedTuple):
    """What a path is shown as."""

    mode: int
    mtime_ns: int
    size: int | None = None  # directories have the size that they need
    links: int = 1
    target: bytes | None = None
    xattrs: frozenset[tuple[str, bytes]] = frozenset()


def expect(tree: Tree, family: Family, path: bytes = b"") -> dict[bytes, Shown]:
    """All paths of a tree, its root's is empty."""
    links = 2 + sum(isinstance(node, dict) for node in tree.values())
    shown = {path: Shown(stat.S_IFDIR | 0o555, FIXED, None, links)}
    for name, node in tree.items():
        below = path + b"/" + name if path else name
        if isinstance(node, dict):
            shown |= expect(node, family, below)
            continue
        mtime_ns = FIXED if node.mtime_ns is None else node.mtime_ns
        if isinstance(node, Link):
            shown[below] = Shown(stat.S_IFLNK | 0o777, mtime_ns, len(node.target), 1, node.target)
        else:
            mode = stat.S_IFREG | (0o555 if node.executable else 0o444)
            xattrs = {(family.value.metacopy, b""), (family.value.redirect, node.redirect)} if node.size else set()
            shown[below] = Shown(mode, mtime_ns, node.size, 1, None, frozenset(xattrs))
    return shown


def image_of(tree: Tree, family: Family = Family.TRUSTED, *, uid: int = 0, gid: int = 0) -> bytes:
    directories: list[Tree] = []
    redirects: dict[bytes, bytes] = {}

    def add(directory: Tree) -> int:
        directories.append(directory)
        return len(directories)

    def row(name: bytes, node: File | Link | Tree) -> Row:
        if isinstance(node, dict):
            return Row(0, DirectoryEntry(name, DigestFunction.SHA256.of(b"")), numbers[id(node)])
        if isinstance(node, Link):
            return Row(0, SymlinkEntry(name, *node))
        hash_ = hashlib.sha256(node.redirect).digest()
        redirects[hash_] = node.redirect
        digest = Digest(DigestFunction.SHA256, hash_, node.size)
        return Row(0, FileEntry(name, digest, node.executable, node.mtime_ns))

    numbers: dict[int, int] = {}
    pending = [tree]
    while pending:
        directory = pending.pop()
        numbers[id(directory)] = add(directory)
        pending.extend(node for node in directory.values() if isinstance(node, dict))

    def redirect_of(entry: FileEntry | ReferenceEntry) -> bytes:
        assert isinstance(entry, FileEntry)
        return redirects[entry.digest.hash]

    pieces = write_image(
        numbers[id(tree)],
        lambda number: (row(name, node) for name, node in sorted(directories[number - 1].items())),
        redirect_of,
        family,
        uid=uid,
        gid=gid,
    )
    return b"".join(pieces)


# A reader of our own, that looks at what the kernel's relies on


class Reader:
    def __init__(self, image: bytes) -> None:
        self.image = image
        (magic,) = struct.unpack_from("<I", image, 1024)
        assert magic == 0xE0F5E1E2
        assert image[1024 + 12] == 12
        self.root, self.inodes, seconds, nanoseconds, blocks, meta, self.xattrs = struct.unpack_from(
            "<HQQIIII", image, 1024 + 14
        )
        assert meta == 0
        assert blocks * 4096 == len(image)
        self.time_ns = seconds * 10**9 + nanoseconds
        self.seen: set[int] = set()

    def read(self) -> dict[bytes, Shown]:
        """All paths; the tree's form is checked on the way."""
        shown: dict[bytes, Shown] = {}
        pending = [(b"", self.root, self.root, 2)]
        while pending:
            path, nid, parent, kind = pending.pop()
            assert nid not in self.seen
            self.seen.add(nid)
            shown[path], body = self.inode(nid)
            assert {1: stat.S_ISREG, 2: stat.S_ISDIR, 7: stat.S_ISLNK}[kind](shown[path].mode)
            if kind == 2:
                entries = self.directory(body)
                names = [name for name, _, _ in entries]
                assert names == sorted(set(names))
                assert (b".", nid, 2) in entries and (b"..", parent, 2) in entries
                for name, below, kind in entries:
                    if name not in (b".", b".."):
                        pending.append((path + b"/" + name if path else name, below, nid, kind))
        assert len(self.seen) == self.inodes
        return shown

    def inode(self, nid: int) -> tuple[Shown, bytes]:
        at = nid * 32
        form, count, mode = struct.unpack_from("<HHH", self.image, at)
        if form & 1:
            size, place, _, self.uid, self.gid, seconds, nanoseconds, links = struct.unpack_from(
                "<QIIIIqII", self.image, at + 8
            )
            mtime_ns, after = seconds * 10**9 + nanoseconds, at + 64
        else:
            links, size, _, place, _, self.uid, self.gid = struct.unpack_from("<HIIIIHH", self.image, at + 6)
            mtime_ns, after = self.time_ns, at + 32
        xattrs = self.inode_xattrs(after, count)
        after += 12 + (count - 1) * 4 if count else 0
        body = b""
        layout = form >> 1
        if layout == 4:
            chunks = -(-size // (4096 << (place & 31)))
            assert self.image[after : after + 4 * chunks] == b"\xff" * 4 * chunks
        elif layout == 2:
            tail = size % 4096
            assert tail
            assert after % 4096 + tail <= 4096
            body = self.blocks(place, size - tail) + self.image[after : after + tail]
        else:
            assert layout == 0
            body = self.blocks(place, size)
        if stat.S_ISDIR(mode):
            return Shown(mode, mtime_ns, None, links), body
        target = body if stat.S_ISLNK(mode) else None
        return Shown(mode, mtime_ns, size, links, target, frozenset(xattrs.items())), body

    def blocks(self, place: int, size: int) -> bytes:
        assert not size or 0 < place * 4096 <= len(self.image) - size
        return self.image[place * 4096 : place * 4096 + size]

    def inode_xattrs(self, at: int, count: int) -> dict[str, bytes]:
        if not count:
            return {}
        end = at + 12 + (count - 1) * 4
        places = [
            self.xattrs * 4096 + 4 * n for n in struct.unpack_from(f"<{self.image[at + 4]}I", self.image, at + 12)
        ]
        at += 12 + 4 * len(places)
        found = dict(self.xattr(place)[0] for place in places)
        while at < end:
            (name, value), at = self.xattr(at)
            assert name not in found
            found[name] = value
        assert at == end
        return found

    def xattr(self, at: int) -> tuple[tuple[str, bytes], int]:
        length, index, size = struct.unpack_from("<BBH", self.image, at)
        name = {1: "user.", 4: "trusted."}[index] + self.image[at + 4 : at + 4 + length].decode()
        end = at + 4 + length + size
        return (name, self.image[end - size : end]), (end + 3) & -4

    @staticmethod
    def directory(body: bytes) -> list[tuple[bytes, int, int]]:
        entries = []
        for start in range(0, len(body), 4096):
            block = body[start : start + 4096]
            (first,) = struct.unpack_from("<H", block, 8)
            heads = [struct.unpack_from("<QHBx", block, at) for at in range(0, first, 12)]
            ends = [offset for _, offset, _ in heads[1:]] + [len(block)]
            for (nid, offset, kind), end in zip(heads, ends, strict=True):
                name = block[offset:end].rstrip(b"\0")
                assert 0 < len(name) <= 255
                entries.append((name, nid, kind))
        return entries


# And those of others


def check_with_fsck(path: Path, requires: Requirements) -> None:
    requires.programs("fsck.erofs")
    done = subprocess.run(["fsck.erofs", path], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def mounted(image: bytes, base: Path, requires: Requirements) -> Iterator[Path]:
    requires.admin()
    path, place = base / "image", base / "meta"
    path.write_bytes(image)
    place.mkdir(exist_ok=True)
    try:
        syscalls.mount(str(path), str(place), "erofs", syscalls.MS_RDONLY, "")
    except OSError as error:
        requires.condition(error.errno != errno.ENODEV, "EROFS in this kernel")
        if error.errno != errno.ENOTBLK:
            raise
        requires.loop_devices()  # before Linux 6.12
        subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", path, place], check=True, timeout=60)
    try:
        yield place
    finally:
        syscalls.umount(str(place))


@contextlib.contextmanager
def stacked(metadata: Path, blobs: Path, family: Family, base: Path, requires: Requirements) -> Iterator[Path]:
    place = base / "overlay"
    place.mkdir()
    options = "userxattr" if family is Family.USER else "metacopy=on,redirect_dir=on"
    try:
        syscalls.mount("none", str(place), "overlay", syscalls.MS_RDONLY, f"{options},lowerdir={metadata}::{blobs}")
    except OSError as error:
        requires.condition(error.errno != errno.EINVAL, f"overlayfs with data-only layers and {options}")
        raise
    try:
        yield place
    finally:
        syscalls.umount(str(place))


def look(path: bytes) -> Shown:
    """A path as the kernel shows it."""
    status = os.lstat(path)
    names = os.listxattr(path, follow_symlinks=False)
    return Shown(
        status.st_mode,
        status.st_mtime_ns,
        None if stat.S_ISDIR(status.st_mode) else status.st_size,
        status.st_nlink,
        os.readlink(path) if stat.S_ISLNK(status.st_mode) else None,
        frozenset((name, os.getxattr(path, name, follow_symlinks=False)) for name in names),
    )


def look_at_all(top: Path) -> dict[bytes, Shown]:
    """All paths below a directory; by descriptor, so that no path is too long."""
    shown = {b"": look(os.fsencode(top))}
    for directory, directories, files, descriptor in os.fwalk(os.fsencode(top)):
        at = b"/proc/self/fd/%d/" % descriptor
        prefix = os.path.relpath(directory, os.fsencode(top)) + b"/"
        prefix = b"" if prefix == b"./" else prefix
        for name in directories + files:
            shown[prefix + name] = look(at + name)
    return shown


SAMPLE: Tree = {
    b"!before the dots": File(1),
    b"-": File(2),
    b".-between": File(3),
    b"...": File(4),
    b"caf\xe9": File(5, mtime_ns=1_234_567_890_123_456_789),
    b"n" * 255: File(6, executable=True, redirect=b"/" + b"r" * 4000),
    b"before 1970": File(7, mtime_ns=-1_500_000_000),
    b"empty": File(0),
    b"empty and old": File(0, mtime_ns=1),
    b"just under 4 GiB": File(4 * GIB - 1),
    b"4 GiB": File(4 * GIB),
    b"large": File(5 * GIB + 1, redirect=b"/another"),
    b"huge": File((8 << 40) + 1),
    b"link": Link(b"../caf\xe9"),
    b"link with a time": Link(b"x", mtime_ns=10**18 + 1),
    b"links": {b"%04d" % length: Link(b"t" * length) for length in (1, 2000, 3000, 4032, 4033, 4064, 4065, 4095)},
    b"hollow": {},
    b"some": {b"%03d" % number + b"x" * number: File(number, redirect=b"/r" * number) for number in range(1, 250)},
}


@pytest.fixture(params=Family, ids=lambda family: family.name.lower())
def family(request: pytest.FixtureRequest) -> Family:
    assert isinstance(request.param, Family)
    return request.param


def test_a_tree_with_a_bit_of_everything_is_read_back(family: Family) -> None:
    assert Reader(image_of(SAMPLE, family)).read() == expect(SAMPLE, family)


def test_erofs_utils_find_no_fault(tmp_path: Path, requires: Requirements, family: Family) -> None:
    path = tmp_path / "image"
    path.write_bytes(image_of(SAMPLE, family))
    check_with_fsck(path, requires)
    requires.programs("dump.erofs")
    done = subprocess.run(["dump.erofs", "-s", path], capture_output=True, text=True, timeout=60, check=True)
    assert f"{len(expect(SAMPLE, family))}" in done.stdout


def test_the_kernel_shows_the_tree(tmp_path: Path, requires: Requirements, family: Family) -> None:
    with mounted(image_of(SAMPLE, family), tmp_path, requires) as place:
        assert look_at_all(place) == expect(SAMPLE, family)
        for name in SAMPLE:
            assert os.path.lexists(os.path.join(os.fsencode(place), name))
        assert not os.path.lexists(place / "....")


def test_an_empty_tree(tmp_path: Path, requires: Requirements) -> None:
    image = image_of({})
    assert Reader(image).read() == expect({}, Family.TRUSTED)
    with mounted(image, tmp_path, requires) as place:
        assert os.listdir(place) == []
    check_with_fsck(tmp_path / "image", requires)


NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in (b".", b"..") and b"/" not in name and b"\0" not in name
)
TIMES = st.none() | st.integers(-(1 << 63), (1 << 63) - 1)
SIZES = st.sampled_from([0, 1, 4096, (1 << 32) - 1, 1 << 32, 1 << 43, (1 << 43) + 1, 1 << 46]) | st.integers(0, 1 << 40)
REDIRECTS = st.binary(min_size=1, max_size=4000).map(lambda path: b"/" + path)
TARGETS = (st.binary(min_size=1, max_size=4095) | st.integers(1, 4095).map(lambda size: b"t" * size)).filter(
    lambda target: b"\0" not in target
)
NODES: st.SearchStrategy[File | Link | Tree] = st.recursive(
    st.builds(File, SIZES, st.booleans(), TIMES, REDIRECTS) | st.builds(Link, TARGETS, TIMES),
    lambda nodes: st.dictionaries(NAMES, nodes, max_size=40),
    max_leaves=60,
)
TREES = st.dictionaries(NAMES, NODES, max_size=20)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(TREES, st.sampled_from(Family))
def test_any_tree_is_read_back(tree: Tree, family: Family) -> None:
    assert Reader(image_of(tree, family)).read() == expect(tree, family)


def random_tree(seed: int) -> Tree:
    """Names and targets of all lengths, so that records end everywhere in a block."""
    chance = random.Random(seed)
    directories: list[Tree] = [{}]
    for number in range(3000):
        name = b"%d" % number + b"n" * int(250 * chance.random() ** 4)
        mtime_ns = chance.choice([None, chance.randrange(1 << 61)])
        kind = chance.random()
        node: File | Link | Tree
        if kind < 0.1:
            node = {}
            directories.append(node)
        elif kind < 0.3:
            node = Link(b"t" * int(1 + 4094 * chance.random() ** 5), mtime_ns)
        else:
            redirect = b"/" + b"r" * int(4000 * chance.random() ** 8)
            node = File(chance.randrange(1 << chance.randrange(1, 40)), chance.random() < 0.5, mtime_ns, redirect)
        directories[int(len(directories) * chance.random() ** 2)][name] = node
    return directories[0]


@pytest.mark.parametrize("seed", range(3))
def test_random_trees_are_the_same_to_the_reader_the_kernel_and_fsck(
    seed: int, tmp_path: Path, requires: Requirements
) -> None:
    tree = random_tree(seed)
    image = image_of(tree)
    expected = expect(tree, Family.TRUSTED)
    assert Reader(image).read() == expected
    with mounted(image, tmp_path, requires) as place:
        assert look_at_all(place) == expected
    check_with_fsck(tmp_path / "image", requires)


def test_equal_trees_make_equal_images() -> None:
    assert image_of(random_tree(7)) == image_of(random_tree(7))
    changed = random_tree(7) | {b"one more": File(1)}
    assert image_of(random_tree(7)) != image_of(changed)


@pytest.mark.parametrize("owner", [(1000, 65_535), (65_536, 5), (3, 4_000_000_000)])
def test_all_belongs_to_the_owner_asked_for(owner: tuple[int, int], tmp_path: Path, requires: Requirements) -> None:
    tree: Tree = {b"file": File(1), b"link": Link(b"x"), b"directory": {}}
    with mounted(image_of(tree, uid=owner[0], gid=owner[1]), tmp_path, requires) as place:
        for path in (place, *place.iterdir()):
            status = path.lstat()
            assert (status.st_uid, status.st_gid) == owner


def test_a_directory_of_a_hundred_thousand_files(tmp_path: Path, requires: Requirements) -> None:
    many: Tree = {b"%d.h" % number: File(number + 1) for number in range(100_000)}
    tree: Tree = {b"many": many}
    with mounted(image_of(tree), tmp_path, requires) as place:
        assert sorted(os.listdir(os.fsencode(place / "many"))) == sorted(many)
        for number in range(0, 100_000, 37):
            assert os.lstat(place / "many" / f"{number}.h").st_size == number + 1
        assert not (place / "many" / "100000.h").exists()
    check_with_fsck(tmp_path / "image", requires)


def test_a_root_of_more_directories_than_a_compact_inode_counts(tmp_path: Path, requires: Requirements) -> None:
    tree: Tree = {b"%d" % number: {} for number in range(66_000)}
    tree[b"below"] = {b"%d" % number: {} for number in range(66_000)}
    with mounted(image_of(tree), tmp_path, requires) as place:
        assert os.stat(place).st_nlink == 66_003
        assert os.stat(place / "below").st_nlink == 66_002
        assert len(os.listdir(place)) == 66_001
        assert len(os.listdir(place / "below")) == 66_000


def test_two_hundred_levels(tmp_path: Path, requires: Requirements) -> None:
    tree: Tree = {b"deepest": File(1)}
    for level in range(200):
        tree = {b"level %d " % level + b"x" * 50: tree, b"beside": Link(b"y")}
    image = image_of(tree)
    expected = expect(tree, Family.TRUSTED)
    assert Reader(image).read() == expected
    with mounted(image, tmp_path, requires) as place:
        assert look_at_all(place) == expected
    check_with_fsck(tmp_path / "image", requires)


def test_one_directory_at_many_places_is_as_many_directories(tmp_path: Path, requires: Requirements) -> None:
    twin: Tree = {b"file": File(3), b"sub": {b"link": Link(b"..")}}
    tree: Tree = {b"a": twin, b"b": {b"c": twin}, b"d": twin}
    with mounted(image_of(tree), tmp_path, requires) as place:
        assert look_at_all(place) == expect(tree, Family.TRUSTED)
        assert len({os.stat(place / path / "sub").st_ino for path in ("a", "b/c", "d")}) == 3


def test_an_overlay_reads_the_bytes_of_blobs(
    store: Store, sample_tree: Path, tmp_path: Path, requires: Requirements, family: Family
) -> None:
    root = store.importer.from_directories([(b"", sample_tree)], ScanOptions())

    def redirect_of(entry: Entry) -> bytes:
        assert isinstance(entry, FileEntry)
        return b"/" + os.fsencode(blob_path(entry.digest))

    with store.index.view() as view:
        pieces = write_image(root.id, lambda number: list_entries(view, number), redirect_of, family)
        image = b"".join(pieces)
    with (
        mounted(image, tmp_path, requires) as metadata,
        stacked(metadata, store.layout.blobs, family, tmp_path, requires) as place,
    ):
        command = ["diff", "-r", "--no-dereference", str(sample_tree), str(place)]
        done = subprocess.run(command, check=False, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_pieces_are_small_and_a_tree_that_changes_is_refused() -> None:
    directory = DirectoryEntry(b"", DigestFunction.SHA256.of(b""))
    counts = {1: 20_000}

    def rows_of(number: int) -> list[Row]:
        names = [b"%05d" % count for count in range(counts.get(number, 1))]
        if number == 1:
            return [Row(0, directory._replace(name=name), 2) for name in names]
        return [Row(0, SymlinkEntry(name, b"target")) for name in names]

    def redirect_of(_: Entry) -> bytes:
        raise AssertionError("there are no files")

    pieces = list(write_image(1, rows_of, redirect_of, Family.USER))
    assert len(pieces) > 5
    assert max(map(len, pieces)) < 1 << 20
    assert len(Reader(b"".join(pieces)).read()) == 40_001

    pieces_of_changed = write_image(1, rows_of, redirect_of, Family.USER)
    next(pieces_of_changed)
    counts[2] = 100
    with pytest.raises(RuntimeError, match="changed while"):
        list(pieces_of_changed)


@pytest.mark.long
def test_a_million_files(tmp_path: Path, requires: Requirements) -> None:
    tree: Tree = {
        b"%03d" % directory: {b"%04d.h" % number: File(1 + number) for number in range(1000)}
        for directory in range(1000)
    }
    with mounted(image_of(tree), tmp_path, requires) as place:
        assert len(os.listdir(place)) == 1000
        for directory in range(0, 1000, 9):
            assert len(os.listdir(place / f"{directory:03}")) == 1000
            assert os.stat(place / f"{directory:03}" / "0999.h").st_size == 1000
