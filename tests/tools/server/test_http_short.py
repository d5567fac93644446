"""The short way of small uploads over HTTP: what takes it is what aiohttp would see, and its answers are the same."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given
from hypothesis import strategies as st

from store.repository import Store
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import HTTP, SHA256, HttpClient, find_storing, running, wait_for
from tests.tools.server.raw_http import HASH, answer, ask, connected_raw, listens, put, report
from tools.server.http_server import HttpLimits, _Connection
from tools.server.http_short import Fields, count_left, parse_whole_put

MOST = 1 << 16


def test_a_whole_put_is_taken_apart() -> None:
    data = put(b"blob", "User-Agent: Go-http-client/1.1", "Authorization: Bearer x y", path=f"/an/instance/cas/{HASH}")
    request = parse_whole_put(data, 4)
    assert request is not None
    assert request.path == f"/an/instance/cas/{HASH}"
    assert request.fields == Fields("localhost", "Bearer x y")
    assert (request.head + request.body, request.body) == (data, b"blob")


@pytest.mark.parametrize(
    "data",
    [
        put(b"blob")[:-1],
        put(b"blob") + b"x",
        put(b"blob", length=3),
        put(b"12345"),
        put(b"blob", "Transfer-Encoding: chunked"),
        put(b"blob", "Expect: 100-continue"),
        put(b"blob", "Content-Encoding: zstd"),
        put(b"blob", "Content-Length: 4"),
        put(b"blob", "host: elsewhere"),
        put(b"blob", "Connection: close"),
        put(b"blob", "Accept: a\r\n b"),
        put(b"blob", "Accept : a"),
        put(b"blob", "Accept: \xe9"),
        put(b"blob", path=f"/ac/{HASH}"),
        put(b"blob", path=f"/cas/{HASH.upper()}"),
        put(b"blob", path=f"/a%20b/cas/{HASH}"),
        put(b"blob", path=f"/cas/{HASH}?query"),
        put(b"blob", path=f"http://localhost/cas/{HASH}"),
        put(b"blob").replace(b"Host: localhost\r\n", b""),
        put(b"blob").replace(b"Content-Length: 4\r\n", b""),
        put(b"blob").replace(b"Content-Length: 4\r\n", b"Content-Length: +4\r\n"),
        put(b"blob").replace(b"Content-Length: 4\r\n", b"Content-Length: 4 \r\n"),
        put(b"blob").replace(b"Content-Length: 4\r\n", b"X-Content-Length: 4\r\n"),
        put(b"blob").replace(b"PUT", b"GET"),
        put(b"blob").replace(b"HTTP/1.1", b"HTTP/1.0"),
        put(b"blob").replace(b"\r\n", b"\n"),
        put(b"blob", "User-Agent: " + "x" * 5000),
        b"",
    ],
)
def test_what_is_different_in_the_least_goes_the_ordinary_way(data: bytes) -> None:
    assert parse_whole_put(put(b"blob"), 4) is not None
    assert parse_whole_put(data, 4) is None


def ordinary(pieces: list[bytes]) -> list[tuple[Any, Any]]:
    """What aiohttp makes of pieces: messages with their bodies. Raises HttpProcessingError."""

    async def parse() -> list[tuple[Any, Any]]:
        loop = asyncio.get_running_loop()
        parser = HttpRequestParser(BaseProtocol(loop), loop, MOST, max_line_size=8190, max_field_size=8190)
        return [message for piece in pieces for message in parser.feed_data(piece)[0]]

    return asyncio.run(parse())


FIELDS = st.sampled_from(
    [
        "Accept: */*",
        "Accept-Encoding: gzip",
        "Connection: keep-alive",
        "Connection: close",
        "Content-Length: 3",
        "Content-Type: a/b",
        "Expect: 100-continue",
        "Host: other",
        "Transfer-Encoding: chunked",
        "Authorization:  Basic  eA==  ",
        "X-Other: 1",
        "Accept: \t",
        "Accept:",
        " folded",
    ]
)


@given(
    body=st.binary(max_size=40),
    fields=st.lists(FIELDS, max_size=4),
    change=st.tuples(st.integers(0, 200), st.integers(0, 255)) | st.none(),
)
def test_what_goes_the_short_way_is_what_aiohttp_sees(
    body: bytes, fields: list[str], change: tuple[int, int] | None
) -> None:
    data = bytearray(put(body, *fields))
    if change is not None and change[0] < len(data):
        data[change[0]] = change[1]
    request = parse_whole_put(bytes(data), MOST)
    if request is None:
        return
    [(message, payload)] = ordinary([bytes(data)])
    assert (message.method, message.path, message.should_close) == ("PUT", request.path, False)
    assert not (message.upgrade or message.chunked or message.compression)
    assert message.headers["Host"] == request.fields.host
    assert message.headers.get("Authorization") == request.fields.authorization
    assert payload.is_eof() and b"".join(getattr(payload, "_buffer", ())) == request.body


REQUESTS = st.sampled_from(
    [
        b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n\r\n\r\n5",
        b"PUT /a HTTP/1.1\r\nHost: x\r\ncontent-length: 0\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: x\r\nX-Content-Length: 3\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"\r\n",
    ]
)


@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    own=st.booleans(),
)
def test_a_piece_begins_a_request_where_that_is_said(requests: list[bytes], cuts: list[int], own: bool) -> None:
    data = b"".join(requests)
    ends, at = set(), 0
    for request in requests:
        at += len(request)
        ends.add(at)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data)), *(ends if own else ())})
    left: int | None = 0
    for first, last in pairwise(places):
        left = count_left(left, data[first:last])
        assert left is None or left >= 0
        if left == 0:
            assert last in ends
            whole = sum(request != b"\r\n" for request, end in zip(requests, sorted(ends), strict=True) if end <= last)
            try:
                assert len(ordinary([data[:last]])) == whole
            except HttpProcessingError:
                pytest.fail("aiohttp doesn't take it")


# The server.


def test_both_ways_answer_alike_and_take_turns_on_a_connection(casfs: Casfs) -> None:
    blobs = [b"blob %d" % number for number in range(6)]
    requests = [put(blob, path=f"/cas/{SHA256.of(blob).hex}") for blob in blobs]
    with running(casfs, *HTTP) as server, HttpClient(server) as web:
        with connected_raw(server) as connection:
            short = ask(connection, requests[0])
            assert short[0] == 200
            # In two pieces, and several at once: aiohttp's.
            connection.sendall(requests[1][:20])
            assert ask(connection, requests[1][20:]) == short
            connection.sendall(requests[2] + requests[3])
            connection.sendall(requests[4])
            assert [answer(connection) for _ in range(3)] == [short] * 3
            # Sent while the one before is on its way.
            connection.sendall(requests[5])
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer(connection) == short
            assert answer(connection)[2] == b"ok\n"
        for blob in blobs:
            assert web("GET", f"/cas/{SHA256.of(blob).hex}").body == blob
        text = web("GET", "/metrics").body.decode()
        assert re.search(r'casfs_requests_total\{[^}]*method="PUT cas"[^}]*status="200"[^}]*\} 6.0', text), text


def test_what_is_wrong_is_told_by_the_ordinary_way(casfs: Casfs) -> None:
    with running(casfs, *HTTP) as server, connected_raw(server) as connection:
        blob, wrong = b"right", b"wrong"
        path = f"/cas/{SHA256.of(blob).hex}"
        status, _, body = ask(connection, put(wrong, path=path))
        assert status == 400 and b"nothing was stored" in body
        assert ask(connection, put(blob, path=path).replace(b"localhost", b"evil.example"))[0] == 421
        assert ask(connection, put(blob, path=path))[0] == 200


def test_what_the_store_refuses_is_told_by_the_ordinary_way_and_the_connection_goes_on(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--max-size", "1MiB") as server, connected_raw(server) as connection:
        large = bytes(1_000_000)
        assert ask(connection, put(large, path=f"/cas/{SHA256.of(large).hex}"))[0] == 200
        small = b"s" * 60_000
        request = put(small, path=f"/cas/{SHA256.of(small).hex}")
        assert parse_whole_put(request, MOST) is not None
        assert ask(connection, request)[0] == 507
        fits = b"fits"
        assert ask(connection, put(fits, path=f"/cas/{SHA256.of(fits).hex}"))[0] == 200


def test_who_goes_before_the_answer_leaves_its_blob_and_nothing_else(casfs: Casfs) -> None:
    blobs = [b"blob %d" % number for number in range(20)]
    with running(casfs, *HTTP) as server, HttpClient(server) as web:
        for blob in blobs:
            with connected_raw(server) as connection:
                connection.sendall(put(blob, path=f"/cas/{SHA256.of(blob).hex}"))
        wait_for(lambda: all(web("HEAD", f"/cas/{SHA256.of(blob).hex}").status == 200 for blob in blobs))
        wait_for(lambda: web.metrics()["casfs_open_uploads"] == 0)


def test_one_that_waits_is_listed_and_answered_when_the_server_ends(casfs: Casfs) -> None:
    blob = b"blob"
    request = put(blob, path=f"/cas/{SHA256.of(blob).hex}")
    with running(casfs, *HTTP) as server, connected_raw(server) as connection:
        storing = find_storing(server.process.pid)
        os.kill(storing, signal.SIGSTOP)
        try:
            connection.sendall(request)
            wait_for(lambda: "HTTP PUT cas from 127.0.0.1" in report(server))
            server.process.send_signal(signal.SIGTERM)
            # What comes now isn't taken any more.
            connection.sendall(put(b"late", path=f"/cas/{SHA256.of(b'late').hex}"))
            wait_for(lambda: not listens(server.http_address))
            assert server.process.poll() is None
        finally:
            os.kill(storing, signal.SIGCONT)
        status, fields, _ = answer(connection)
        assert status == 200 and "Connection" in fields
        assert connection.recv(1) == b""
        assert server.stop() == 0
    with Store.open(casfs.store) as store:
        assert store.blobs.has(SHA256.of(blob)) and not store.blobs.has(SHA256.of(b"late"))


class Put:
    """What a connection asks of its server: each request is stored when the test says so."""

    def __init__(self) -> None:
        self.draining = False
        self.waiting: list[Callable[[bool], object]] = []

    def begin(self, connection: object, request: object, done: Callable[[bool], object]) -> bool:
        self.waiting.append(done)
        return True


class Written(asyncio.Transport):
    """A connection's other side."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[bytes] = []
        self.reads: list[bool] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.answers.append(bytes(data))

    def pause_reading(self) -> None:
        self.reads.append(False)

    def resume_reading(self) -> None:
        self.reads.append(True)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


