"""The cold tier: what moves there, that it comes back right, and that nothing is lost on the way."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from store.digest import Digest, DigestFunction
from store.errors import MissingBlob
from store.importing import ScanOptions
from store.layout import blob_path
from store.repository import Store
from store.trees import find_directory
from tests.conftest import Requirements, set_age

BLAKE3, SHA256 = DigestFunction.BLAKE3, DigestFunction.SHA256
SECONDS = 30


def add(store: Store, content: bytes, *, age: int = 0, executable: bool = False) -> Digest:
    with store.ingest() as ingest:
        digest = ingest.add_bytes(content, BLAKE3, executable=executable)
    set_age(store, digest, age)
    return digest


def hot(store: Store, digest: Digest) -> Path:
    return store.layout.blobs / blob_path(digest)


def fetch(store: Store, digest: Digest) -> None:
    store.hydrator.fetch(digest).result(SECONDS)


def read(store: Store, digest: Digest) -> bytes:
    with open(store.blobs.open(digest), "rb") as file:
        return file.read()


def is_cold(store: Store, digest: Digest) -> bool:
    return store.cold.has(digest) and not hot(store, digest).exists()


@pytest.mark.parametrize("content", [b"x", b"text " * 100_000, random.Random(1).randbytes(3_000_000)])
def test_a_blob_moves_and_comes_back_as_it_was(store: Store, content: bytes) -> None:
    digest = add(store, content, executable=True)
    moved = store.demoter.demote(0)
    assert (moved.blobs, moved.bytes) == (1, len(content))
    assert store.cold.count() == (1, moved.cold_bytes)
    assert is_cold(store, digest)
    with pytest.raises(MissingBlob):
        store.blobs.open(digest)
    fetch(store, digest)
    assert read(store, digest) == content
    assert hot(store, digest).stat().st_mode & 0o777 == 0o555
    assert store.cold.count() == (0, 0)
    assert list(store.layout.tmp.iterdir()) == []
    assert store.verifier.verify().is_clean


def test_a_cold_file_is_read_by_zstd_itself(store: Store, requires: Requirements) -> None:
    requires.programs("zstd")
    content = b"read me\n" * 1000
    digest = add(store, content)
    store.demoter.demote(0, level=19)
    done = subprocess.run(["zstd", "-dc", store.cold.path(digest)], capture_output=True, check=True)
    assert done.stdout == content
    listing = subprocess.run(["zstd", "-lv", store.cold.path(digest)], capture_output=True, text=True, check=True)
    assert "XXH64" in listing.stdout


def test_only_what_was_not_used_for_the_age_moves(store: Store) -> None:
    old, new, touched = add(store, b"old", age=5000), add(store, b"new", age=100), add(store, b"touched", age=5000)
    os.utime(hot(store, touched))
    assert store.demoter.demote(1000, dry_run=True).blobs == 1
    assert not store.cold.has(old)
    assert store.demoter.demote(1000).blobs == 1
    assert is_cold(store, old)
    assert read(store, new) == b"new" and read(store, touched) == b"touched"


def test_what_a_lease_reaches_stays_and_what_a_manifest_reaches_moves(store: Store, sample_tree: Path) -> None:
    tree = store.importer.from_directories([(b"", sample_tree)], ScanOptions())
    store.manifests.put("sample", tree.digest, "", replace=False)
    with store.leases.acquire("test", [tree.digest], "a test"):
        assert store.demoter.demote(0).blobs == 0
    moved = store.demoter.demote(0)
    assert moved.blobs > 200
    assert store.manifests.count_missing(tree.digest, "sample") == 0, "what is cold isn't missing"
    with store.index.view() as view:
        assert find_directory(view, tree.digest) is not None
    assert store.blobs.has(tree.digest), "Directory messages stay"
    assert store.collector.collect(0, 0, grace=0).removed_blobs == 0, "and the manifest holds what is cold"
    result = store.verifier.verify(rebuild=True)
    assert result.is_clean and result.cold == moved.blobs


def test_what_a_living_session_may_name_stays(store: Store) -> None:
    with store.ingest():
        digest = add(store, b"content")
        store.demoter.demote(0)
        assert read(store, digest) == b"content"


def test_a_blob_that_has_another_name_stays(store: Store, tmp_path: Path) -> None:
    digest = add(store, b"content")
    os.link(hot(store, digest), tmp_path / "checkout")
    assert store.demoter.demote(0).blobs == 0


def test_a_wrong_blob_goes_into_quarantine_and_not_into_the_tier(store: Store) -> None:
    contents = [b"a" * 1000, b"b" * 1000, b"c" * 1000]
    digests = [add(store, content) for content in contents]
    for digest, wrong in zip(digests, (b"x" * 1000, b"short", b"l" * 5000), strict=True):
        hot(store, digest).chmod(0o644)
        hot(store, digest).write_bytes(wrong)
    assert store.demoter.demote(0).blobs == 0
    assert store.cold.count() == (0, 0)
    assert len(list(store.layout.quarantine.iterdir())) == 3


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    if how == "bit":
        data[len(data) // 2] ^= 0x40
    elif how == "cut":
        del data[len(data) // 2 :]
    else:
        data[:] = b"no zstd frame"
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["bit", "cut", "no frame"])
def test_a_damaged_cold_file_is_never_served_and_put_aside(store: Store, how: str) -> None:
    digest = add(store, random.Random(2).randbytes(100_000))
    store.demoter.demote(0)
    damage(store.cold.path(digest), how)
    with pytest.raises(MissingBlob):
        fetch(store, digest)
    assert not hot(store, digest).exists()
    assert store.cold.count() == (0, 0)
    assert len(list(store.layout.quarantine.iterdir())) == 1


def test_another_blob_under_the_name_is_never_served(store: Store) -> None:
    digest, other = add(store, b"a" * 1000), add(store, b"b" * 1000)
    store.demoter.demote(0)
    shutil.copy(store.cold.path(other), store.cold.path(digest))
    with pytest.raises(MissingBlob):
        fetch(store, digest)
    assert not store.cold.path(digest).exists()
    fetch(store, other)


@pytest.mark.parametrize("how", ["bit", "cut", "no frame"])
def test_verify_puts_damaged_cold_files_aside(store: Store, how: str) -> None:
    digest = add(store, random.Random(2).randbytes(100_000))
    right = add(store, b"right" * 1000)
    store.demoter.demote(0)
    damage(store.cold.path(digest), how)
    result = store.verifier.verify()
    assert (result.cold, len(result.quarantined), result.is_clean) == (1, 1, False)
    assert digest.hex in result.quarantined[0]
    fetch(store, right)
    assert store.verifier.verify().is_clean


def test_a_digest_with_a_wrong_size_is_not_there(store: Store) -> None:
    digest = add(store, b"content" * 100)
    store.demoter.demote(0)
    wrong = digest._replace(size=5)
    assert not store.cold.has(wrong)
    with pytest.raises(MissingBlob):
        fetch(store, wrong)
    assert is_cold(store, digest)


def test_a_collection_counts_and_removes_cold_files(store: Store, tmp_path: Path) -> None:
    digests = [add(store, bytes((number,)) * 10_000, age=9000 - number) for number in range(10)]
    warm = add(store, b"warm" * 1000, age=8000)
    moved = store.demoter.demote(8500)
    assert moved.blobs == 10
    everything = store.collector.collect(1 << 40, 0)
    assert (everything.blobs_before, everything.bytes_before) == (11, moved.cold_bytes + 4000)
    result = store.collector.collect(4000, 4000)
    assert (result.removed_blobs, result.removed_bytes) == (10, moved.cold_bytes), "colder means earlier"
    assert store.cold.count() == (0, 0)
    assert read(store, warm) == b"warm" * 1000
    for digest in digests:
        with pytest.raises(MissingBlob):
            fetch(store, digest)


def test_the_cold_file_of_a_blob_that_was_added_again_goes(store: Store) -> None:
    digest = add(store, b"content" * 100)
    store.demoter.demote(0)
    add(store, b"content" * 100)
    assert store.cold.has(digest) and hot(store, digest).exists()
    assert store.demoter.demote(1000).superfluous == 1
    assert not store.cold.has(digest)
    assert read(store, digest) == b"content" * 100


def _move_to_and_fro(root: Path, digests: list[Digest]) -> None:
    chance = random.Random(os.getpid())
    with Store.open(root) as store:
        while True:
            store.demoter.demote(0)
            for digest in chance.sample(digests, len(digests) // 2):
                store.hydrator.fetch(digest)
            fetch(store, chance.choice(digests))


@pytest.mark.parametrize("seed", range(3))
def test_kills_while_blobs_move_lose_none(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    root = tmp_path / "store"
    contents = [chance.randbytes(chance.randrange(1, 5000)) * 10 for _ in range(60)]
    with Store.open(root) as store, store.ingest() as ingest:
        digests = [ingest.add_stream(io.BytesIO(content), chance.choice((BLAKE3, SHA256))) for content in contents]
    moved = 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                _move_to_and_fro(root, digests)
            os._exit(1)
        time.sleep(chance.random() * 0.25)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself: what it was doing failed"
        with Store.open(root) as store:
            assert os.listdir(root / "tmp") == []
            moved += store.cold.count()[0]
            lost = [digest for digest in digests if not hot(store, digest).exists() and not store.cold.has(digest)]
            assert not lost
            for digest in chance.sample(digests, 5):
                fetch(store, digest)
                assert digest.function.of(read(store, digest)) == digest
    assert moved, "no child lived long enough to move anything"
    with Store.open(root) as store:
        result = store.verifier.verify()
        assert not result.quarantined and not result.lost
        for digest in digests:
            fetch(store, digest)
            assert digest.function.of(read(store, digest)) == digest


def test_two_processes_that_move_to_and_fro_lose_nothing(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with Store.open(root) as store:
        digests = [add(store, b"%d" % number * 500) for number in range(20)]
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                _move_to_and_fro(root, digests)
            os._exit(1)
        children.append(child)
    time.sleep(1.5)
    ended = [os.waitpid(child, os.WNOHANG)[0] for child in children]
    for child, gone in zip(children, ended, strict=True):
        if not gone:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert ended == [0, 0], "a child ended by itself: a blob was lost, or something failed"
    with Store.open(root) as store:
        for digest in digests:
            fetch(store, digest)
            assert digest.function.of(read(store, digest)) == digest
