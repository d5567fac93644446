"""The way of uploads into the store: what is stored once, who is told of what, and whose turn it is."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import h2.config
import h2.connection
import pytest

from store import kernel
from store.digest import Digest
from store.errors import DigestMismatch, NoSpace, StoreError, StoreUnusable
from store.quota import Unlimited
from store.repository import Store
from store.uploads import Uploads
from tests.tools.server.conftest import SHA256, Client, wait_for
from tests.tools.server.odd import serving
from tests.tools.server.test_http2_calls import prefixed
from tests.tools.server.test_many_uploads import upload
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.resource_names import ResourceName
from tools.server import gate as gates
from tools.server.gate import Gate
from tools.server.load import Load
from tools.server.requests import write_digest
from tools.server.storing import Storing

ONE, TWO = gates.Client("one", 1), gates.Client("two", 2)


class Disk:
    """Stores nothing; does so when it is told to. `groups`: what it was asked to store."""

    def __init__(self) -> None:
        self.groups: list[list[bytes]] = []
        self.works = threading.Event()
        self.error: Exception | None = None

    def store(self, blobs: Sequence[tuple[Digest, bytes]]) -> list[StoreError | None]:
        self.groups.append([data for _, data in blobs])
        self.works.wait(30)
        if self.error is not None:
            raise self.error
        return [None if SHA256.of(data) == digest else DigestMismatch("wrong") for digest, data in blobs]

    @property
    def stored(self) -> list[bytes]:
        return [data for group in self.groups for data in group]


class Told:
    """What bringers are told, by their names."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.results: dict[str, Exception | None] = {}
        self.order: list[str] = []
        self._changed = asyncio.Event()

    def settle(self, name: str, refused: Exception | None) -> None:
        assert name not in self.results, "told twice"
        self.results[name] = refused
        self.order.append(name)
        self._changed.set()

    def add(self, name: str, client: gates.Client, data: bytes, digest: Digest | None = None) -> None:
        self.gate.add(client, digest or SHA256.of(data), data, partial(self.settle, name))

    async def all(self, number: int) -> dict[str, Exception | None]:
        """When so many were told."""
        async with asyncio.timeout(30):
            while len(self.results) < number:
                self._changed.clear()
                await self._changed.wait()
        return self.results


@asynccontextmanager
async def opened(store: Any, turns: int = 1) -> AsyncIterator[tuple[Gate, Told]]:
    gate = Gate(store, Load(), turns)
    try:
        yield gate, Told(gate)
    finally:
        gate.close()
    assert (gate.load.calls, gate.load.bytes, gate.waiting) == (0, 0, 0)


def run(test: Callable[[Disk, Gate, Told], Any], turns: int = 1) -> None:
    """With a disk that doesn't work yet."""

    async def main() -> None:
        disk = Disk()
        try:
            async with asyncio.timeout(60), opened(disk.store, turns) as (gate, told):
                await test(disk, gate, told)
                disk.works.set()
        finally:
            disk.works.set()

    asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - threads bring it about, too
            await asyncio.sleep(0.001)


# Whole blobs


def test_a_blob_that_is_brought_twice_is_stored_once() -> None:
    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        for number, client in enumerate((ONE, TWO, ONE)):
            told.add(str(number), client, b"same")
        told.add("another", TWO, b"another")
        disk.works.set()
        assert await told.all(4) == dict.fromkeys(("0", "1", "2", "another"))
        assert sorted(disk.stored) == [b"another", b"same"]
        # It isn't on its way any more: who brings it again has it stored again.
        told.add("again", ONE, b"same")
        assert (await told.all(5))["again"] is None
        assert disk.stored.count(b"same") == 2

    run(test)


def test_wrong_bytes_of_the_first_do_no_harm_to_the_second(store: Store) -> None:
    async def main() -> None:
        uploads = store.uploads(Unlimited())
        digest = SHA256.of(b"right")
        async with opened(uploads.add_all) as (_, told):
            for number, data in enumerate((b"wrong", b"WRONG", b"right", b"wrong")):
                told.add(str(number), ONE if number else TWO, data, digest)
            results = await told.all(4)
        assert [type(results[str(number)]) for number in range(3)] == [DigestMismatch, DigestMismatch, type(None)]
        # Whether the bytes of the last are right nobody has to know: the blob is there.
        assert results["3"] is None
        uploads.close()
        assert store.blobs.is_verified(digest)

    asyncio.run(main())


