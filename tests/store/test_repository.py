"""Opening stores, naming trees, and several processes on one store at once."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from store.digest import Digest, DigestFunction
from store.errors import AlreadyExists, BadName, MissingManifest, NewerFormat, StoreError, StoreUnusable
from store.importing import ScanOptions
from store.repository import Store
from store.sessions import Session, living_sessions
from tests.conftest import Requirements

BLAKE3 = DigestFunction.BLAKE3


def _in_children(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in so many processes at once; all must succeed."""
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(number)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def test_a_store_is_made_where_there_is_nothing_and_found_again(tmp_path: Path) -> None:
    with Store.open(tmp_path / "a" / "b") as store:
        with store.ingest() as ingest:
            digest = ingest.add_bytes(b"data", BLAKE3)
    with Store.open(tmp_path / "a" / "b", create=False) as store:
        assert store.blobs.has(digest)
    assert {path.name for path in (tmp_path / "a" / "b" / "blobs").iterdir()} == {"blake3"}


def test_a_store_that_is_not_there_is_not_made_unasked(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match=r"there is no store in .*begins one"):
        Store.open(tmp_path / "store", create=False)
    assert not (tmp_path / "store").exists()


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreUnusable, match="is not empty and no store"):
        Store.open(tmp_path)
    assert os.listdir(tmp_path) == ["letter.txt"]


@pytest.mark.parametrize("marker", [b"casfs store 2\n", b"casfs store 999\n"])
def test_a_store_of_a_newer_format_says_so_and_stops(store: Store, marker: bytes) -> None:
    root = store.layout.root
    store.index.close()
    store.layout.marker.write_bytes(marker)
    with pytest.raises(NewerFormat, match=r"has format \d+, this casfs knows 1: use the newer casfs"):
        Store.open(root)


@pytest.mark.parametrize("marker", [b"", b"casfs store\n", b"\xff\xfe", b"casfs store 1"])
def test_a_marker_that_says_nothing_is_refused(store: Store, marker: bytes) -> None:
    store.index.close()
    store.layout.marker.write_bytes(marker)
    with pytest.raises(StoreUnusable, match=r"is .* a store"):
        Store.open(store.layout.root)


def test_a_store_with_a_part_missing_names_it(store: Store) -> None:
    store.index.close()
    store.layout.quarantine.rmdir()
    with pytest.raises(StoreUnusable, match=r"quarantine is missing"):
        Store.open(store.layout.root)


def test_an_unwritable_store_is_refused_with_what_to_do(requires: Requirements) -> None:
    requires.condition(os.geteuid() == 0, "being root, to become another user")
    # Not below tmp_path, which other users may not enter.
    with TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        root = Path(top) / "store"
        Store.open(root).close()

        def work(_: int) -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with pytest.raises(StoreUnusable, match="can't be written by this user; choose another with --store"):
                Store.open(root)
            with pytest.raises(StoreUnusable, match=r"can't make a store in .*Permission denied"):
                Store.open(Path(top) / "new")

        _in_children(1, work)


def test_litter_of_killed_processes_goes_at_the_next_start(store: Store, tmp_path: Path) -> None:
    root = store.layout.root
    (root / "tmp" / "123-abc").mkdir()
    (root / "tmp" / "123-abc" / "1").write_bytes(b"half a blob")
    (root / "tmp" / "format-17").write_bytes(b"")
    (root / "leases" / "0123456789abcdef").write_bytes(b"")
    store.close()
    living = Session(store.layout)
    try:
        with Store.open(root) as again:
            assert list((root / "tmp").iterdir()) == [living.directory]
            assert os.listdir(root / "leases") == []
            assert living_sessions(again.layout, clean=True) == [int(living.directory.name.partition("-")[0])]
    finally:
        living.close()
    assert os.listdir(root / "tmp") == []


# Names


def _tree(store: Store, *names: str) -> Digest:
    lines = ["casfs manifest 1 blake3\n", *(f"l\tx\t-\t{name}\n" for name in names)]
    return store.importer.from_text(lines, "text").digest


