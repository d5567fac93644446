"""Garbage collection and verification: what goes, what stays, and what is found."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from store.digest import Digest, DigestFunction
from store.errors import StoreUnusable
from store.gc import GRACE_SECONDS, Collected
from store.importing import ScanOptions
from store.index import Table
from store.layout import blob_path
from store.repository import Store
from store.sessions import SKEW_SECONDS, Session
from store.trees import Directory, find_directory
from store.unfinished import UNFINISHED_SECONDS
from tests.conftest import set_age

BLAKE3 = DigestFunction.BLAKE3
SIZE = 1000


def _add(store: Store, number: int, age: int) -> Digest:
    with store.ingest() as ingest:
        digest = ingest.add_bytes(bytes((number,)) * SIZE, BLAKE3)
    set_age(store, digest, age)
    return digest


def _tree(store: Store, top: Path, age: int = 100_000) -> Directory:
    top.mkdir()
    (top / "file").write_bytes(b"f" * SIZE)
    (top / "sub").mkdir()
    (top / "sub" / "file").write_bytes(b"g" * SIZE)
    tree = store.importer.from_directories([(b"", top)], ScanOptions())
    with store.index.view() as view:
        keys = [key for key, _ in view.scan(Table.BLOBS)]
    for key in keys:
        set_age(store, Digest.from_key(key, 0), age)
    return tree


def _collect(
    store: Store, high: int = 0, low: int = 0, *, grace: int = GRACE_SECONDS, dry_run: bool = False
) -> Collected:
    return store.collector.collect(high, low, grace=grace, dry_run=dry_run)


def test_the_least_recently_used_go_until_the_low_water_mark(store: Store) -> None:
    digests = [_add(store, number, age=100_000 - number * 1000) for number in range(10)]
    assert _collect(store, 10 * SIZE, 0).removed_blobs == 0  # not above the high water mark
    result = _collect(store, 9 * SIZE, 4 * SIZE)
    assert (result.removed_blobs, result.removed_bytes, result.bytes_after) == (6, 6 * SIZE, 4 * SIZE)
    assert store.blobs.missing(digests) == digests[:6]
    assert len(list(store.blobs.files())) == 4
    assert store.verifier.verify().is_clean


def test_what_was_used_within_the_grace_period_stays(store: Store) -> None:
    old, new = _add(store, 1, age=7200), _add(store, 2, age=60)
    _collect(store)
    assert store.blobs.missing([old, new]) == [old]


def test_a_file_touched_by_others_counts_as_used(store: Store) -> None:
    digests = [_add(store, number, age=100_000) for number in range(2)]
    os.utime(store.layout.blobs / blob_path(digests[0]))
    _collect(store)
    assert store.blobs.missing(digests) == [digests[1]]


def test_a_dry_run_removes_nothing(store: Store) -> None:
    digest = _add(store, 1, age=100_000)
    assert _collect(store, dry_run=True).removed_blobs == 1
    assert store.blobs.has(digest)


@pytest.mark.parametrize("holder", ["manifest", "lease"])
def test_what_a_manifest_or_a_lease_reaches_stays_until_it_ends(store: Store, tmp_path: Path, holder: str) -> None:
    tree = _tree(store, tmp_path / "top")
    end: Callable[[], object]
    if holder == "manifest":
        store.manifests.put("name", tree.digest, "", replace=False)
        end = partial(store.manifests.remove, "name")
    else:
        end = store.leases.acquire("test", [tree.digest], "a test").release
    result = _collect(store)
    assert result.removed_blobs == 0
    assert result.pinned_bytes >= 2 * SIZE
    assert store.manifests.count_missing(tree.digest) == 0
    end()
    assert _collect(store).removed_bytes >= 2 * SIZE
    assert list(store.blobs.files()) == []
    with store.index.view() as view:
        assert find_directory(view, tree.digest) is None
        assert view.count(Table.ENTRIES) == view.count(Table.STAMPS) == 0


def test_what_is_added_to_a_lease_stays_until_that_ends(store: Store, tmp_path: Path) -> None:
    tree = _tree(store, tmp_path / "top")
    blobs = [_add(store, number, age=100_000) for number in range(3)]
    lease = store.leases.acquire("test", [], "a test")
    lease.add([tree.digest])
    lease.add(blobs[:2])
    [info] = store.leases.living()
    assert info.roots == (tree.digest, *blobs[:2])
    assert _collect(store).removed_blobs == 1
    assert store.manifests.count_missing(tree.digest) == 0
    assert store.blobs.missing(blobs) == blobs[2:]
    lease.release()
    _collect(store)
    assert list(store.blobs.files()) == []


def test_the_lease_of_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    root = tmp_path / "other"
    with Store.open(root) as store:
        tree = _tree(store, tmp_path / "top")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        Store.open(root).leases.acquire("test", [tree.digest], "a child")
        os.write(writing, b"x")
        time.sleep(30)
        os._exit(0)
    try:
        os.read(reading, 1)
        with Store.open(root) as store:
            assert [lease.holder for lease in store.leases.living()] == ["a child"]
            assert _collect(store).removed_blobs == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    with Store.open(root) as store:
        assert store.leases.living() == []
        assert _collect(store).removed_bytes >= 2 * SIZE
        assert os.listdir(store.layout.leases) == []


def test_what_a_living_session_has_seen_stays(store: Store) -> None:
    digest = _add(store, 1, age=100_000)
    with store.ingest() as ingest:
        assert ingest.add_bytes(b"\x01" * SIZE, BLAKE3) == digest
        ingest.flush()
        time.sleep(1.1)
        _collect(store, grace=0)
        assert store.blobs.has(digest)
    time.sleep(1.1)
    _collect(store, grace=0)
    assert not store.blobs.has(digest)


def test_a_blob_collected_between_being_seen_and_the_flush_is_added_again(store: Store) -> None:
    digest = _add(store, 1, age=100_000)
    with store.ingest() as ingest:
        ingest.add_bytes(b"\x01" * SIZE, BLAKE3)
        _collect(store)
        assert not store.blobs.has(digest)
    assert store.blobs.has(digest)


def test_files_without_rows_are_collected_too(store: Store) -> None:
    digest = _add(store, 1, age=100_000)
    store.index.update(lambda change: change.delete(Table.BLOBS, digest.key))
    assert _collect(store).removed_blobs == 1
    assert list(store.blobs.files()) == []


# Clocks that are set back: what was stamped before lies in the future


@pytest.mark.parametrize("only_its_file", [False, True])
def test_what_was_used_in_the_future_goes_neither_at_once_nor_never(
    store: Store, monkeypatch: pytest.MonkeyPatch, only_its_file: bool
) -> None:
    digests = [_add(store, number, age=-100_000 - number) for number in range(5)]
    if only_its_file:
        for number, digest in enumerate(digests):
            set_age(store, digest, 100_000)
            later = time.time() + 100_000 + number
            os.utime(store.layout.blobs / blob_path(digest), (later, later))
    action = DigestFunction.SHA256.of(b"an action").key
    store.actions.write(action, b"r" * SIZE)
    store.actions.touch(action, time.time() + 100_000)
    assert _collect(store, grace=60).removed_blobs == 0
    assert _collect(store, grace=60).removed_blobs == 0
    # What is written now is newer than all of that.
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 50)
    new = _add(store, 9, age=0)
    monkeypatch.setattr(time, "time", lambda: now + 100)
    assert _collect(store, grace=60).removed_blobs == 6, "their age has begun to run"
    assert store.blobs.missing([*digests, new]) == digests
    assert store.actions.read(action) is None


def test_a_dry_run_sets_nothing_back(store: Store) -> None:
    digest = _add(store, 1, age=-100_000)
    path = store.layout.blobs / blob_path(digest)
    before = path.stat().st_mtime
    _collect(store, dry_run=True)
    assert path.stat().st_mtime == before > time.time() + SKEW_SECONDS


def test_a_session_that_began_in_the_future_spares_everything(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _add(store, 1, age=100_000)
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**14)
    session = Session(store.layout)
    monkeypatch.undo()
    try:
        assert _collect(store).removed_blobs == 0
    finally:
        session.close()
    assert _collect(store).removed_blobs == 1
    assert not store.blobs.has(old)


def test_the_lease_of_a_living_holder_holds_whatever_the_clock_says(store: Store, tmp_path: Path) -> None:
    tree = _tree(store, tmp_path / "tree")
    with store.leases.acquire("mount", [tree.digest], "a test"):
        for ahead in (-(10**6), 10**6):
            for digest in _in(store):
                set_age(store, digest, ahead)
            assert _collect(store, grace=0).removed_blobs == 0
        assert [lease.roots for lease in store.leases.living()] == [(tree.digest,)]


def _in(store: Store) -> list[Digest]:
    with store.index.view() as view:
        return [Digest.from_key(key, 0) for key, _ in view.scan(Table.BLOBS)]


# What Bazel leaves in its disk cache when it is killed


def test_unfinished_files_of_a_killed_bazel_go_after_some_hours(store: Store) -> None:
    def make(name: str, age: int) -> Path:
        path = store.layout.blobs / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
        return path

    uuid = "11f6fb5a-17d9-41fd-8bb4-d7bf0caba47"
    old = [make(f"{place}{uuid}{number}", UNFINISHED_SECONDS + 60) for place in ("", "tmp/") for number in range(2)]
    young = [make(f"{place}{uuid}a", UNFINISHED_SECONDS - 60) for place in ("", "tmp/")]
    others = [make(name, 10**6) for name in ("README", "tmp/other", "gc/lock")]
    store.collector.collect(1 << 30, 0, dry_run=True)
    assert all(path.exists() for path in old)
    store.collector.collect(1 << 30, 0)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in young + others)


# Verification


def _file(store: Store, digest: Digest) -> Path:
    path = store.layout.blobs / blob_path(digest)
    path.chmod(0o644)
    return path


def test_verify_puts_wrong_blobs_aside_and_drops_lost_ones(store: Store) -> None:
    right, wrong, lost = (_add(store, number, age=0) for number in range(3))
    _file(store, wrong).write_bytes(b"x" * SIZE)
    _file(store, lost).unlink()
    result = store.verifier.verify()
    assert result.quarantined == [str(wrong)]
    assert result.lost == [str(lost).partition("/")[0]]
    assert not result.is_clean
    assert store.blobs.missing([right, wrong, lost]) == [wrong, lost]
    assert [path.read_bytes() for path in store.layout.quarantine.iterdir()] == [b"x" * SIZE]
    assert store.verifier.verify().is_clean


def test_verify_counts_what_a_manifest_lacks(store: Store, tmp_path: Path) -> None:
    tree = _tree(store, tmp_path / "top")
    store.manifests.put("name", tree.digest, "", replace=False)
    _file(store, BLAKE3.of(b"g" * SIZE)).unlink()
    result = store.verifier.verify()
    assert result.incomplete == {"name": 1}
    assert store.manifests.count_missing(tree.digest, "name") == 1


@pytest.mark.parametrize("lost", [False, True])
def test_the_index_is_rebuilt_from_the_directories(tmp_path: Path, sample_tree: Path, lost: bool) -> None:
    root = tmp_path / "store"
    with Store.open(root) as store:
        tree = store.importer.from_directories([(b"", sample_tree)], ScanOptions(keep_mtime=True))
        store.manifests.put("sample", tree.digest, "a test", replace=False)
        rows = store.index.statistics()["blobs"]
    if lost:
        for path in (root / "index").iterdir():
            path.unlink()
    with Store.open(root) as store:
        result = store.verifier.verify(rebuild=not lost)
        assert result.is_clean
        assert (result.adopted, store.index.statistics()["blobs"]) == (rows, rows)
        assert store.manifests.get("sample").root == tree.digest
        with store.index.view() as view:
            again = find_directory(view, tree.digest)
        assert again is not None
        assert again[1:] == tree[1:]


def test_rebuilding_is_refused_while_a_lease_lives(store: Store, tmp_path: Path) -> None:
    tree = _tree(store, tmp_path / "top")
    with (
        store.leases.acquire("mount", [tree.digest], "a test"),
        pytest.raises(StoreUnusable, match="in use by mount a test: unmount first"),
    ):
        store.verifier.verify(rebuild=True)


def test_a_manifest_file_that_cannot_be_read_is_named_and_the_others_are_kept(store: Store, tmp_path: Path) -> None:
    tree = _tree(store, tmp_path / "top")
    store.manifests.put("good", tree.digest, "", replace=False)
    (store.layout.manifests / "bad.json").write_bytes(b"\0\0")
    result = store.verifier.verify(rebuild=True)
    assert result.broken.keys() == {"bad"}
    assert store.manifests.get("good").root == tree.digest


def test_a_manifest_whose_messages_are_gone_is_broken_and_says_which(store: Store, tmp_path: Path) -> None:
    tree = _tree(store, tmp_path / "top")
    store.manifests.put("name", tree.digest, "", replace=False)
    _file(store, tree.digest).write_bytes(b"x")
    result = store.verifier.verify(rebuild=True)
    assert tree.digest.hex in result.broken["name"]
