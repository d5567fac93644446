"""The index: it grows by itself, serves several processes, and refuses what it doesn't know."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest

from store import index as indexing
from store.errors import NewerFormat, StoreUnusable
from store.index import Change, Index, Table


@pytest.fixture
def small_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that has to grow soon."""
    monkeypatch.setattr(indexing, "_FIRST_MAP", 1 << 18)


def _fill(index: Index, first: int, count: int) -> None:
    def work(change: Change) -> None:
        for number in range(first, first + count):
            change.put(Table.STAMPS, b"%08d" % number, bytes(1000))

    index.update(work)


def _in_child(index: Path, first: int, count: int) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _fill(Index(index), first, count)
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.mark.usefixtures("small_map")
def test_the_map_grows_when_a_write_fills_it(tmp_path: Path) -> None:
    index = Index(tmp_path)
    _fill(index, 0, 2000)
    with index.view() as view:
        assert view.count(Table.STAMPS) == 2000
    index.close()


@pytest.mark.usefixtures("small_map")
def test_views_of_other_threads_live_through_a_growth(tmp_path: Path) -> None:
    index = Index(tmp_path)
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            with index.view() as view:
                assert sum(1 for _ in view.scan(Table.STAMPS)) % 100 == 0

    with ThreadPoolExecutor(3) as pool:
        looking = [pool.submit(look) for _ in range(3)]
        try:
            for number in range(20):
                _fill(index, 100 * number, 100)
        finally:
            ended.set()
        for future in looking:
            future.result()
    index.close()


@pytest.mark.usefixtures("small_map")
def test_a_growth_by_another_process_is_taken_over(tmp_path: Path) -> None:
    children = [_in_child(tmp_path, 10_000 * number, 1000) for number in range(2)]
    index = Index(tmp_path)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    with index.view() as view:
        assert view.count(Table.STAMPS) == 2000
    _fill(index, 50_000, 10)
    index.close()


def test_readers_never_wait_for_a_writer_and_see_nothing_of_one_that_was_killed(tmp_path: Path) -> None:
    Index(tmp_path).close()
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()
    child = os.fork()
    if child == 0:
        writer = Index(tmp_path)

        def work(change: Change) -> None:
            change.put(Table.STAMPS, b"x", b"not committed")
            os.write(from_child, b"x")
            threading.Event().wait(20)

        os.write(from_child, b"x")
        os.read(to_child, 1)
        writer.update(work)
        os._exit(0)
    os.read(to_parent, 1)
    index = Index(tmp_path)
    os.write(from_parent, b"x")
    os.read(to_parent, 1)
    with index.view() as view:
        assert view.count(Table.STAMPS) == 0
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _fill(index, 0, 10)
    with index.view() as view:
        assert view.count(Table.STAMPS) == 10
    index.close()
    for descriptor in (to_child, from_parent, to_parent, from_child):
        os.close(descriptor)


def test_one_view_or_update_a_thread_so_that_a_growth_never_waits_for_itself(tmp_path: Path) -> None:
    index = Index(tmp_path)
    with index.view():
        with pytest.raises(RuntimeError, match="has the index open already"):
            index.update(lambda change: None)
        with pytest.raises(RuntimeError, match="has the index open already"), index.view():
            pass
    index.update(lambda change: None)
    index.close()


def test_a_failed_update_changes_nothing(tmp_path: Path) -> None:
    index = Index(tmp_path)

    def work(change: Change) -> None:
        change.put(Table.META, b"x", b"y")
        raise KeyError("on purpose")

    with pytest.raises(KeyError):
        index.update(work)
    with index.view() as view:
        assert view.get(Table.META, b"x") is None
    index.close()


def test_an_index_of_a_newer_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    env = lmdb.open(str(tmp_path), max_dbs=4)
    meta = env.open_db(b"meta")
    with env.begin(write=True, db=meta) as txn:
        txn.put(b"format", b"2")
    env.close()
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(NewerFormat, match="has format 2, this casfs knows 1"):
        Index(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == before


def test_a_damaged_index_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"garbage" * 5000)
    with pytest.raises(StoreUnusable, match=r"is damaged .*casfs verify"):
        Index(tmp_path)


def test_scans_and_neighbours_find_what_sorted_keys_say(tmp_path: Path) -> None:
    index = Index(tmp_path)
    keys = [b"a", b"ab", b"b1", b"b3"]
    index.update(lambda change: change.append(Table.STAMPS, [(key, key) for key in keys]))
    with index.view() as view:
        assert [key for key, _ in view.scan(Table.STAMPS)] == keys
        assert [key for key, _ in view.scan(Table.STAMPS, prefix=b"b")] == [b"b1", b"b3"]
        assert [key for key, _ in view.scan(Table.STAMPS, b"b2", b"b")] == [b"b3"]
        assert view.last_at_or_before(Table.STAMPS, b"b2") == (b"b1", b"b1")
        assert view.last_at_or_before(Table.STAMPS, b"b3") == (b"b3", b"b3")
        assert view.last_at_or_before(Table.STAMPS, b"z") == (b"b3", b"b3")
        assert view.last_at_or_before(Table.STAMPS, b"0") is None
    index.close()
