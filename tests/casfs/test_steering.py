"""A mounted tree that is changed while programs use it, by every engine with a session."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path

import pytest

from casfs import control
from casfs.changes import Change, decode_changes, encode_changes
from casfs.errors import BadChange, MountError, NotMounted
from casfs.steered_tree import SteeredTree
from casfs.tree import ROOT, NoSuchNode, ProjectedTree
from store.digest import Digest, DigestFunction
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, Stamp, SymlinkEntry
from store.errors import BadName
from store.repository import Store
from store.treebuilder import TreeBuilder
from tests.casfs.conftest import SERVED_ENGINES, Mounted, Mounts, errno_from, wait_until

FILES = {"a/one": b"one", "a/b/two": b"two" * 1000, "a/b/three": b"3", "top": b"top"}


@pytest.fixture(params=SERVED_ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mounted(mounts: Mounts, engine: str) -> Mounted:
    return mounts.mount(mounts.add_files(FILES), engine)


def remap(mounted: Mounted, *changes: Change) -> int:
    return control.remap(mounted.path, changes)


def blob(mounts: Mounts, content: bytes, name: bytes = b"") -> FileEntry:
    with Store.open(mounts.root) as store, store.ingest() as ingest:
        return FileEntry(name, ingest.add_bytes(content, DigestFunction.BLAKE3), False)


def file_at(mounts: Mounts, path: bytes, content: bytes) -> tuple[bytes, FileEntry]:
    return path, blob(mounts, content, path.rpartition(b"/")[2])


def names(path: Path) -> list[str]:
    found = os.listdir(path)
    assert len(found) == len(set(found))
    return sorted(found)


def test_a_path_that_is_added_is_there_at_once_though_its_absence_was_cached(mounts: Mounts, mounted: Mounted) -> None:
    for place in ("a/new", "x/y/z"):
        assert not (mounted.path / place).exists()
    assert names(mounted.path) == ["a", "top"]
    remap(mounted, *[Change("add", *file_at(mounts, path, b"content")) for path in (b"a/new", b"x/y/z")])
    for place in ("a/new", "x/y/z"):
        assert (mounted.path / place).read_bytes() == b"content"
    assert names(mounted.path) == ["a", "top", "x"]
    assert names(mounted.path / "a") == ["b", "new", "one"]
    assert names(mounted.path / "x") == ["y"]
    assert os.stat(mounted.path).st_nlink == 4, "two directories in it"


def test_a_path_that_is_removed_is_gone_at_once(mounted: Mounted) -> None:
    assert (mounted.path / "a/b/two").read_bytes() == FILES["a/b/two"]
    assert names(mounted.path / "a/b") == ["three", "two"]
    remap(mounted, Change("remove", b"a/b/two"), Change("remove", b"top"))
    assert errno_from(lambda: os.open(mounted.path / "a/b/two", os.O_RDONLY)) == errno.ENOENT
    assert names(mounted.path / "a/b") == ["three"]
    assert names(mounted.path) == ["a"]


def test_what_is_open_or_mapped_stays_and_a_new_open_sees_the_new(mounts: Mounts, mounted: Mounted) -> None:
    place = mounted.path / "a/b/two"
    before = os.stat(place).st_ino
    with place.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        remap(mounted, Change("replace", *file_at(mounts, b"a/b/two", b"new content")))
        assert place.read_bytes() == b"new content"
        assert os.stat(place).st_size == len(b"new content")
        assert os.stat(place).st_ino != before
        assert opened.read() == mapped[:] == FILES["a/b/two"]
        assert os.fstat(opened.fileno()).st_size == len(FILES["a/b/two"])
    remap(mounted, Change("replace", *file_at(mounts, b"a/b/two", b"newer")))
    assert place.read_bytes() == b"newer"


def test_a_subtree_is_grafted_changed_and_taken_away(mounts: Mounts, mounted: Mounted) -> None:
    tree = mounts.add_files({"deep/er/file": b"in the graft", "deep/other": b"o", "file": b"f"})
    remap(mounted, Change("add", b"g/graft", DirectoryEntry(b"graft", tree)))
    graft = mounted.path / "g/graft"
    assert (graft / "deep/er/file").read_bytes() == b"in the graft"
    remap(mounted, Change("replace", *file_at(mounts, b"g/graft/deep/er/file", b"over it")))
    assert (graft / "deep/er/file").read_bytes() == b"over it"
    assert names(graft / "deep") == ["er", "other"]
    inside = os.open(graft / "deep", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with (graft / "deep/er/file").open("rb") as opened:
            remap(mounted, Change("remove", b"g/graft"))
            assert not graft.exists()
            assert opened.read() == b"over it"
            absent = errno_from(lambda: os.open("nothing", os.O_RDONLY, dir_fd=inside))
            assert absent in (errno.ENOENT, errno.ESTALE)
    finally:
        os.close(inside)
    remap(mounted, Change("replace", b"a", DirectoryEntry(b"a", tree)))
    assert (mounted.path / "a/deep/er/file").read_bytes() == b"in the graft"
    assert names(mounted.path / "a") == ["deep", "file"]


def test_links_and_files_of_the_host(mounts: Mounts, mounted: Mounted) -> None:
    host = mounts.base / "host"
    host.write_bytes(b"on the host")
    host.chmod(0o755)
    entry = ReferenceEntry(b"host", os.fsencode(host), Stamp.of(host.stat()), True)
    remap(mounted, Change("add", b"host", entry), Change("add", b"link", SymlinkEntry(b"link", b"a/one")))
    assert (mounted.path / "host").read_bytes() == b"on the host"
    assert os.access(mounted.path / "host", os.X_OK)
    assert (mounted.path / "link").read_bytes() == b"one"
    assert os.readlink(mounted.path / "link") == "a/one"
    # Replaced behind its back it is an error, and pointed at again it is the new one: never a stale byte.
    host.unlink()
    host.write_bytes(b"another file of the host")
    assert errno_from(lambda: os.open(mounted.path / "host", os.O_RDONLY)) is not None
    remap(mounted, Change("replace", b"host", entry._replace(stamp=Stamp.of(host.stat()))))
    assert (mounted.path / "host").read_bytes() == b"another file of the host"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Change("add", b"a/b/two", SymlinkEntry(b"two", b"x")), "it is there already"),
        (Change("replace", b"a/none", SymlinkEntry(b"none", b"x")), "it isn't there"),
        (Change("remove", b"none/below"), "there is no 'none'"),
        (Change("add", b"top/below", SymlinkEntry(b"below", b"x")), "'top' is not a directory"),
        (Change("remove", b"../out"), "can't be an entry"),
        (Change("remove", b"/absolute"), "absolute"),
        (Change("remove", b""), "empty name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_of_a_step_with_one_wrong_change_nothing_is_done(mounted: Mounted, wrong: Change, says: str) -> None:
    fine = [
        Change("add", b"p/q/r", SymlinkEntry(b"r", b"x")),
        Change("remove", b"a/one"),
        Change("replace", b"top", SymlinkEntry(b"top", b"y")),
    ]
    with pytest.raises(BadChange, match=says):
        remap(mounted, *fine, wrong)
    assert names(mounted.path) == ["a", "top"]
    assert (mounted.path / "a/one").read_bytes() == b"one"
    assert not os.path.islink(mounted.path / "top")
    remap(mounted, *fine)
    assert os.readlink(mounted.path / "p/q/r") == "x"


def test_a_tree_that_is_not_in_the_index_is_named(mounted: Mounted) -> None:
    nowhere = DigestFunction.BLAKE3.of(b"no such tree")
    with pytest.raises(Exception, match=str(nowhere)):
        remap(mounted, Change("add", b"x", DirectoryEntry(b"x", nowhere)))
    assert names(mounted.path) == ["a", "top"]


def test_what_is_mapped_is_held_from_collection_until_it_is_gone(mounts: Mounts, mounted: Mounted) -> None:
    path, entry = file_at(mounts, b"held", b"held by its place")
    remap(mounted, Change("add", path, entry))
    mounts.age()
    with Store.open(mounts.root) as store:
        store.collector.collect(0, 0)
    assert (mounted.path / "held").read_bytes() == b"held by its place"
    assert mounts.leases() == 2
    assert names(mounted.path) == ["a", "held", "top"], "a listing counts as a lookup of each name"
    remap(mounted, Change("remove", path))

    def is_let_go() -> bool:
        # The kernel says that it has forgotten the node when it likes; the next step lets go.
        there = os.path.islink(mounted.path / "toggle")
        toggle = Change("remove", b"toggle") if there else Change("add", b"toggle", SymlinkEntry(b"toggle", b"x"))
        remap(mounted, toggle)
        return mounts.leases() == 1

    wait_until(is_let_go, "the lease to be given up")
    with Store.open(mounts.root) as store:
        store.collector.collect(0, 0)
    assert not mounts.blob(b"held by its place").exists()


def test_who_looks_after_a_step_sees_that_step_or_a_later_one(mounts: Mounts, mounted: Mounted) -> None:
    entries = [blob(mounts, b"%d" % number, b"moving") for number in range(60)]
    remap(mounted, Change("add", b"a/moving", entries[0]))
    done = [0]
    failures: list[str] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            least = done[0]
            found = int((mounted.path / "a/moving").read_bytes())
            if found < least:
                failures.append(f"{found} after {least}")
            if names(mounted.path / "a") != ["b", "moving", "one"]:
                failures.append("a listing without it, or twice")

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for number, entry in enumerate(entries[1:], 1):
            remap(mounted, Change("replace", b"a/moving", entry))
            done[0] = number
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert not failures


def test_a_listing_under_way_has_every_unchanged_name_once(mounts: Mounts, engine: str) -> None:
    files = {f"d/{number:04d}": b"x" for number in range(2000)}
    mounted = mounts.mount(mounts.add_files(files), engine)
    entry = blob(mounts, b"n")
    with os.scandir(mounted.path / "d") as listing:
        seen = [next(listing).name for _ in range(100)]
        remap(
            mounted,
            *[Change("remove", b"d/%04d" % number) for number in range(0, 2000, 20)],
            *[Change("add", b"d/new%d" % number, entry._replace(name=b"new%d" % number)) for number in range(50)],
        )
        seen.extend(item.name for item in listing)
    unchanged = {f"{number:04d}" for number in range(2000) if number % 20}
    assert sorted(name for name in seen if name in unchanged) == sorted(unchanged)
    assert len(names(mounted.path / "d")) == 2000 - 100 + 50


def test_many_changes_in_one_step(mounts: Mounts, mounted: Mounted) -> None:
    entry = blob(mounts, b"same")
    changes = [Change("add", b"many/%03d/%05d" % (n % 100, n), entry._replace(name=b"%05d" % n)) for n in range(5000)]
    remap(mounted, *changes)
    assert sum(len(found) for _, _, found in os.walk(mounted.path / "many")) == 5000


def test_a_connection_takes_one_step_after_the_other(mounts: Mounts, mounted: Mounted) -> None:
    entries = [blob(mounts, b"%d" % number, b"top") for number in range(20)]
    with control.steer(mounted.path) as connection:
        for number, entry in enumerate(entries):
            connection.remap([Change("replace", b"top", entry)])
            assert (mounted.path / "top").read_bytes() == b"%d" % number
        with pytest.raises(BadChange, match="it isn't there"):
            connection.remap([Change("remove", b"none")])
        # Others come in between, and nobody has to be quick.
        remap(mounted, Change("remove", b"top"))
        assert connection.remap([Change("add", b"top", entries[0])]) <= 1
        assert (mounted.path / "top").read_bytes() == b"0"
        with control.steer(mounted.path) as other:
            assert other.call("statistics")["pid"] == mounted.pid
        mounted.unmount()
        with pytest.raises(MountError):
            connection.remap([Change("remove", b"top")])
    with pytest.raises(NotMounted):
        control.steer(mounted.path)


def test_many_directories_go_with_what_was_put_into_them(mounts: Mounts, engine: str) -> None:
    count = 3000
    mounted = mounts.mount(mounts.add_files({f"d{number:04}/f": b"x" for number in range(count)}), engine)
    entry = blob(mounts, b"new", b"new")
    remap(mounted, *[Change("add", b"d%04d/new" % number, entry) for number in range(count)])
    assert len(os.listdir(mounted.path / "d0007")) == 2
    remap(mounted, *[Change("remove", b"d%04d" % number) for number in range(count - 1)])
    assert names(mounted.path) == [f"d{count - 1:04}"]
    assert names(mounted.path / f"d{count - 1:04}") == ["f", "new"]


def test_mounts_that_can_not_be_steered_say_so(mounts: Mounts) -> None:
    mounts.requires.admin()
    root = mounts.add_files(FILES)
    whole = mounts.mount(root, "kernel")
    with pytest.raises(BadChange, match="--engine passthrough"):
        control.steer(whole.path)
    mounts.blob(b"top").unlink()
    mounted = mounts.mount(root, "kernel")
    with pytest.raises(BadChange, match="--engine passthrough"):
        remap(mounted, Change("remove", b"top"))


def test_changes_survive_their_json() -> None:
    digest = DigestFunction.SHA256.of(b"x")
    entries: list[Entry] = [
        FileEntry(b"\xff", digest, True, 5),
        DirectoryEntry(b"\xff", digest),
        SymlinkEntry(b"\xff", b"\xfe", None),
        ReferenceEntry(b"\xff", b"/\xfd", Stamp(1, 2, 3, 4, 5), False),
    ]
    changes = [*(Change("add", b"a/\xff", entry) for entry in entries), Change("remove", b"a/\xff")]
    assert decode_changes(encode_changes(changes)) == changes


_FILE = {"op": "add", "path": "x", "executable": True}


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        3,
        [3],
        [{}],
        [{"op": "add", "path": "x"}],
        [{"op": "remove", "path": "x", "symlink": "y", "mtime_ns": None}],
        [{"op": "burn", "path": "x"}],
        [{**_FILE, "file": "no digest", "mtime_ns": None}],
        [{"op": "add", "path": "x", "symlink": "", "mtime_ns": None}],
        [{**_FILE, "reference": "/x", "stamp": [1, 2]}],
    ],
    ids=repr,
)
def test_what_are_no_changes_is_refused(wrong: object) -> None:
    with pytest.raises(BadChange):
        decode_changes(wrong)


@pytest.fixture
def steered(store: Store) -> tuple[SteeredTree, Digest]:
    """A tree without a mount, {d: {f}}, and the digest of d."""
    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, DigestFunction.BLAKE3)
        empty = builder.finish(builder.add_directory([]))
        file = FileEntry(b"f", ingest.add_bytes(b"f", DigestFunction.BLAKE3), False)
        inner = builder.add_directory([file])
        root = builder.finish(builder.add_directory([DirectoryEntry(b"d", inner)]))
    return SteeredTree(store.index, ProjectedTree(store.index, root), empty), inner


def test_ids_are_not_used_again_and_what_is_forgotten_is_dropped(steered: tuple[SteeredTree, Digest]) -> None:
    tree, inner = steered
    [stale] = tree.apply([Change("add", b"g", DirectoryEntry(b"g", inner))])
    graft = tree.lookup(ROOT, b"g")
    assert graft is not None and stale.retired is None
    file = tree.lookup(graft.id, b"f")
    assert file is not None
    assert tree.path_of(file.id) == b"g/f"
    assert tree.parent_of(file.id) == graft.id and tree.parent_of(graft.id) == ROOT
    [stale] = tree.apply([Change("remove", b"g")])
    assert stale.retired == graft.id
    assert tree.get_node(file.id) == file, "somebody may have it open"
    tree.tell(graft.id)
    tree.forget(file.id, 1)
    assert tree.get_node(file.id) == file
    tree.forget(graft.id, 1)
    with pytest.raises(NoSuchNode):
        tree.get_node(file.id)
    assert list(tree.dropped) == [graft.id]
    tree.apply([Change("add", b"g", DirectoryEntry(b"g", inner))])
    again = tree.lookup(ROOT, b"g")
    assert again is not None and again.id > file.id


def test_what_was_looked_up_stays_until_all_its_lookups_are_forgotten(steered: tuple[SteeredTree, Digest]) -> None:
    """A name that the kernel doesn't have any more may still be on its way to an open."""
    tree, inner = steered
    tree.apply([Change("add", b"g", DirectoryEntry(b"g", inner))])
    graft = tree.lookup(ROOT, b"g")
    assert graft is not None
    [inside] = [node.id for _, _, node in tree.list_directory(graft.id, 0)]
    for _ in tree.list_plus(graft.id, 0):
        break  # no room for it: it isn't counted
    assert [node.id for _, _, node in tree.list_plus(graft.id, 0)] == [inside]
    assert tree.lookup(graft.id, b"f") is not None
    assert tree.lookup(ROOT, b"d") is not None, "what was mounted isn't counted"
    tree.forget(graft.id, 1)
    tree.forget(inside, 1)
    tree.apply([Change("remove", b"g")])
    tree.forget(inside, 1)
    assert not tree.dropped, "the kernel may look it up until it is told"
    tree.tell(graft.id)
    assert list(tree.dropped) == [graft.id]
    tree.apply([Change("add", b"g", DirectoryEntry(b"g", inner))])
    graft = tree.lookup(ROOT, b"g")
    assert graft is not None
    tree.apply([Change("remove", b"g")])
    tree.tell(graft.id)
    assert tree.get_node(graft.id) == graft
    tree.forget(graft.id, 1)
    with pytest.raises(NoSuchNode):
        tree.get_node(graft.id)


