"""What is under way can be seen: how old each call is and what it waits for, in the log, on a page, at debug level."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio
import pytest

from store.digest import Digest
from store.errors import StoreError
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import HTTP, SHA256, Client, HttpClient, connected, running, wait_for
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.resource_names import ResourceName
from tools.server import calls_under_way
from tools.server.access import Anybody
from tools.server.address import Address
from tools.server.calls_under_way import LINES_MOST, STALLED_SECONDS, CallsUnderWay, CallUnderWay, count_rest, group
from tools.server.grpc_server import GrpcServer
from tools.server.limits import GrpcLimits
from tools.server.services import Services
from tools.server.waiting import Waiting
from tools.server.waits import Reason, find_mark, waiting_for


def call(number: int, began: float, moved: float | None = None, **changes: Any) -> CallUnderWay:
    moved = began if moved is None else moved
    return CallUnderWay(number, "Write", "10.0.0.1", 3, began, moved, Reason.TURN)._replace(**changes)


def test_calls_that_are_alike_are_one_line_and_the_oldest_is_first() -> None:
    calls = [
        call(1, 90.0, 95.0, method="Read", connection=4, reason=Reason.CLIENT),
        *(call(number, 60.0 + number) for number in range(2, 12)),
        call(20, 99.0, client="", reason=Reason.STORE),
    ]
    assert [str(one) for one in group(calls, 100.0)] == [
        (
            "Write from 10.0.0.1, connection 3: 10 calls, 29.0 to 38.0 s old, up to 38.0 s without progress, "
            "wait for a turn for a large upload"
        ),
        "Read from 10.0.0.1, connection 4: 10.0 s old, 5.0 s without progress, waits for the client to take the answer",
        "Write from a local client, connection 3: 1.0 s old, 1.0 s without progress, waits for the store",
    ]


def test_connections_of_a_client_are_put_together_where_they_are_many() -> None:
    calls = [call(number, 100.0 - number % 7, connection=number) for number in range(LINES_MOST)]
    assert len(group(calls, 100.0)) == LINES_MOST
    calls.append(call(LINES_MOST, 90.0, connection=LINES_MOST))
    assert [str(one) for one in group(calls, 100.0)] == [
        (
            "Write from 10.0.0.1, 101 connections: 101 calls, 0.0 to 10.0 s old, up to 10.0 s without progress, "
            "wait for a turn for a large upload"
        )
    ]


class Listed:
    """Calls of a loop that runs in a thread."""

    def __init__(self) -> None:
        self.calls: list[CallUnderWay] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.under_way = CallsUnderWay(self.loop)
        self.under_way.add(lambda waiting: self.calls)

    def report(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        self.under_way.report()
        for thread in threading.enumerate():
            if thread.name == "report":
                thread.join(20)
        return [record.getMessage() for record in caplog.records]


@pytest.fixture
def listed(caplog: pytest.LogCaptureFixture) -> Iterator[Listed]:
    caplog.set_level(logging.INFO, "casfs")
    one = Listed()
    one.thread.start()
    yield one
    one.loop.call_soon_threadsafe(one.loop.stop)
    one.thread.join()
    one.loop.close()


def test_a_report_has_at_most_so_many_lines_and_a_count_of_the_rest(
    listed: Listed, caplog: pytest.LogCaptureFixture
) -> None:
    now = time.monotonic()
    listed.calls = [call(number, now - number, client=f"10.0.0.{number // 2}") for number in range(2 * LINES_MOST + 6)]
    first, *those, last = listed.report(caplog)
    assert first.startswith("SIGUSR1: 206 calls under way; threads: ")
    assert len(those) == LINES_MOST
    assert re.search(r"10\.0\.0\.102, connection 3: 2 calls, 204\.\d to 205\.\d s old", those[0])
    assert last == "under way: and 6 calls more"
    assert count_rest(group(listed.calls, now), 102) == 2


def test_a_report_is_written_whatever_the_level(listed: Listed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "casfs")
    assert listed.report(caplog)[0].startswith("SIGUSR1: 0 calls under way")


def test_a_loop_that_hangs_is_reported_with_the_threads(
    listed: Listed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls_under_way, "_ASK_SECONDS", 0.1)
    go_on = threading.Event()
    listed.loop.call_soon_threadsafe(go_on.wait, 20)
    try:
        [line] = listed.report(caplog)
    finally:
        go_on.set()
    assert line.startswith("SIGUSR1: the event loop has not answered in 0.1 s; threads: ")


def test_a_call_without_progress_has_one_debug_line(listed: Listed, caplog: pytest.LogCaptureFixture) -> None:
    now = time.monotonic()
    listed.calls = [call(1, now - STALLED_SECONDS - 1), call(2, now - STALLED_SECONDS - 1, now)]
    listed.under_way.look()
    assert caplog.records == [], "no debug lines were asked for"
    caplog.set_level(logging.DEBUG, "casfs")
    for _ in range(3):
        listed.under_way.look()
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("no progress: Write from 10.0.0.1, connection 3: 11.")
    listed.calls = []
    listed.under_way.look()
    listed.calls = [call(1, now - STALLED_SECONDS - 1)]
    listed.under_way.look()
    assert len(caplog.records) == 2, "it is another call"


def test_marks_are_those_of_the_innermost_wait() -> None:
    async def main() -> None:
        task = asyncio.current_task()
        assert find_mark(task) is None
        with waiting_for(Reason.CLIENT):
            with waiting_for(Reason.TURN):
                inner = find_mark(task)
                assert inner is not None and inner.find_reason(frozenset()) is Reason.TURN
            outer = find_mark(task)
            assert outer is not None and outer.find_reason(frozenset()) is Reason.CLIENT
        assert find_mark(task) is None

    asyncio.run(main())


def test_a_task_that_waits_for_threads_says_whether_it_has_one() -> None:
    async def main() -> None:
        waiting, go_on = Waiting(60.0, threads=1), threading.Event()
        tasks = [asyncio.create_task(waiting.in_thread(go_on.wait, 20)) for _ in range(2)]
        reasons: list[Reason] = []
        while reasons != [Reason.WORK, Reason.THREAD]:
            await asyncio.sleep(0.001)
            reasons = [mark.find_reason(frozenset()) for task in tasks if (mark := find_mark(task)) is not None]
        go_on.set()
        await asyncio.gather(*tasks)
        waiting.close()

    asyncio.run(main())


def test_what_each_call_waits_for_is_known(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that hangs, one turn for large uploads, a client that sends half, one that reads nothing."""
    release = threading.Event()
    add_all = services.uploads.add_all

    def hang(blobs: Any) -> list[StoreError | None]:
        release.wait(30)
        return list(add_all(blobs))

    large = os.urandom(1 << 20)
    [refused] = add_all([(SHA256.of(bytes(8 << 20)), bytes(8 << 20))])
    assert refused is None
    monkeypatch.setattr(services.uploads, "add_all", hang)

    def write_request(data: bytes, part: int, digest: Digest | None = None) -> bytes:
        name = str(ResourceName("", digest or SHA256.of(data), upload="u"))
        message = bytestream.WriteRequest(resource_name=name, data=data[:part], finish_write=part >= len(data))
        return message.SerializeToString()

    async def main() -> None:
        server = GrpcServer(services, Anybody(), GrpcLimits(uploads=1))
        port = await server.start(Address("127.0.0.1", 0), None)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def begin(data: bytes, part: int) -> Any:
                one: Any = channel.stream_unary(methods.WRITE.path)()
                await one.write(write_request(data, part))
                return one

            def found() -> dict[str, list[str]]:
                seen: dict[str, list[str]] = {}
                for one in server.under_way(server.gate.waiting_blobs()):
                    seen.setdefault(one.reason.name, []).append(one.method)
                return seen

            async def until(expected: dict[str, list[str]]) -> None:
                for _ in range(1000):
                    if found() == expected:
                        return
                    await asyncio.sleep(0.01)
                assert found() == expected

            # In this order, so that each has come to where it stays before the next one begins.
            calls = [await begin(large, 1000)]
            await until({"MESSAGE": ["Write"]})
            calls.append(await begin(large[1:], 1000))
            await until({"MESSAGE": ["Write"], "TURN": ["Write"]})
            calls.append(await begin(b"small", 5))
            await until({"MESSAGE": ["Write"], "TURN": ["Write"], "STORE": ["Write"]})
            name = str(ResourceName("", SHA256.of(bytes(8 << 20))))
            request = bytestream.ReadRequest(resource_name=name).SerializeToString()
            read: Any = channel.unary_stream(methods.READ.path)
            calls.append(read(request))
            await until({"MESSAGE": ["Write"], "TURN": ["Write"], "STORE": ["Write"], "CLIENT": ["Read"]})
            assert server.pressure()[2:] == (1, 1, 0)
            [oldest] = [one for one in server.under_way(frozenset()) if one.reason is Reason.TURN]
            now = asyncio.get_running_loop().time()
            assert oldest.began <= oldest.moved <= now
            assert now - oldest.moved == pytest.approx(server.oldest_wait(now), abs=0.5)
            release.set()
            for one in calls:
                one.cancel()
            await until({})
        await server.drain(1)
        server.close()

    try:
        asyncio.run(main())
    finally:
        release.set()