def test_names_are_kept_replaced_when_asked_and_removed(store: Store) -> None:
    one, two = _tree(store, "a"), _tree(store, "b")
    store.manifests.put("name", one, "a test", replace=False)
    with pytest.raises(AlreadyExists, match="--replace"):
        store.manifests.put("name", two, "", replace=False)
    assert store.manifests.get("name").root == one
    store.manifests.put("name", two, "", replace=True)
    assert [manifest.root for manifest in store.manifests.list()] == [two]
    store.manifests.remove("name")
    assert store.manifests.find("name") is None
    assert list(store.layout.manifests.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "a b", "x" * 201, "é", "a\n", "\udcff"])
def test_names_that_cannot_be_are_refused(store: Store, name: str) -> None:
    root = _tree(store, "a")
    with pytest.raises(BadName, match="can't be a manifest's name"):
        store.manifests.put(name, root, "", replace=False)
    assert store.manifests.find(name) is None


def test_a_missing_name_suggests_a_similar_one(store: Store) -> None:
    store.manifests.put("toolchain", _tree(store, "a"), "", replace=False)
    with pytest.raises(MissingManifest, match="did you mean 'toolchain'"):
        store.manifests.get("toolchian")
    with pytest.raises(MissingManifest, match="manifest list"):
        store.manifests.get("something")


def test_a_failed_naming_leaves_the_old_name_in_the_file_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = _tree(store, "a"), _tree(store, "b")
    store.manifests.put("name", one, "", replace=False)
    before = (store.layout.manifests / "name.json").read_bytes()
    update = store.index.update

    def fail(work: Callable[..., object]) -> None:
        def run_and_fail(change: object) -> None:
            work(change)
            raise StoreError("on purpose")

        update(run_and_fail)

    with monkeypatch.context() as patch:
        patch.setattr(store.index, "update", fail)
        with pytest.raises(StoreError, match="on purpose"):
            store.manifests.put("name", two, "", replace=True)
    assert (store.layout.manifests / "name.json").read_bytes() == before
    assert store.manifests.get("name").root == one


# Several processes


def test_processes_may_make_one_store_at_once(tmp_path: Path) -> None:
    _in_children(6, lambda _: Store.open(tmp_path / "store").close())
    with Store.open(tmp_path / "store", create=False) as store:
        assert store.verifier.verify().is_clean
    assert os.listdir(tmp_path / "store" / "tmp") == []


def test_processes_may_add_the_same_tree_at_once(tmp_path: Path, sample_tree: Path) -> None:
    root = tmp_path / "store"

    def work(number: int) -> None:
        with Store.open(root) as store:
            for _ in range(3):
                tree = store.importer.from_directories([(b"", sample_tree)], ScanOptions())
                store.manifests.put(f"tree-{number}", tree.digest, "", replace=True)
                assert store.manifests.count_missing(tree.digest) == 0

    _in_children(4, work)
    with Store.open(root) as store:
        manifests = store.manifests.list()
        assert len(manifests) == 4
        assert len({manifest.root for manifest in manifests}) == 1
        assert store.verifier.verify().is_clean
    assert os.listdir(root / "tmp") == []


def test_adding_and_collecting_at_once_loses_nothing_that_is_named(tmp_path: Path, sample_tree: Path) -> None:
    root = tmp_path / "store"

    def work(number: int) -> None:
        with Store.open(root) as store:
            for turn in range(8):
                if number == 0:
                    store.collector.collect(0, 0, grace=0)
                    continue
                tree = store.importer.from_directories([(b"", sample_tree)], ScanOptions())
                try:
                    store.manifests.put(f"tree-{number}-{turn}", tree.digest, "", replace=True)
                except MissingManifest:
                    continue  # collected before it was named, as no grace was given

    _in_children(3, work)
    with Store.open(root) as store:
        result = store.verifier.verify()
        assert not result.quarantined
        assert not result.lost
