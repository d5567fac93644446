"""What a cache server needs of the store: results of actions, presence, uploads in groups, a limit on the size."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from store import kernel
from store.action_cache import action_key
from store.blobs import BlobRow, put_rows, total_bytes
from store.digest import Digest, DigestFunction
from store.errors import BadDigest, DigestMismatch, MissingBlob, NoSpace, StoreError
from store.index import Change, Table
from store.layout import blob_path
from store.presence import Presence, WouldWait, as_name
from store.publication import Batch, Pending, Published, Publisher
from store.quota import Limits, Quota, Unlimited
from store.repository import Store
from store.uploads import Upload, Uploads
from tests.conftest import count_views, set_age

SHA256, BLAKE3 = DigestFunction.SHA256, DigestFunction.BLAKE3
HOUR = 3600


@pytest.fixture
def uploads(store: Store) -> Iterator[Uploads]:
    opened = store.uploads(Unlimited())
    yield opened
    opened.close()


def add(store: Store, *blobs: bytes, age: int = 0) -> list[Digest]:
    with store.ingest() as ingest:
        digests = [ingest.add_bytes(data, SHA256) for data in blobs]
    for digest in digests:
        if age:
            set_age(store, digest, age)
    return digests


def sum_of_rows(store: Store) -> int:
    """As `total_bytes` should say, counted anew."""
    with store.index.view() as view:
        return sum(int.from_bytes(value[:8], "little") for _, value in view.scan(Table.BLOBS))


# Results of actions


@pytest.mark.parametrize("function", [SHA256, BLAKE3])
def test_results_lie_where_bazel_looks_for_them(store: Store, function: DigestFunction) -> None:
    action = function.of(b"action")
    store.actions.write(action_key(action), b"result")
    prefix = "ac" if function is SHA256 else "blake3/ac"
    path = store.layout.blobs / prefix / action.hex[:2] / action.hex
    assert path.read_bytes() == b"result"
    path.write_bytes(b"by Bazel")
    assert store.actions.read(action_key(action)) == b"by Bazel"


def test_results_are_replaced_touched_and_removed(store: Store) -> None:
    key = action_key(SHA256.of(b"action"))
    assert store.actions.read(key) is None
    assert not store.actions.touch(key, 5)
    assert not store.actions.remove(key)
    large = os.urandom(200_000)
    store.actions.write(key, large)
    assert store.actions.read(key) == large
    store.actions.write(key, b"")
    assert store.actions.read(key) == b""
    assert store.actions.touch(key, 5)
    assert store.actions.used(key) == 5
    assert store.actions.remove(key)
    assert store.actions.read(key) is None


def test_no_instance_has_the_key_of_another() -> None:
    actions = [SHA256.of(b"one"), SHA256.of(b"two"), BLAKE3.of(b"one")]
    keys = {action_key(action, instance) for action in actions for instance in ("", "a", "b", "a/b")}
    assert len(keys) == 12
    assert action_key(actions[0]) == actions[0].key


def test_a_result_that_is_no_file_of_ours_is_none(store: Store) -> None:
    key = action_key(SHA256.of(b"action"))
    store.actions.write(key, b"x")
    path = next(path for path in (store.layout.blobs / "ac").rglob("*") if path.is_file())
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert store.actions.read(key) is None


def test_collections_count_results_and_take_the_oldest_first(store: Store) -> None:
    now = time.time()
    keys = [action_key(SHA256.of(b"%d" % number)) for number in range(4)]
    for number, key in enumerate(keys):
        store.actions.write(key, bytes(1000))
        store.actions.touch(key, now - (10 - number) * HOUR)
    [blob] = add(store, bytes(1000), age=5 * HOUR)
    found = store.collector.collect(4000, 2000)
    assert (found.blobs_before, found.bytes_before, found.removed_blobs) == (5, 5000, 3)
    assert [store.actions.read(key) is not None for key in keys] == [False, False, False, True]
    assert store.blobs.has(blob)


def test_a_result_goes_before_the_blobs_it_names(store: Store) -> None:
    then = int(time.time()) - 2 * HOUR
    [blob] = add(store, bytes(1000), age=2 * HOUR)
    os.utime(store.layout.blobs / blob_path(blob), (then, then))
    key = action_key(SHA256.of(b"action"))
    store.actions.write(key, bytes(1000))
    store.actions.touch(key, then)
    store.index.update(lambda change: _set_used(change, blob, then))
    store.collector.collect(1500, 1500)
    assert store.actions.read(key) is None
    assert store.blobs.has(blob)


def _set_used(change: Change, digest: Digest, used: int) -> None:
    put_rows(change, [(digest.key, BlobRow(digest.size, used, False))])


# Presence


def names(*digests: Digest) -> list[tuple[DigestFunction, str, int]]:
    return [as_name(digest) for digest in digests]


def test_presence_knows_what_is_there(store: Store) -> None:
    [here] = add(store, b"here")
    absent, wrong = SHA256.of(b"absent"), here._replace(size=3)
    asked = names(here, absent, wrong, SHA256.of(b""), BLAKE3.of(b"here"))
    for _ in range(2):
        assert store.presence.find_absent(asked) == names(absent, wrong, BLAKE3.of(b"here"))
    with pytest.raises(BadDigest):
        store.presence.find_absent([(SHA256, "..", 1)])
    with pytest.raises(BadDigest):
        store.presence.find_absent([(SHA256, "ab" * 32, -1)])


def test_to_be_asked_for_is_to_be_used(store: Store) -> None:
    [asked, other] = add(store, bytes(1000), bytes(1001), age=5 * HOUR)
    store.presence.find_absent(names(asked))
    store.collector.collect(0, 0, grace=60)
    assert store.blobs.has(asked)
    assert not store.blobs.has(other)
    assert store.presence.find_absent(names(asked, other)) == names(other)


def test_to_be_opened_is_to_be_used(store: Store) -> None:
    [opened, unnoted] = add(store, bytes(1000), bytes(1001), age=5 * HOUR)
    [name, other] = names(opened, unnoted)
    vouched = store.presence.vouch(name)
    assert vouched is not None
    assert not store.presence.remembers(name), "its file may be gone"
    descriptor = store.blobs.open(opened)
    store.presence.note_open(name, descriptor, vouched)
    os.close(descriptor)
    assert store.presence.remembers(name)
    assert store.presence.vouch(other) is not None
    store.collector.collect(0, 0, grace=60)
    assert store.blobs.has(opened)
    assert store.presence.vouch(other) is None


def test_what_is_removed_between_two_steps_is_not_taken_for_open(store: Store) -> None:
    [removed, other] = add(store, bytes(1000), bytes(1001), age=5 * HOUR)
    [name, unrelated] = names(removed, other)
    vouched = store.presence.vouch(name)
    assert vouched is not None
    descriptor = store.blobs.open(removed)
    store.collector.collect(0, 0)
    # Another thread's question, which forgets all that was known.
    assert not store.presence.remembers(unrelated)
    assert store.presence.vouch(unrelated) is None
    store.presence.note_open(name, descriptor, vouched)
    os.close(descriptor)
    assert store.presence.find_absent([name]) == [name]


def test_what_is_removed_is_forgotten_at_once(store: Store) -> None:
    [digest] = add(store, bytes(1000))
    assert store.presence.find_absent(names(digest)) == []
    before = store.presence.generation()
    set_age(store, digest, 5 * HOUR)
    store.collector.collect(0, 0)
    assert store.presence.generation() != before
    assert store.presence.find_absent(names(digest)) == names(digest)


def test_a_lot_of_unknown_blobs_is_not_answered_where_nothing_may_wait(store: Store) -> None:
    many = names(*(SHA256.of(b"%d" % number) for number in range(300)))
    with pytest.raises(WouldWait):
        store.presence.find_absent(many, may_wait=False)
    assert store.presence.find_absent(many[:10], may_wait=False) == many[:10]


def test_a_file_without_a_row_is_hashed_where_waiting_does_no_harm(store: Store) -> None:
    digest = SHA256.of(b"put there by Bazel")
    path = store.layout.blobs / blob_path(digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"put there by Bazel")
    with pytest.raises(WouldWait):
        store.presence.find_absent(names(digest), may_wait=False)
    assert store.presence.vouch(*names(digest)) is None
    assert store.presence.find_absent(names(digest)) == []
    assert store.blobs.is_verified(digest)


def test_presence_takes_one_view_however_many_it_is_asked_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = add(store, *(b"%d" % number for number in range(200)))
    presence = Presence(store.index, store.blobs, store.cold)
    views = count_views(store, monkeypatch)
    presence.find_absent(names(*digests))
    presence.find_absent(names(*digests))
    assert len(views) == 2


def test_removals_are_counted_once_a_millisecond_for_all_that_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = add(store, *(b"%d" % number for number in range(200)), age=5 * HOUR)
    presence = Presence(store.index, store.blobs, store.cold)
    presence.note(names(*digests))
    now = time.monotonic()
    monkeypatch.setattr("store.presence.time.monotonic", lambda: now)
    views = count_views(store, monkeypatch)
    for _ in range(2):
        now += 0.001
        assert all(presence.vouch(name) is not None for name in names(*digests))
    assert len(views) == 2
    monkeypatch.undo()
    store.collector.collect(0, 0)
    now += 0.001
    monkeypatch.setattr("store.presence.time.monotonic", lambda: now)
    assert all(presence.vouch(name) is None for name in names(*digests))


def test_what_is_stored_is_remembered_though_nothing_was_ever_asked(store: Store) -> None:
    [digest] = add(store, bytes(1000))
    presence = Presence(store.index, store.blobs, store.cold)
    presence.note(names(digest))
    assert presence.remembers(*names(digest))
    assert presence.find_absent(names(digest)) == []
    assert presence.remembers(*names(digest))


def test_what_is_remembered_is_bounded_where_nobody_asks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("store.presence.time.monotonic", lambda: now)
    stored = [(SHA256, f"{number:064x}", 1) for number in range(1_000_000)]
    for start in range(0, len(stored), 1000):
        store.presence.note(stored[start : start + 1000])
    assert 50_000 < sum(map(store.presence.remembers, stored)) <= 2 * 51_000


# Uploads


def test_an_upload_is_durable_when_it_ends(store: Store, uploads: Uploads) -> None:
    data = os.urandom(100_000)
    digest = BLAKE3.of(data)
    upload = uploads.begin(digest)
    for at in range(0, len(data), 30_000):
        upload.write(data[at : at + 30_000])
    assert not store.blobs.has(digest)
    upload.finish()
    assert store.blobs.is_verified(digest)
    assert (store.layout.blobs / blob_path(digest)).read_bytes() == data


def write_and_finish(upload: Upload, data: bytes) -> None:
    upload.write(data)
    upload.finish()


def test_wrong_uploads_leave_nothing(store: Store, uploads: Uploads) -> None:
    digest = SHA256.of(b"right")
    for wrong in (b"wrong", b"right and more", b"r"):
        upload = uploads.begin(digest)
        with pytest.raises(DigestMismatch):
            write_and_finish(upload, wrong)
        upload.discard()
        upload.discard()
    assert not store.blobs.has(digest)
    assert not [path for path in store.layout.tmp.rglob("*") if path.is_file()]


def test_concurrent_uploads_of_one_blob_store_it_once(store: Store, uploads: Uploads) -> None:
    data = os.urandom(300_000)
    digest = SHA256.of(data)
    several = [uploads.begin(digest) for _ in range(8)]
    for upload in several:
        upload.write(data)
    threads = [threading.Thread(target=upload.finish) for upload in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.stat().st_size for path in store.layout.blobs.rglob("*") if path.is_file()] == [len(data)]
    assert not [path for path in store.layout.tmp.rglob("*") if path.is_file()]
    assert total_bytes(store.index) == len(data)


def test_many_at_once_share_a_sync(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = store.uploads(Unlimited())
    publications: list[int] = []
    session = uploads.session()
    publish = session.publish
    first = threading.Event()

    def slow_publish(pending: Sequence[Pending]) -> None:
        publications.append(len(pending))
        first.wait(30)
        publish(pending)

    monkeypatch.setattr(session, "publish", slow_publish)
    blobs = [b"%d" % number for number in range(20)]
    opened = [uploads.begin(SHA256.of(blob)) for blob in blobs]
    threads = [threading.Thread(target=write_and_finish, args=pair) for pair in zip(opened, blobs, strict=True)]
    threads[0].start()
    while not publications:
        time.sleep(0.001)
    for thread in threads[1:]:
        thread.start()
    while uploads._waiting.qsize() < 19:
        time.sleep(0.001)
    first.set()
    for thread in threads:
        thread.join()
    uploads.close()
    assert publications == [1, 19]
    assert all(store.blobs.is_verified(SHA256.of(blob)) for blob in blobs)


def test_a_batch_is_published_at_once(store: Store, uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def counted(name: str) -> None:
        do = getattr(kernel, name)

        def count(what: object) -> None:
            synced.append(name)
            do(what)

        monkeypatch.setattr(kernel, name, count)

    counted("syncfs")
    counted("fsync_path")
    blobs = [b"%d" % number for number in range(500)]
    assert uploads.add_all([(SHA256.of(blob), blob) for blob in blobs]) == [None] * 500
    assert synced == ["syncfs", "syncfs"], "the files, and their names"


def test_batches_of_two_threads_are_published_side_by_side_out_of_two_sessions(
    store: Store, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    do = Publisher._name
    both = threading.Barrier(2)
    directories: list[set[Path]] = []

    def name(publisher: Publisher, fresh: dict[bytes, Any], many: bool) -> None:
        directories.append({Path(item.path).parent for item in fresh.values()})
        both.wait(30)
        do(publisher, fresh, many)

    monkeypatch.setattr(Publisher, "_name", name)
    threads = [
        threading.Thread(target=uploads.add_all, args=([(SHA256.of(data), data)],)) for data in (b"1", b"2", b"3", b"4")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both.broken
    assert [len(one) for one in directories] == [1] * 4
    used = set.union(*directories)
    assert len(used) == 2 and {directory.parent for directory in used} == {store.layout.tmp}
    uploads.close()
    assert not any(store.layout.tmp.iterdir())


def test_a_blob_that_was_deleted_behind_our_back_is_stored_again(store: Store, uploads: Uploads) -> None:
    blob = SHA256.of(b"twice"), b"twice"
    path = store.layout.blobs / blob_path(blob[0])
    for _ in range(2):
        assert uploads.add_all([blob]) == [None]
        assert path.read_bytes() == b"twice"
        path.unlink()


@pytest.mark.parametrize("step", ["_name", "_remember"])
def test_a_publication_that_fails_is_told_to_those_whose_files_were_in_it_and_leaves_none(
    store: Store, uploads: Uploads, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    poison = SHA256.of(b"poison"), b"poison"
    neighbours = [(SHA256.of(blob), blob) for blob in (b"in the same group", b"in it, too")]
    others = [[(SHA256.of(b"%d" % number), b"%d" % number)] for number in range(20)]
    do = getattr(Publisher, step)
    begun, go_on = threading.Event(), threading.Event()

    def failing(publisher: Publisher, *arguments: Any) -> Any:
        begun.set()
        go_on.wait(30)
        if any(isinstance(fresh, dict) and poison[0].key in fresh for fresh in arguments):
            raise OSError(errno.ENOSPC, "no space")
        return do(publisher, *arguments)

    monkeypatch.setattr(Publisher, step, failing)
    told: dict[bytes, object] = {}

    def add_all(group: list[tuple[Digest, bytes]]) -> None:
        for (digest, _), refused in zip(group, uploads.add_all(group), strict=True):
            told[digest.key] = refused

    def finish(upload: Upload, digest: Digest) -> None:
        try:
            upload.finish()
        except StoreError as error:
            told[digest.key] = error
        else:
            told[digest.key] = None

    # All of them have their files when the first publication goes on, whoever does it and for whom.
    piecewise = [(SHA256.of(b"piece %d" % number), b"piece %d" % number) for number in range(4)]
    opened = [uploads.begin(digest) for digest, _ in piecewise]
    for upload, (_, data) in zip(opened, piecewise, strict=True):
        upload.write(data)
    groups = [[*neighbours, poison], *others]
    threads = [threading.Thread(target=add_all, args=(group,)) for group in groups]
    threads += [
        threading.Thread(target=finish, args=(upload, digest))
        for upload, (digest, _) in zip(opened, piecewise, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go_on.set()
    for thread in threads:
        thread.join()
    failed = {digest.key for digest, _ in (poison, *neighbours)}
    assert {key for key, refused in told.items() if isinstance(refused, NoSpace)} == failed
    everything = [blob for group in (*groups, piecewise) for blob in group]
    assert len(told) == len(everything)
    for digest, _ in everything:
        acknowledged = told[digest.key] is None
        assert (acknowledged, acknowledged) == (
            store.blobs.is_verified(digest),
            (store.layout.blobs / blob_path(digest)).exists(),
        )
    assert not [path for path in store.layout.tmp.rglob("*") if path.is_file()]

    # What failed may come again.
    monkeypatch.setattr(Publisher, step, do)
    add_all(groups[0])
    assert all(store.blobs.is_verified(digest) for digest, _ in groups[0])


def test_those_who_wait_for_one_publication_hear_of_its_failure_and_nobody_else(
    store: Store, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = uploads.session()
    publish = session.publish
    sizes: list[int] = []
    first = threading.Event()

    def second_fails(pending: Sequence[Pending]) -> None:
        sizes.append(len(pending))
        if len(sizes) == 1:
            first.wait(30)
        if len(sizes) == 2:
            monkeypatch.setattr(Publisher, "publish", no_space)
        try:
            publish(pending)
        finally:
            monkeypatch.setattr(Publisher, "publish", real)

    real = Publisher.publish

    def no_space(publisher: Publisher, batch: Batch) -> Published:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(session, "publish", second_fails)
    blobs = [b"%d" % number for number in range(4)]
    refused: list[bytes] = []

    def finish(upload: Upload, data: bytes) -> None:
        try:
            write_and_finish(upload, data)
        except NoSpace:
            refused.append(data)

    opened = [uploads.begin(SHA256.of(blob)) for blob in blobs]
    threads = [threading.Thread(target=finish, args=pair) for pair in zip(opened, blobs, strict=True)]
    threads[0].start()
    while not sizes:
        time.sleep(0.001)
    for thread in threads[1:]:
        thread.start()
    while uploads._waiting.qsize() < 3:
        time.sleep(0.001)
    first.set()
    for thread in threads:
        thread.join()
    assert sizes == [1, 3]
    assert sorted(refused) == blobs[1:]
    assert [store.blobs.has(SHA256.of(blob)) for blob in blobs] == [True, False, False, False]
    assert not [path for path in store.layout.tmp.rglob("*") if path.is_file()]
    for blob in blobs:
        write_and_finish(uploads.begin(SHA256.of(blob)), blob)
    assert all(store.blobs.is_verified(SHA256.of(blob)) for blob in blobs)


def test_a_batch_says_of_each_blob_what_became_of_it(store: Store, uploads: Uploads) -> None:
    good, bad = (SHA256.of(b"good"), b"good"), (SHA256.of(b"bad"), b"other")
    found = uploads.add_all([good, bad, good])
    assert [type(error) for error in found] == [type(None), DigestMismatch, type(None)]
    assert store.blobs.has(good[0])
    assert not store.blobs.has(bad[0])


def test_a_session_of_uploads_holds_no_collection_back(store: Store, uploads: Uploads) -> None:
    uploads.add_all([(SHA256.of(b"first"), b"first")])
    [old] = add(store, bytes(1000), age=60)
    store.collector.collect(0, 0, grace=30)
    assert not store.blobs.has(old)


# The limit


def make_quota(store: Store, limit: int, grace: int = 0, patience: float = 5.0) -> Quota:
    return Quota(
        store.layout, store.index, store.actions, store.collector, Limits.below(limit, grace), patience=patience
    )


def test_the_sum_of_sizes_is_kept_whatever_happens_to_blobs(store: Store) -> None:
    assert total_bytes(store.index) == 0
    digests = add(store, bytes(100), bytes(200), bytes(300), b"")
    assert total_bytes(store.index) == 600
    add(store, bytes(100))
    set_age(store, digests[0], 5 * HOUR)
    store.collector.collect(0, 500)
    assert total_bytes(store.index) == 500
    (store.layout.blobs / blob_path(digests[1])).unlink()
    with pytest.raises(MissingBlob):
        store.blobs.open(digests[1])
    assert total_bytes(store.index) == 300
    store.demoter.demote(0)
    assert total_bytes(store.index) == sum_of_rows(store)
    store.verifier.verify(rebuild=True)
    assert total_bytes(store.index) == sum_of_rows(store)


def test_space_is_reserved_until_it_is_released(store: Store) -> None:
    quota = make_quota(store, 1000, patience=0.05)
    with quota.reserve(600):
        with pytest.raises(NoSpace):
            quota.reserve(600)
        quota.reserve(400).release()
    quota.reserve(1000).release()
    with pytest.raises(NoSpace, match="--max-size"):
        quota.reserve(1001)
    quota.close()


def test_room_is_made_from_what_was_not_used_for_longest(store: Store) -> None:
    digests = add(store, *(bytes([number]) * 100 for number in range(10)))
    for number, digest in enumerate(digests):
        set_age(store, digest, (20 - number) * HOUR)
    quota = make_quota(store, 1000)
    with quota.reserve(300):
        there = [store.blobs.has(digest) for digest in digests]
    assert there == sorted(there)
    assert sum(there) <= 7
    quota.close()


def test_one_large_blob_takes_the_place_of_many(store: Store) -> None:
    add(store, *(bytes([number]) * 100 for number in range(10)), age=HOUR)
    quota = make_quota(store, 1000)
    quota.reserve(900).release()
    quota.close()


def test_what_is_leased_or_was_just_used_stays_and_the_answer_comes_soon(store: Store) -> None:
    leased, young = add(store, bytes(400), bytes(500))
    set_age(store, leased, 5 * HOUR)
    quota = make_quota(store, 1000, grace=HOUR, patience=60.0)
    with store.leases.acquire("test", [leased], "a test"):
        began = time.monotonic()
        with pytest.raises(NoSpace):
            quota.reserve(500)
        assert time.monotonic() - began < 10
        assert store.blobs.has(leased)
        assert store.blobs.has(young)
    quota.close()


def test_a_group_that_does_not_fit_waits_for_a_collection_once(store: Store) -> None:
    add(store, bytes(950))
    quota = make_quota(store, 1000, grace=HOUR, patience=60.0)
    uploads = store.uploads(quota)
    blobs = [b"%030d" % number for number in range(10)]
    results = uploads.add_all([(SHA256.of(blob), blob) for blob in blobs])
    assert [type(result) for result in results] == [type(None), *[NoSpace] * 9]
    # One for all of them, and perhaps one more that has begun since, for the next to come.
    assert quota._begun <= 2
    uploads.close()
    quota.close()


def test_collections_run_in_the_background_from_the_high_mark_on(store: Store) -> None:
    add(store, *(bytes([number]) * 95 for number in range(10)), age=HOUR)
    quota = make_quota(store, 1000)
    quota.reserve(1).release()
    deadline = time.monotonic() + 30
    while quota.used() > 800 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert quota.used() <= 800
    quota.close()


def test_results_count_as_they_are_written(store: Store) -> None:
    quota = make_quota(store, 1000, grace=HOUR)
    store.actions.write(action_key(SHA256.of(b"action")), bytes(700))
    assert quota.used() == 700
    store.collector.collect(1 << 30, 1 << 30)
    with pytest.raises(NoSpace):
        quota.reserve(400)
    assert quota.used() == 700
    quota.close()


def test_the_index_of_an_older_casfs_is_counted_once(store: Store, tmp_path: Path) -> None:
    add(store, bytes(100), bytes(200))
    store.index.update(lambda change: change.delete(Table.META, b"bytes of blobs"))
    assert total_bytes(store.index) == 300
    add(store, bytes(50))
    assert total_bytes(store.index) == 350