class Pair:
    """A connection within this process, `short` and all, whose ordinary way answers with 202."""

    def __init__(self) -> None:
        self.short, self.transport = Put(), Written()
        limits = HttpLimits()
        loop = asyncio.get_running_loop()
        short = cast("Any", self.short)
        server = web.Server(self.handle)
        self.connection = _Connection(server, limits.idle_seconds, short, loop=loop, **limits.options())
        self.connection.connection_made(self.transport)

    async def handle(self, request: web.BaseRequest) -> web.Response:
        await request.read()
        return web.Response(status=202)

    async def statuses(self, number: int) -> list[bytes]:
        """Of so many answers, when they are there."""
        for _ in range(10_000):
            if b"".join(self.transport.answers).count(b"HTTP/1.1 ") >= number:
                break
            await asyncio.sleep(0)
        return re.findall(rb"HTTP/1.1 (\d+)", b"".join(self.transport.answers))


def within(test: Callable[[Pair], Awaitable[object]]) -> None:
    async def run() -> None:
        pair = Pair()
        await asyncio.sleep(0)
        await test(pair)
        pair.connection.connection_lost(None)

    asyncio.run(run())


def test_a_request_makes_no_task_and_no_timer() -> None:
    async def test(pair: Pair) -> None:
        made: list[object] = []
        loop = asyncio.get_running_loop()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "create_task", made.append)
            patch.setattr(loop, "call_at", lambda *arguments, **options: made.append(arguments))
            for number in range(100):
                pair.connection.data_received(put(b"%d" % number))
                pair.short.waiting.pop()(True)
        assert len(pair.transport.answers) == 100
        assert made == []

    within(test)


