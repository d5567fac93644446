"""Opening blobs: verified before the first use, and wrong ones put aside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from store.digest import Digest, DigestFunction
from store.errors import CorruptBlob, MissingBlob
from store.index import Table
from store.layout import blob_path
from store.repository import Store

BLAKE3 = DigestFunction.BLAKE3
FUNCTIONS = pytest.mark.parametrize("function", DigestFunction)


def _put_file(store: Store, digest: Digest, data: bytes, mode: int = 0o644) -> Path:
    """A blob's file without a row, as Bazel or a crash leaves it."""
    path = store.layout.blobs / blob_path(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def _add(store: Store, data: bytes) -> Digest:
    with store.ingest() as ingest:
        return ingest.add_bytes(data, BLAKE3)


def _read(store: Store, digest: Digest) -> bytes:
    with open(store.blobs.open(digest), "rb") as file:
        return file.read()


@FUNCTIONS
def test_a_file_without_a_row_is_hashed_at_its_first_use_and_protected(store: Store, function: DigestFunction) -> None:
    digest = function.of(b"from Bazel")
    path = _put_file(store, digest, b"from Bazel", 0o755)
    assert not store.blobs.is_verified(digest)
    assert _read(store, digest) == b"from Bazel"
    assert store.blobs.is_verified(digest)
    assert path.stat().st_mode & 0o777 == 0o555


def test_a_wrong_file_without_a_row_goes_into_quarantine_and_is_never_read(store: Store) -> None:
    digest = BLAKE3.of(b"right")
    _put_file(store, digest, b"wrong")
    with pytest.raises(CorruptBlob, match="quarantine"):
        store.blobs.open(digest)
    with pytest.raises(MissingBlob):
        store.blobs.open(digest)
    (kept,) = store.layout.quarantine.iterdir()
    assert kept.read_bytes() == b"wrong"
    assert _add(store, b"right") == digest
    assert _read(store, digest) == b"right"


def test_a_blob_that_was_cut_short_is_noticed_when_it_is_opened(store: Store) -> None:
    digest = _add(store, b"whole")
    path = store.layout.blobs / blob_path(digest)
    path.chmod(0o644)
    path.write_bytes(b"who")
    with pytest.raises(CorruptBlob, match="had 3 bytes"):
        store.blobs.open(digest)
    assert not store.blobs.has(digest)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_file_is_never_opened_as_a_blob(store: Store, tmp_path: Path, kind: str) -> None:
    digest = BLAKE3.of(b"data")
    path = _put_file(store, digest, b"")
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(b"data")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert not store.blobs.has(digest)
    with pytest.raises((CorruptBlob, MissingBlob)):
        store.blobs.open(digest)


def test_quarantine_leaves_alone_what_was_published_after_the_wrong_file_was_looked_at(store: Store) -> None:
    digest = BLAKE3.of(b"right")
    wrong = _put_file(store, digest, b"wrong").stat()
    assert _add(store, b"right") == digest
    store.blobs.quarantine(digest, wrong)
    assert store.blobs.is_verified(digest)
    assert _read(store, digest) == b"right"


def test_a_lost_file_is_missing_and_adding_it_again_heals(store: Store) -> None:
    digest = _add(store, b"data")
    (store.layout.blobs / blob_path(digest)).unlink()
    assert _add(store, b"data") == digest  # the row alone is not believed
    assert _read(store, digest) == b"data"
    (store.layout.blobs / blob_path(digest)).unlink()
    with pytest.raises(MissingBlob):
        store.blobs.open(digest)
    assert store.blobs.missing([digest]) == [digest]


@FUNCTIONS
def test_the_empty_blob_is_always_there(store: Store, function: DigestFunction) -> None:
    empty = function.of(b"")
    assert store.blobs.has(empty)
    assert store.blobs.missing([empty]) == []
    assert _read(store, empty) == b""
    (store.layout.blobs / blob_path(empty)).unlink()
    assert _read(store, empty) == b""
    (store.layout.blobs / blob_path(empty)).unlink()
    assert store.verifier.verify().is_clean
    assert store.blobs.has_file(empty)
    assert (store.layout.blobs / blob_path(empty)).exists()


def test_nothing_else_of_no_size_is_there(store: Store) -> None:
    assert not store.blobs.has(Digest(BLAKE3, bytes(32), 0))


def test_a_digest_with_a_wrong_size_is_missing_and_says_why(store: Store) -> None:
    digest = _add(store, b"data")._replace(size=5)
    assert not store.blobs.has(digest)
    assert store.blobs.missing([digest]) == [digest]
    with pytest.raises(MissingBlob, match="with 4 bytes"):
        store.blobs.open(digest)


def test_strangers_among_the_blobs_are_passed_over(store: Store) -> None:
    digest = _add(store, b"data")
    shard = (store.layout.blobs / blob_path(digest)).parent
    (shard / "notes.txt").write_text("hello")
    (shard / ("ff" * 32 if shard.name != "ff" else "00" * 32)).write_text("in the wrong shard")
    (shard.parent / "README").write_text("hello")
    assert [hash_ for _, hash_, _ in store.blobs.files()] == [digest.hash]
    assert store.verifier.verify().is_clean


def test_rows_say_what_is_there(store: Store) -> None:
    digests = {_add(store, b"%d" % number) for number in range(5)}
    with store.index.view() as view:
        assert {key for key, _ in view.scan(Table.BLOBS)} == {digest.key for digest in digests}