def stall(client: Client, data: bytes, size: int, executor: ThreadPoolExecutor, go_on: threading.Event) -> None:
    """Begin an upload that sends no more after `size` bytes."""

    def messages() -> Iterator[bytestream.WriteRequest]:
        name = str(ResourceName("", SHA256.of(data), upload="u"))
        yield bytestream.WriteRequest(resource_name=name, data=data[:size])
        go_on.wait(60)

    executor.submit(client.call, methods.WRITE, messages())


def under_way(casfs: Casfs) -> list[str]:
    return re.findall(r"INFO under way: (.*)", (casfs.store / "casfs.log").read_text())


@pytest.mark.parametrize("options", [(), HTTP], ids=["grpc", "counted"])
def test_a_signal_has_a_stalled_upload_written_to_the_log(casfs: Casfs, options: tuple[str, ...]) -> None:
    go_on = threading.Event()
    with (
        ThreadPoolExecutor() as executor,
        running(casfs, "--max-uploads", "1", *options) as server,
        connected(server) as client,
    ):
        try:
            for _ in range(3):
                stall(client, os.urandom(1 << 20), 1000, executor, go_on)
                wait_for(lambda: list((casfs.store / "tmp").rglob("*")))

            def ask() -> list[str]:
                server.process.send_signal(signal.SIGUSR1)
                time.sleep(0.1)
                return under_way(casfs)[-2:]

            wait_for(lambda: any("2 calls" in line for line in ask()))
            waits = {re.sub(r"[\d.]+ s|[\d.]+ to ", "…", line) for line in ask()}
            assert waits == {
                "Write from 127.0.0.1, connection 1: … old, … without progress, waits for its message",
                (
                    "Write from 127.0.0.1, connection 1: 2 calls, …… old, up to … without progress, "
                    "wait for a turn for a large upload"
                ),
            }
        finally:
            go_on.set()
        assert server.process.poll() is None, "the signal ends nothing"


