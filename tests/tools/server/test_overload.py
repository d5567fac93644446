"""Overload is said: once when it begins, once when it ends; in numbers for whoever asks."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from store.digest import Digest
from store.errors import StoreError
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import HTTP, SHA256, HttpClient, connected, running, wait_for
from tools.config import Settings
from tools.http2.stream import STREAM_WINDOW, TURN_WINDOW
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.resource_names import ResourceName
from tools.server import gate, http2_calls, load, serve, storing
from tools.server.gate import Client, Gate, settle_future
from tools.server.http_server import HttpLimits
from tools.server.load import Load
from tools.server.metrics import _WAITING, Metrics, Sizes
from tools.server.overload import CLEAR_SECONDS, Overload, Pressure
from tools.server.waits import Reason, find_place


class Busy:
    """A server that has as much to do as it is told, and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waiting = Pressure()
        self.oldest = 0.0
        self.full = False
        self.begun = 0
        self.overload = Overload(self, self.begin, lambda: self.now)

    def begin(self) -> None:
        self.begun += 1

    def pressure(self) -> Pressure:
        return self.waiting

    def oldest_wait(self, now: float) -> float:
        return self.oldest

    def take_full(self) -> bool:
        full, self.full = self.full, False
        return full

    def pass_seconds(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1
            self.overload.look()


@pytest.fixture
def busy(caplog: pytest.LogCaptureFixture) -> Busy:
    caplog.set_level(logging.INFO, "casfs")
    return Busy()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_it_is_said_once_when_it_begins_and_once_when_it_ends(busy: Busy, caplog: pytest.LogCaptureFixture) -> None:
    busy.pass_seconds(10)
    assert lines(caplog) == []
    busy.full, busy.waiting = True, Pressure(8000, 3 << 20, 12, 512, 1)
    busy.pass_seconds(1)
    [line] = lines(caplog)
    assert line.startswith("overloaded: 8,000 calls and 12 uploads wait (3.0 MiB), 1 connection is not read, ")
    assert "--remote_timeout" in line and "docs/overload.md" in line
    for calls in (100, 9000, 200):
        busy.full, busy.waiting, busy.oldest = True, Pressure(calls), 2.0
        busy.pass_seconds(1)
    assert lines(caplog) == []
    assert (busy.overload.is_on, busy.begun) == (True, 1)
    busy.oldest = 0.5
    busy.pass_seconds(CLEAR_SECONDS - 1)
    assert lines(caplog) == []
    busy.pass_seconds(20)
    assert lines(caplog) == [
        (
            "no longer overloaded, after 8 s; at most 9,000 calls and 12 uploads wait (3.0 MiB), "
            "1 connection is not read, the oldest for 2.0 s"
        )
    ]
    assert not busy.overload.is_on


def test_a_short_pause_does_not_end_it(busy: Busy, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(10):
        busy.full = True
        busy.pass_seconds(CLEAR_SECONDS - 1)
    assert (len(lines(caplog)), busy.begun) == (1, 1)


def test_a_long_wait_is_overload_though_everybody_is_read(busy: Busy, caplog: pytest.LogCaptureFixture) -> None:
    busy.oldest = 1.0
    busy.pass_seconds(5)
    assert lines(caplog) == []
    busy.oldest = 1.1
    busy.pass_seconds(1)
    assert len(lines(caplog)) == 1


def test_a_server_that_ends_meanwhile_says_how_it_was(busy: Busy, caplog: pytest.LogCaptureFixture) -> None:
    busy.overload.end()
    assert lines(caplog) == []
    busy.full = True
    busy.pass_seconds(3)
    busy.overload.end()
    assert lines(caplog)[-1].startswith("no longer overloaded, after 2 s")


def test_a_full_load_is_remembered_until_it_is_looked_at() -> None:
    load = Load(calls_most=4)
    for _ in range(4):
        load.hold("busy", 1)
    assert not load.was_full
    assert load.leave("busy", lambda: None)
    for _ in range(4):
        load.release("busy", 1)
    assert (load.is_full, load.was_full) == (False, True)


def test_the_metrics_have_what_waits_when_they_are_asked(busy: Busy) -> None:
    metrics = Metrics(lambda: Sizes(0, 0))
    metrics.watch_overload(busy.overload)
    assert metrics.waiting() == (Pressure(), False)
    busy.waiting, busy.full = Pressure(7, 6, 5, 4, 3), True
    busy.overload.look()
    metrics.note_overload()
    text = metrics.render()[0].decode()
    for line in (
        "casfs_waiting_calls 7.0",
        "casfs_waiting_bytes 6.0",
        "casfs_waiting_uploads 5.0",
        "casfs_storing_blobs 4.0",
        "casfs_unread_connections 3.0",
        "casfs_overloaded 1.0",
        "casfs_overloads_total 1.0",
    ):
        assert f"\n{line}\n" in text
    assert metrics.waiting() == (busy.waiting, True)


def test_what_waits_for_a_store_is_counted_and_known_by_its_place() -> None:
    release = threading.Event()

    def store(blobs: Sequence[tuple[Digest, bytes]]) -> list[StoreError | None]:
        release.wait(20)
        return [None] * len(blobs)

    async def main() -> None:
        gate, loop = Gate(store, Load(), turns=1), asyncio.get_running_loop()
        began = loop.time()
        blobs = [bytes((number,)) * (5 << 20) for number in range(6)]
        digests = [SHA256.of(data) for data in blobs]
        done = [loop.create_future() for _ in blobs]
        try:
            assert gate.oldest() is None
            for data, digest, one in zip(blobs, digests, done, strict=True):
                gate.add(Client(None, 1), digest, data, partial(settle_future, one))
            # 12 MiB are given to the store's threads at a time, and a little over.
            assert (gate.storing, gate.waiting, gate.load.calls, gate.load.bytes) == (3, 3, 3, 15 << 20)
            waiting = gate.waiting_blobs()
            assert waiting == set(digests[3:])
            assert [find_place([digest], waiting) for digest in digests[2:4]] == [Reason.STORE, Reason.ROOM]
            assert find_place(digests, waiting) is Reason.ROOM
            oldest = gate.oldest()
            assert oldest is not None and began <= oldest <= loop.time()
        finally:
            release.set()
        assert await asyncio.gather(*done) == [None] * 6
        assert gate.oldest() is None
        gate.close()

    asyncio.run(main())


def test_uploads_that_wait_for_a_turn_are_counted_until_they_give_up() -> None:
    async def main() -> None:
        gate = Gate(lambda blobs: [None] * len(blobs), Load(), turns=1)

        async def take() -> None:
            async with gate.turn(Client(None, 1)):
                await asyncio.sleep(20)

        tasks = [asyncio.create_task(take()) for _ in range(3)]
        await asyncio.sleep(0)
        assert gate.waiting_turns == 2
        assert gate.oldest() is not None
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks[1:])
        assert (gate.waiting_turns, gate.oldest()) == (0, None)
        tasks[0].cancel()
        await asyncio.wait(tasks)
        gate.close()

    asyncio.run(main())


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_server_shows_its_numbers(casfs: Casfs, processes: str) -> None:
    with running(casfs, *HTTP, "--processes", processes) as server, connected(server) as client:
        client.add(b"one")
        with HttpClient(server) as web:
            numbers = web.metrics()
            for name in ("waiting_calls", "waiting_bytes", "waiting_uploads", "storing_blobs", "unread_connections"):
                assert numbers[f"casfs_{name}"] == 0
            assert (numbers["casfs_overloaded"], numbers["casfs_overloads_total"]) == (0, 0)
            assert "Overloaded" not in web("GET", "/").body.decode()


def test_uploads_that_wait_too_long_are_overload_until_they_are_gone(casfs: Casfs) -> None:
    go_on = threading.Event()

    def messages(name: str) -> Iterator[bytestream.WriteRequest]:
        yield bytestream.WriteRequest(resource_name=name, data=bytes(1000))
        go_on.wait(60)

    def said() -> list[str]:
        return [line for line in (casfs.store / "casfs.log").read_text().splitlines() if "overloaded" in line]

    with (
        ThreadPoolExecutor() as executor,
        running(casfs, *HTTP, "--max-uploads", "1") as server,
        connected(server) as client,
        HttpClient(server) as web,
    ):
        try:
            for number in range(3):
                name = str(ResourceName("", SHA256.of(bytes((number,))), upload="u")).rpartition("/")[0] + "/1000000"
                executor.submit(client.call, methods.WRITE, messages(name))
            wait_for(said)
            numbers = web.metrics()
            assert (numbers["casfs_waiting_uploads"], numbers["casfs_overloaded"]) == (2, 1)
            assert numbers["casfs_overloads_total"] == 1
            assert "Overloaded: 0 calls and 2 uploads wait" in web("GET", "/").body.decode()
        finally:
            go_on.set()
        wait_for(lambda: len(said()) == 2)
        assert web.metrics()["casfs_overloaded"] == 0
    begin, end = said()
    assert (
        "WARNING overloaded: 0 calls and 2 uploads wait (2.0 KiB), 0 connections are not read, the oldest for " in begin
    )
    assert "INFO no longer overloaded, after " in end


PAGE = Path(__file__).parents[3] / "docs" / "overload.md"


def test_the_page_for_operators_has_the_bounds_of_the_code() -> None:
    text = PAGE.read_text()
    settings = Settings(Path("/nowhere"))
    for what, *bounds in (
        ("calls and blobs that wait for their turn", f"{load._CALLS_MOST:,} or {load._BYTES_MOST >> 20} MiB"),
        (
            "and of one connection whatever the others do",
            f"{load._OWN_LEAST} calls; {http2_calls._BEFORE_MOST} while a call that is begun waits for its client",
        ),
        ("messages of over 32 KiB (batches) on their way here", f"{load._COMING_MOST >> 20} MiB"),
        ("connections and files that are open", f"{serve._OPEN_MOST:,}"),
        ("calls of a connection", f"{settings.serve_max_streams:,}"),
        ("bytes of an upload before its turn", f"{STREAM_WINDOW >> 10} KiB"),
        ("bytes of an upload that has its turn, not yet taken", f"{TURN_WINDOW >> 10} KiB"),
        ("large uploads taken at a time", f"{settings.serve_max_uploads}"),
        ("small blobs that the store's threads have", f"{gate._BLOBS_MOST:,}, {gate._BYTES_MOST >> 20} MiB"),
        ("small blobs in one sync", f"{storing._GROUP_BLOBS}, {storing._GROUP_BYTES >> 20} MiB"),
        ("one message", f"{settings.serve_max_message >> 20} MiB"),
        ("silence in a stream, or of a client that takes no answer", f"{settings.serve_idle_timeout} s"),
        ("silence between two requests over HTTP", f"{HttpLimits().kept_seconds / 60:g} min"),
    ):
        for bound in bounds:
            assert f"| {what} | {bound}" in text, (what, bound)
    for reason in Reason:
        assert f"| {reason.value.partition(' (')[0]} |" in text
    for about, _ in _WAITING.values():
        assert f"`{about}`" in text


@pytest.mark.parametrize("page", sorted(PAGE.parent.rglob("*.md")), ids=lambda page: page.name)
def test_what_the_pages_link_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