def test_what_was_put_below_a_directory_goes_with_it(steered: tuple[SteeredTree, Digest]) -> None:
    tree, inner = steered
    tree.apply([Change("add", b"d/g", DirectoryEntry(b"g", inner)), Change("add", b"d/g/s", SymlinkEntry(b"s", b"x"))])
    stale = tree.apply([Change("remove", b"d")])
    retired = {item.retired for item in stale if item.retired is not None}
    assert len(retired) == 2
    for first in retired:
        tree.tell(first)
    assert set(tree.dropped) == retired


def test_what_goes_twice_in_a_step_is_told_once(store: Store) -> None:
    """Something is taken away, and then what it was in: the kernel needs no second notification of it."""
    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, DigestFunction.BLAKE3)
        empty = builder.finish(builder.add_directory([]))
        file = FileEntry(b"f", ingest.add_bytes(b"f", DigestFunction.BLAKE3), False)
        inner = builder.add_directory([DirectoryEntry(b"d", builder.add_directory([file]))])
        root = builder.finish(builder.add_directory([DirectoryEntry(b"p", inner)]))
    tree = SteeredTree(store.index, ProjectedTree(store.index, root), empty)
    tree.apply([Change("add", b"p/d/s", SymlinkEntry(b"s", b"x"))])
    stale = tree.apply([Change("remove", b"p/d"), Change("remove", b"p")])
    assert len(stale) == len(set(stale)) == 3
    again = tree.apply([Change("add", b"p/d/s", SymlinkEntry(b"s", b"x"))])
    assert all(item.retired is None for item in again)


def test_a_bad_name_is_the_stores_error(steered: tuple[SteeredTree, Digest]) -> None:
    with pytest.raises(BadName):
        steered[0].apply([Change("remove", b"a/./b")])
