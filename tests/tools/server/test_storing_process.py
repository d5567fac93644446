"""The process that stores for a server: what it is given is durable, and whatever becomes of it no upload is lost."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from store.digest import Digest
from store.errors import DigestMismatch, StoreUnusable
from store.repository import Store
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import HTTP, SHA256, HttpClient, alive, connected, find_storing, running, wait_for
from tests.tools.server.raw_http import connected_raw, put, report
from tools.exits import Exit
from tools.server.storing_process import StoringProcess


def is_gone(pid: int) -> bool:
    return not alive(pid)


def written_by(pid: int) -> int:
    """Bytes that a process has written, to files and others."""
    return int(Path(f"/proc/{pid}/io").read_text().split("wchar: ")[1].split()[0])


def batch(*blobs: bytes) -> list[tuple[Digest, bytes]]:
    return [(SHA256.of(blob), blob) for blob in blobs]


@pytest.fixture
def storing(tmp_path: Path) -> Iterator[StoringProcess]:
    Store.open(tmp_path / "store").close()
    with StoringProcess(tmp_path / "store") as process:
        yield process


@pytest.fixture
def store(storing: StoringProcess, tmp_path: Path) -> Iterator[Store]:
    # After the fork: LMDB doesn't survive one.
    with Store.open(tmp_path / "store") as opened:
        yield opened


def test_what_is_right_is_stored_and_what_is_wrong_is_said(store: Store, storing: StoringProcess) -> None:
    wrong = SHA256.of(b"what was promised")
    results = storing.store_all([*batch(b"one"), (wrong, b"what came"), *batch(b"two")])
    assert results is not None
    first, second, third = results
    assert (first, third) == (None, None)
    assert isinstance(second, DigestMismatch) and str(second).startswith(f"the bytes offered as {wrong} are ")
    assert store.blobs.has(SHA256.of(b"one")) and store.blobs.has(SHA256.of(b"two"))
    assert not store.blobs.has(wrong)
    assert storing.store_all(batch(b"one", b"three")) == [None, None]


def test_what_concerns_all_blobs_is_raised_and_is_over_when_its_cause_is(store: Store, storing: StoringProcess) -> None:
    assert storing.store_all(batch(b"zero")) == [None]
    store.layout.tmp.rename(store.layout.root / "away")
    with pytest.raises(StoreUnusable, match="is missing: this is not a whole store"):
        storing.store_all(batch(b"one"))
    store.layout.tmp.touch()
    with pytest.raises(RuntimeError, match="NotADirectoryError"):
        storing.store_all(batch(b"one"))
    store.layout.tmp.unlink()
    (store.layout.root / "away").rename(store.layout.tmp)
    assert storing.store_all(batch(b"one")) == [None]


def test_it_has_nothing_of_its_parent_but_the_pipes(tmp_path: Path) -> None:
    root = tmp_path / "store"
    Store.open(root).close()
    with open(tmp_path / "open before", "w"), StoringProcess(root) as process:
        assert process.store_all(batch(b"one")) == [None]
        names = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert {name for name in names if not name.startswith((str(root), "socket:"))} == {os.devnull}
    assert sum(name.startswith("socket:") for name in names) == 2


def test_signals_to_all_processes_of_a_service_do_not_end_it(storing: StoringProcess) -> None:
    assert storing.store_all(batch(b"one")) == [None]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(storing.pid, number)
    assert storing.store_all(batch(b"two")) == [None]


def test_it_ends_at_the_end_and_leaves_no_file_unpublished(storing: StoringProcess, store: Store) -> None:
    assert storing.store_all(batch(b"one")) == [None]
    storing.close()
    assert is_gone(storing.pid)
    assert list(store.layout.tmp.iterdir()) == []
    assert storing.store_all(batch(b"two")) is None


def test_once_it_is_gone_that_is_said_once_and_the_caller_stores(
    storing: StoringProcess, caplog: pytest.LogCaptureFixture
) -> None:
    os.kill(storing.pid, signal.SIGKILL)
    assert storing.store_all(batch(b"one")) is None
    assert storing.store_all(batch(b"one")) is None
    assert [record.getMessage() for record in caplog.records] == [
        "the process that stores has ended; from now on this one stores what comes, more slowly"
    ]


# In a server.


def test_uploads_of_all_kinds_are_stored_there(casfs: Casfs) -> None:
    with running(casfs, *HTTP) as server, connected(server) as client, HttpClient(server) as web:
        storing = find_storing(server.process.pid)
        for blob, bring in (
            (bytes(20_000), client.add),
            (bytes(20_001), lambda blob: client.write(SHA256.of(blob), blob)),
            (bytes(20_002), web.put_blob),
        ):
            before = written_by(storing), written_by(server.process.pid)
            bring(blob)
            assert written_by(storing) - before[0] >= len(blob)
            # What it hands over; a file of its own would be as much again.
            assert len(blob) <= written_by(server.process.pid) - before[1] < 2 * len(blob)
        os.kill(storing, signal.SIGKILL)
        client.add(b"in a batch, later")
        assert web.put_blob(b"over HTTP, later") and client.missing([SHA256.of(b"in a batch, later")]) == []
        assert server.stop() == 0
    assert "the process that stores has ended" in (casfs.store / "casfs.log").read_text()


def test_it_ends_with_a_server_that_is_killed(casfs: Casfs) -> None:
    for _ in range(3):
        with running(casfs) as server, connected(server) as client:
            storing = find_storing(server.process.pid)
            client.add(b"one")
            server.process.kill()
            # Its standard error, too, is held by nobody else.
            assert server.process.communicate(timeout=30)[1] == b""
            wait_for(partial(is_gone, storing))
    with Store.open(casfs.store):
        assert list((casfs.store / "tmp").iterdir()) == []


@pytest.mark.parametrize("seed", range(6))
def test_what_was_acknowledged_is_there_whenever_it_is_killed(casfs: Casfs, seed: int) -> None:
    rng = random.Random(seed)
    acknowledged: list[Digest] = []
    with running(casfs) as server, connected(server) as client:
        storing = find_storing(server.process.pid)
        # While a group is under way, most often: one is all the time.
        killing = threading.Timer(rng.uniform(0.0, 0.3), os.kill, (storing, signal.SIGKILL))
        killing.start()
        while killing.is_alive() or rng.random() < 0.8:
            acknowledged += client.add(*(rng.randbytes(rng.randrange(3000)) for _ in range(200)))
        wait_for(partial(is_gone, storing))
        assert client.missing(acknowledged) == []
        server.process.kill()
        server.process.wait(30)
    with Store.open(casfs.store) as store:
        for digest in acknowledged:
            with open(store.blobs.open(digest), "rb") as file:
                assert SHA256.of(file.read()) == digest
        assert list((casfs.store / "tmp").iterdir()) == []


def test_a_server_whose_storing_process_hangs_ends_in_time(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--drain-timeout", "1s") as server, connected_raw(server) as connection:
        storing = find_storing(server.process.pid)
        os.kill(storing, signal.SIGSTOP)
        try:
            blob = b"one"
            connection.sendall(put(blob, path=f"/cas/{SHA256.of(blob).hex}"))
            wait_for(lambda: "HTTP PUT cas" in report(server))
            server.process.send_signal(signal.SIGTERM)
            _, err = server.process.communicate(timeout=60)
        finally:
            os.kill(storing, signal.SIGCONT)
        assert server.process.returncode == Exit.OVERDUE
        assert b"1 thread in StoringProcess.store_all" in err
        wait_for(lambda: is_gone(storing))