def test_a_signal_to_several_processes_has_each_of_them_report(casfs: Casfs) -> None:
    with running(casfs, "--processes", "2") as server:
        server.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: (casfs.store / "casfs.log").read_text().count("SIGUSR1: 0 calls under way") == 2)


def test_the_page_shows_calls_and_requests_to_those_who_may_read(casfs: Casfs) -> None:
    tokens = casfs.directory / "tokens"
    tokens.write_text("read reader-token\nwrite writer-token\n")
    go_on = threading.Event()
    options = (*HTTP, "--max-uploads", "2", "--tokens", tokens)
    with (
        ThreadPoolExecutor() as executor,
        running(casfs, *options) as server,
        connected(server, token="writer-token") as client,
        HttpClient(server, authorization="Bearer reader-token") as web,
        HttpClient(server) as stranger,
    ):
        assert stranger("GET", "/calls").status == 401
        host, _, port = server.http_address.rpartition(":")
        putting = http.client.HTTPConnection(host, int(port), timeout=30)
        try:
            stall(client, os.urandom(1 << 20), 1000, executor, go_on)
            putting.putrequest("PUT", f"/cas/{'0' * 64}")
            putting.putheader("Content-Length", str(1 << 20))
            putting.putheader("Authorization", "Bearer writer-token")
            putting.endheaders(b"the beginning")
            stall(client, os.urandom(1 << 20), 1000, executor, go_on)
            # The page's own request is under way, too.
            wait_for(lambda: web("GET", "/calls").body.count(b"<tr>") >= 4)
            wait_for(lambda: b"turn for a large upload" in web("GET", "/calls").body)
            page = web("GET", "/calls").body.decode()
            for text in ("<td>Write</td>", "<td>HTTP PUT cas</td>", "<td>HTTP GET page</td>", "<td>its message</td>"):
                assert text in page
            top = web("GET", "/").body.decode()
            assert "0 calls and 1 upload wait" in top
            assert '<a href="/calls">' in top
        finally:
            go_on.set()
            putting.close()
        wait_for(lambda: "upload wait" not in web("GET", "/").body.decode())


def test_the_level_of_the_log_can_be_chosen(casfs: Casfs) -> None:
    go_on = threading.Event()
    with (
        ThreadPoolExecutor() as executor,
        running(casfs, "--log-level", "debug") as server,
        connected(server) as client,
    ):
        try:
            stall(client, os.urandom(1 << 20), 1000, executor, go_on)
            log = casfs.store / "casfs.log"
            wait_for(lambda: "DEBUG no progress: Write from 127.0.0.1, connection 1: 1" in log.read_text(), 40)
        finally:
            go_on.set()
    assert log.read_text().count("no progress") == 1