def test_what_concerns_a_group_is_told_to_all_of_it() -> None:
    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        disk.error = NoSpace("full")
        for number in range(10):
            told.add(str(number), ONE, b"%d" % (number // 2))
        disk.works.set()
        assert set((await told.all(10)).values()) == {disk.error}
        assert len(disk.stored) == 5, "bytes that are right aren't tried again"
        disk.error = None
        told.add("later", ONE, b"0")
        assert (await told.all(11))["later"] is None

    run(test)


def test_connections_and_tokens_take_turns_while_the_disk_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_BLOBS_MOST", 1)

    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        told.add("first", gates.Client("x", 9), b"first")
        for number in range(6):
            for connection in (1, 2):
                name = f"many {connection}.{number}"
                told.add(name, gates.Client("many", connection), name.encode())
        for number in range(3):
            told.add(f"few.{number}", gates.Client("few", 3), b"few%d" % number)
        assert gate.waiting == 15
        disk.works.set()
        await told.all(16)
        names = [name.partition(".")[0] for name in told.order[1:]]
        # By halves between the tokens, and one half of them by halves between its connections.
        assert names[:6] == ["many 1", "few", "many 2", "few", "many 1", "few"]
        assert names[6:] == ["many 2", "many 1"] * 4 + ["many 2"]
        assert max(map(len, disk.groups)) == 1

    run(test)


def test_blobs_that_come_together_are_stored_together_and_told_apart() -> None:
    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        blobs = [b"%d" % number for number in range(700)]
        wrong = SHA256.of(b"wrong")
        gate.add_all(
            ONE,
            [
                (wrong if data == b"7" else SHA256.of(data), data, partial(told.settle, data.decode()))
                for data in [*blobs, b"again"]
            ],
        )
        gate.add_all(TWO, [(SHA256.of(b"again"), b"again", partial(told.settle, "twice"))])
        # All were handed on at once: a thread took a group, and another one what was more.
        await until(lambda: len(disk.groups) == 2)
        disk.works.set()
        results = await told.all(702)
        assert {name for name, refused in results.items() if refused} == {"7"}
        assert isinstance(results["7"], DigestMismatch)
        assert sorted(map(len, disk.groups)) == [189, 512]

    run(test)


def test_what_waits_counts_and_what_the_disk_has_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_BYTES_MOST", 100)

    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        for number in range(10):
            told.add(str(number), ONE, b"%d" % number * 60)
        assert (gate.storing, gate.waiting) == (2, 8)
        assert (gate.load.calls, gate.load.bytes) == (8, 480)
        disk.works.set()
        await told.all(10)
        assert (gate.storing, gate.waiting) == (0, 0)
        assert (gate.load.calls, gate.load.bytes) == (0, 0)

    run(test)


def test_who_asks_for_a_blob_on_its_way_is_told_when_it_is_stored() -> None:
    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        digest = SHA256.of(b"blob")
        assert not gate.join(TWO, digest, partial(told.settle, "too early"))
        told.add("brings", ONE, b"blob")
        assert gate.join(TWO, digest, partial(told.settle, "asks"))
        await until(lambda: disk.groups)
        assert told.results == {}
        disk.works.set()
        assert await told.all(2) == {"brings": None, "asks": None}
        assert not gate.join(TWO, digest, partial(told.settle, "too late"))

    run(test)


def test_who_asks_for_a_blob_whose_bytes_were_wrong_is_told_that() -> None:
    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        digest = SHA256.of(b"blob")
        told.add("brings", ONE, b"wrong", digest)
        assert gate.join(TWO, digest, partial(told.settle, "asks"))
        disk.works.set()
        assert {type(refused) for refused in (await told.all(2)).values()} == {DigestMismatch}
        assert disk.stored == [b"wrong"]

    run(test)


def test_closing_stores_what_the_threads_have_and_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_BLOBS_MOST", 20)

    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        for number in range(50):
            told.add(str(number), ONE, b"%d" % number)
        told.add("twice", TWO, b"49")
        assert gate.join(TWO, SHA256.of(b"48"), partial(told.settle, "asks"))
        assert (gate.storing, gate.waiting) == (20, 30)
        threading.Timer(0.1, disk.works.set).start()
        gate.close()
        assert len(disk.stored) == 20
        told.add("after the end", ONE, b"late")
        results = await told.all(53)
        assert sorted(disk.stored) == sorted(b"%d" % n for n in range(50) if results[str(n)] is None)
        refused = {name for name, error in results.items() if isinstance(error, StoreUnusable)}
        assert refused == {*map(str, range(20, 50)), "twice", "asks", "after the end"}
        assert (gate.storing, gate.waiting) == (0, 0)

    run(test)


# Turns


def test_so_many_have_a_turn_and_the_next_have_it_fairly() -> None:
    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        taken: list[str] = []
        go_on: dict[str, asyncio.Event] = {}

        async def upload(name: str, client: gates.Client) -> None:
            async with gate.turn(client):
                taken.append(name)
                await go_on.setdefault(name, asyncio.Event()).wait()

        names = [("a1", ONE), ("a2", ONE), ("a3", ONE), ("a4", ONE), ("b1", TWO), ("b2", TWO)]
        tasks = [asyncio.create_task(upload(*name)) for name in names]
        await until(lambda: gate.waiting_turns == 4)
        assert taken == ["a1", "a2"]
        for name in ("a2", "a3", "b1", "a4", "b2"):
            go_on.setdefault(name, asyncio.Event()).set()
        await until(lambda: len(taken) == 6)
        assert taken == ["a1", "a2", "a3", "b1", "a4", "b2"]
        go_on["a1"].set()
        await asyncio.gather(*tasks)
        assert gate.waiting_turns == 0

    run(test, turns=2)


def test_who_gives_up_while_it_waits_has_no_turn_and_costs_none() -> None:
    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        taken: list[str] = []
        go_on = asyncio.Event()

        async def upload(name: str) -> None:
            async with gate.turn(ONE):
                taken.append(name)
                await go_on.wait()

        first, impatient, patient = (asyncio.create_task(upload(name)) for name in ("first", "impatient", "patient"))
        await until(lambda: gate.waiting_turns == 2)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        go_on.set()
        await asyncio.gather(first, patient)
        assert taken == ["first", "patient"]
        async with asyncio.timeout(10), gate.turn(TWO):
            pass

    run(test)


def test_what_waits_for_a_turn_is_only_who_still_does() -> None:
    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        async def upload(client: gates.Client) -> None:
            async with gate.turn(client, held=100):
                await asyncio.sleep(60)

        begun = gate._clock()
        tasks = [asyncio.create_task(upload(client)) for client in (ONE, ONE, TWO, ONE)]
        await until(lambda: gate.waiting_turns == 3)
        last = asyncio.create_task(upload(TWO))
        await until(lambda: gate.waiting_turns == 4)
        oldest = gate.oldest()
        assert oldest is not None and begun <= oldest
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks[1:])
        assert (gate.waiting_turns, gate.load.calls, gate.load.bytes) == (1, 1, 100)
        since = gate.oldest()
        assert since is not None and since > oldest
        for task in (last, tasks[0]):
            task.cancel()
            await asyncio.wait([task])
        assert (gate.waiting_turns, gate.oldest()) == (0, None)

    run(test)


def test_a_turn_is_passed_on_also_by_who_is_cancelled_when_it_was_given() -> None:
    async def test(disk: Disk, gate: Gate, told: Told) -> None:
        first = gate.turn(ONE)
        await first.__aenter__()
        impatient = asyncio.ensure_future(gate.turn(ONE).__aenter__())
        await until(lambda: gate.waiting_turns == 1)
        # Both before the loop goes on.
        await_end = first.__aexit__(None, None, None)
        with pytest.raises(StopIteration):
            await_end.send(None)  # it doesn't wait for anything
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        async with asyncio.timeout(10), gate.turn(TWO):
            pass

    run(test)


# With a server


class Slow:
    """Holds up the storing of groups until `go_on` is set. `blobs`: of each group, how many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.blobs: list[int] = []
        add_all = Uploads.add_all

        def slow(uploads: Uploads, blobs: Sequence[tuple[Digest, bytes]]) -> list[StoreError | None]:
            self.blobs.append(len(blobs))
            assert self.go_on.wait(120)
            return add_all(uploads, blobs)

        monkeypatch.setattr(Uploads, "add_all", slow)


@contextmanager
def together(url: str) -> Any:
    """A client, and threads to call in."""
    client = Client(url.removeprefix("grpc://"))
    try:
        with ThreadPoolExecutor(8) as pool:
            yield client, pool
    finally:
        client.close()


def test_the_status_of_a_write_that_is_being_stored_is_told_when_it_is_durable(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    digest = SHA256.of(b"on its way")
    name = ResourceName("", digest, upload="one")
    with serving(store) as url, together(url) as (client, pool):
        assert client.query(name) == (0, False)
        writing = pool.submit(client.write, digest, b"on its way")
        wait_for(lambda: slow.blobs)
        asking = pool.submit(client.query, name)
        # Others aren't held up.
        assert client.query(name._replace(digest=SHA256.of(b"another"))) == (0, False)
        assert client.missing([digest]) == [digest.hex]
        assert not asking.done()
        assert not writing.done()
        slow.go_on.set()
        assert asking.result(30) == (10, True)
        assert store.blobs.is_verified(digest)
        assert writing.result(30) == 10
        assert slow.blobs == [1]


def test_many_clients_that_bring_one_blob_share_its_storing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    digest = SHA256.of(b"of all")
    with serving(store) as url, together(url) as (client, pool):
        writing = [pool.submit(client.write, digest, b"of all", upload=f"u{number}") for number in range(4)]
        wait_for(lambda: slow.blobs)
        batch = pool.submit(client.add, b"of all", b"another")
        wait_for(lambda: sum(slow.blobs) == 2)
        slow.go_on.set()
        assert [call.result(30) for call in writing] == [6] * 4
        assert batch.result(30) == [digest, SHA256.of(b"another")]
    assert sum(slow.blobs) == 2
    assert store.blobs.is_verified(digest)


def test_a_whole_upload_is_kept_though_its_client_has_given_up(store: Store) -> None:
    peer = h2.connection.H2Connection(h2.config.H2Configuration())
    peer.initiate_connection()

    def call(path: str, message: bytes, *, whole: bool = True) -> None:
        stream = peer.get_next_available_stream_id()
        head = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "here")]
        peer.send_headers(stream, [*head, ("content-type", "application/grpc"), ("te", "trailers")])
        peer.send_data(stream, prefixed(message)[: None if whole else -1], end_stream=whole)
        peer.reset_stream(stream)

    def write(data: bytes) -> bytes:
        name = str(ResourceName("", SHA256.of(data), upload="u"))
        return bytestream.WriteRequest(resource_name=name, data=data, finish_write=True).SerializeToString()

    batch = reapi.BatchUpdateBlobsRequest()
    batch.requests.add(digest=write_digest(SHA256.of(b"in a batch")), data=b"in a batch")
    call(methods.WRITE.path, write(b"written"))
    call(methods.BATCH_UPDATE_BLOBS.path, batch.SerializeToString())
    call(methods.WRITE.path, write(b"broken off"), whole=False)
    with serving(store) as url, together(url) as (client, _):
        host, _, port = url.removeprefix("grpc://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(peer.data_to_send())
            kept = [SHA256.of(b"written"), SHA256.of(b"in a batch")]
            wait_for(lambda: not client.missing(kept))
        assert client.missing([SHA256.of(b"broken off")])


def test_thousands_of_small_writes_wake_the_loop_a_few_times_and_share_their_syncs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    storing: list[Storing] = []
    make = Storing.__init__

    def noted(self: Storing, *arguments: Any) -> None:
        make(self, *arguments)
        storing.append(self)

    monkeypatch.setattr(Storing, "__init__", noted)
    woken: list[object] = []
    wake = asyncio.BaseEventLoop.call_soon_threadsafe

    def counted(loop: asyncio.BaseEventLoop, *arguments: Any, **options: Any) -> Any:
        woken.append(loop)
        return wake(loop, *arguments, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", counted)
    synced: list[str] = []

    def count(name: str) -> None:
        do = getattr(kernel, name)

        def sync(what: object) -> None:
            synced.append(name)
            do(what)

        monkeypatch.setattr(kernel, name, sync)

    count("syncfs")
    count("fsync_path")
    blobs = [b"%d" % number for number in range(2000)]
    with serving(store) as url, ThreadPoolExecutor(1) as pool:
        uploading = pool.submit(lambda: asyncio.run(upload(url.removeprefix("grpc://"), blobs, 1000, 20)))
        # The threads have what came first; all else gathers meanwhile.
        wait_for(lambda: storing and storing[0].blobs == len(blobs), 90)
        slow.go_on.set()
        assert uploading.result(120) == [len(blob) for blob in blobs]
        wake_ups = sum(loop is storing[0]._loop for loop in woken)
    assert sum(slow.blobs) == len(blobs)
    assert len(slow.blobs) <= 8
    # Once for each group, and for the threads that nothing else needs.
    assert wake_ups <= len(slow.blobs) + 2
    assert synced.count("syncfs") <= 2 * len(slow.blobs)
    # Of the first groups only, which may be small.
    assert synced.count("fsync_path") <= 200
    assert all(store.blobs.is_verified(SHA256.of(blob)) for blob in blobs)