@pytest.mark.parametrize("cut", [0, -3, -6])
def test_after_a_request_with_a_body_of_the_ordinary_way_the_next_goes_the_short_one(cut: int) -> None:
    async def test(pair: Pair) -> None:
        other = put(b"result", path=f"/ac/{HASH}")
        for number in range(1, 4):
            for piece in (other[:cut], other[cut:]) if cut else (other,):
                pair.connection.data_received(piece)
                await asyncio.sleep(0)
            assert await pair.statuses(2 * number - 1) == [b"202", b"200"] * (number - 1) + [b"202"]
            # Until aiohttp waits for a head again.
            for _ in range(10):
                await asyncio.sleep(0)
            pair.connection.data_received(put(b"blob"))
            [done] = pair.short.waiting
            pair.short.waiting.clear()
            done(True)
            assert await pair.statuses(2 * number) == [b"202", b"200"] * number

    within(test)


def test_what_comes_behind_one_that_waits_stops_reading_until_it_is_answered() -> None:
    async def test(pair: Pair) -> None:
        pair.connection.data_received(put(b"blob"))
        # aiohttp's own way to have more parsed: nothing that came.
        pair.connection.data_received(b"")
        assert pair.transport.reads == []
        pair.connection.data_received(put(b"next"))
        assert pair.transport.reads == [False]
        pair.short.waiting.pop(0)(True)
        assert pair.transport.reads == [False, True]
        pair.short.waiting.pop(0)(True)
        assert await pair.statuses(2) == [b"200", b"200"]

    within(test)


def test_a_client_that_takes_no_answers_goes_the_ordinary_way_which_waits() -> None:
    async def test(pair: Pair) -> None:
        pair.connection.pause_writing()
        pair.connection.data_received(put(b"blob"))
        assert pair.short.waiting == []
        pair.connection.resume_writing()
        assert await pair.statuses(1) == [b"202"]

    within(test)
