"""gRPC on our own HTTP/2, spoken to byte by byte: what clients that are well-behaved never send."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import cycle, pairwise
from typing import Any, cast

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import given
from hypothesis import strategies as some

from store.digest import DigestFunction
from tools.http2 import frames
from tools.http2.headers import Malformed
from tools.http2.hpack import encode
from tools.reapi.generated.status_pb2 import Status
from tools.reapi.methods import Method
from tools.server.address import ACCEPTED_MOST, Address
from tools.server.calls import Endpoint
from tools.server.errors import FailedPrecondition, NotThere
from tools.server.http2_calls import ConnectionCalls
from tools.server.http2_heads import Head, Routes
from tools.server.http2_server import Http2Server
from tools.server.limits import GrpcLimits
from tools.server.load import Load

LIMITS = GrpcLimits(message_bytes=1 << 20, header_bytes=4096, streams=10, idle_seconds=0.4)
ECHO = Method("test.Echo", "Echo", BytesValue, BytesValue)
LATE = ECHO._replace(name="Late")
FAILING = ECHO._replace(name="Failing")
LACKING = ECHO._replace(name="Lacking")
MANY = ECHO._replace(name="Many", streams_out=True)
SUM = ECHO._replace(name="Sum", streams_in=True)
KEPT = ECHO._replace(name="Kept")
KEPT_SUM = ECHO._replace(name="KeptSum", streams_in=True)


class Endpoints:
    """Odd ones. `cancelled`: once for each call that was broken off."""

    def __init__(self) -> None:
        self.cancelled: asyncio.Semaphore = asyncio.Semaphore(0)
        self.written = 0
        self.begun: list[bytes] = []

    def all(self) -> list[Endpoint]:
        return [
            Endpoint(ECHO, self.echo),
            Endpoint(LATE, self.late),
            Endpoint(FAILING, self.fail),
            Endpoint(LACKING, self.lack),
            Endpoint(MANY, self.many),
            Endpoint(SUM, self.sum),
            Endpoint(KEPT, self.echo, keeps=True),
            Endpoint(KEPT_SUM, self.take, keeps=True),
        ]

    def echo(self, raw: bytes, call: Any) -> bytes:
        self.begun.append(raw)
        return raw

    def take(self, messages: Any, call: Any) -> bytes:
        self.begun.append(messages.take())
        return b""

    async def late(self, raw: bytes, call: Any) -> bytes:
        try:
            await asyncio.sleep(float(raw))
        except asyncio.CancelledError:
            self.cancelled.release()
            raise
        return raw

    def fail(self, raw: bytes, call: Any) -> bytes:
        raise NotThere(raw.decode())

    def lack(self, raw: bytes, call: Any) -> bytes:
        raise FailedPrecondition("a blob is missing", [DigestFunction.SHA256.of(raw)])

    async def many(self, raw: bytes, call: Any) -> None:
        try:
            for _ in range(int(raw)):
                await call.write(bytes(100 << 10))
                self.written += 1
        except asyncio.CancelledError:
            self.cancelled.release()
            raise

    async def sum(self, raws: AsyncIterator[bytes], call: Any) -> bytes:
        return b"%d" % sum([int(raw) async for raw in raws])


class Peer:
    """A client's end: the other implementation on a real socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.events: list[Any] = []
        self.closed = False

    def begin(self, path: str, *more: tuple[str, str], method: str = "POST", kind: str = "application/grpc") -> int:
        """The headers of a call; its stream."""
        stream = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "here")]
        self.h2.send_headers(stream, [*head, ("content-type", kind), ("te", "trailers"), *more])
        return stream

    def send(self, stream: int, *messages: bytes, end: bool = True, flag: int = 0) -> None:
        """Messages, with their prefixes."""
        for message in messages:
            self.h2.send_data(stream, struct.pack(">BI", flag, len(message)) + message)
        if end:
            self.h2.end_stream(stream)

    def call(self, path: str, *messages: bytes, more: Any = (), flag: int = 0) -> int:
        """A whole call."""
        stream = self.begin(path, *more)
        self.send(stream, *messages, flag=flag)
        return stream

    async def until(self, condition: Callable[[], object], seconds: float = 20) -> None:
        """Exchange bytes until it holds."""
        async with asyncio.timeout(seconds):
            while not condition():
                self.writer.write(self.h2.data_to_send())
                data = await self.reader.read(1 << 16)
                if not data:
                    self.closed = True
                    assert condition(), "the server closed the connection"
                    return
                self.events += self.h2.receive_data(data)
            self.writer.write(self.h2.data_to_send())

    def ended(self, stream: int) -> bool:
        return any(
            isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)) and event.stream_id == stream
            for event in self.events
        )

    async def answer(self, stream: int) -> tuple[dict[str, str], bytes]:
        """All its headers and trailers, and what came between."""
        await self.until(lambda: self.ended(stream))
        headers: dict[str, str] = {}
        body = b""
        for event in self.events:
            if getattr(event, "stream_id", None) == stream:
                if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                    headers |= {str(name): str(value) for name, value in event.headers}
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
        return headers, body


@asynccontextmanager
async def serving(endpoints: Endpoints, limits: GrpcLimits = LIMITS) -> AsyncIterator[tuple[Http2Server, Address]]:
    server = Http2Server(endpoints.all(), limits)
    port = await server.start(Address("127.0.0.1", 0), None)
    try:
        yield server, Address("127.0.0.1", port)
    finally:
        await server.drain(0)


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()


def run(test: Callable[[Peer, Endpoints, Http2Server], Any], limits: GrpcLimits = LIMITS) -> None:
    async def main() -> None:
        endpoints = Endpoints()
        async with serving(endpoints, limits) as (server, address), connected(address) as peer:
            await test(peer, endpoints, server)

    asyncio.run(main())


def prefixed(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


def test_one_message_is_answered_by_one() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        for message in (b"", b"abc", bytes(300 << 10), bytes((1 << 20) - 100)):
            stream = peer.begin(ECHO.path)
            data = prefixed(message)
            while data:
                await peer.until(partial(peer.h2.local_flow_control_window, stream))
                size = min(len(data), peer.h2.local_flow_control_window(stream), peer.h2.max_outbound_frame_size)
                peer.h2.send_data(stream, data[:size], end_stream=size == len(data))
                data = data[size:]
            peer.h2.increment_flow_control_window(2 << 20)
            peer.h2.increment_flow_control_window(2 << 20, stream)
            headers, body = await peer.answer(stream)
            assert headers[":status"] == "200"
            assert headers["content-type"] == "application/grpc"
            assert headers["grpc-status"] == "0"
            assert body == prefixed(message)

    run(test)


@pytest.mark.parametrize(
    ("path", "messages", "more", "flag", "code", "says"),
    [
        ("/test.Echo/Nothing", [b""], [], 0, 12, "there is no method /test.Echo/Nothing"),
        (ECHO.path, [], [], 0, 3, "one message"),
        (ECHO.path, [b"a", b"b"], [], 0, 3, "one message"),
        (ECHO.path, [b"a"], [], 1, 3, "grpc-encoding"),
        (ECHO.path, [b"a"], [("grpc-encoding", "snappy")], 0, 12, "snappy"),
        (ECHO.path, [b"abc"], [("grpc-encoding", "gzip")], 1, 3, "no gzip"),
        (ECHO.path, [gzip.compress(b"abc")[:-3]], [("grpc-encoding", "gzip")], 1, 3, "cut short"),
        (ECHO.path, [gzip.compress(bytes(2 << 20))], [("grpc-encoding", "gzip")], 1, 8, "expands"),
        (ECHO.path, [b"a"], [("x-long", "v" * 4096)], 0, 8, "headers of"),
        (FAILING.path, ["no such thing: 100% \u00fc\n".encode()], [], 0, 5, "no such thing: 100%25 %C3%BC%0A"),
        (FAILING.path, [b"x" * 9000], [], 0, 5, "xxx"),
        (FAILING.path, ["\u00fc".encode() * 2000], [], 0, 5, "%C3%BC%C3"),
        (FAILING.path, [b"\xff"], [], 0, 13, "internal"),
        (LATE.path, [b"30"], [("grpc-timeout", "50m")], 0, 4, "deadline"),
        (SUM.path, [b"1", b"two"], [], 0, 13, "internal"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_the_trailers(
    path: str, messages: list[bytes], more: Any, flag: int, code: int, says: str
) -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        stream = peer.call(path, *messages, more=more, flag=flag)
        headers, body = await peer.answer(stream)
        assert (headers[":status"], headers["grpc-status"]) == ("200", str(code))
        assert says in headers["grpc-message"]
        assert len(headers["grpc-message"]) <= 4096
        assert not body
        headers, body = await peer.answer(peer.call(ECHO.path, b"and on it goes"))
        assert (headers["grpc-status"], body) == ("0", prefixed(b"and on it goes"))

    run(test)


@pytest.mark.parametrize(
    ("method", "kind", "status"),
    [("GET", "application/grpc", "405"), ("POST", "text/plain", "415"), ("POST", "application/grpcx", "415")],
)
def test_what_is_no_grpc_gets_a_status_of_http(method: str, kind: str, status: str) -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        stream = peer.begin(ECHO.path, method=method, kind=kind)
        peer.send(stream, b"")
        headers, _ = await peer.answer(stream)
        assert headers[":status"] == status

    run(test)


@pytest.mark.parametrize("kind", ["application/grpc+proto", "application/grpc;charset=x"])
def test_kinds_of_grpc_are_grpc(kind: str) -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        stream = peer.begin(ECHO.path, kind=kind)
        peer.send(stream, b"x")
        assert (await peer.answer(stream))[1] == prefixed(b"x")

    run(test)


def test_a_compressed_message_is_expanded() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        stream = peer.call(ECHO.path, gzip.compress(b"abc" * 1000), more=[("grpc-encoding", "gzip")], flag=1)
        assert (await peer.answer(stream))[1] == prefixed(b"abc" * 1000)

    run(test)


def test_details_of_an_error_are_in_the_trailers_too() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        headers, _ = await peer.answer(peer.call(LACKING.path, b"blob"))
        text = headers["grpc-status-details-bin"]
        status = Status.FromString(b64decode(text + "=" * (-len(text) % 4)))
        assert (headers["grpc-status"], status.code, len(status.details)) == ("9", 9, 1)

    run(test)


def test_messages_that_come_in_crumbs_are_summed() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        stream = peer.begin(SUM.path)
        for byte in b"".join(prefixed(b"%d" % number) for number in (1, 20, 300)):
            peer.h2.send_data(stream, bytes((byte,)))
        peer.h2.end_stream(stream)
        assert (await peer.answer(stream))[1] == prefixed(b"321")
        cut = peer.begin(SUM.path)
        peer.h2.send_data(cut, prefixed(b"1") + b"\0\0\0\0\5abc", end_stream=True)
        headers, _ = await peer.answer(cut)
        assert headers["grpc-status"] == "3"

    run(test)


def test_headers_that_differ_in_their_timeouts_are_understood_once_and_keep_them() -> None:
    routes = Routes([Endpoint(ECHO, lambda raw, call: raw)], LIMITS)
    request = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", ECHO.path.encode())]
    request += [(b"content-type", b"application/grpc"), (b"content-length", b"7")]
    heads = []
    for timeout in (b"1S", b"2S", b""):
        head, expected = routes.interpret([*request, (b"grpc-timeout", timeout)])
        assert (head.endpoint is not None, head.timeout, expected) == (True, timeout, 7)
        heads.append(head.endpoint)
    assert heads[0] is heads[1] is heads[2]
    for timeout in (b"3S", b"4S"):
        with pytest.raises(Malformed):
            routes.interpret([(b"grpc-timeout", timeout), *request])


@given(some.lists(some.binary(max_size=12), max_size=40), some.lists(some.integers(1, 40), min_size=1))
def test_messages_are_taken_as_they_were_put_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    async def main() -> None:
        owner = ConnectionCalls(Routes([], LIMITS), "", lambda: None, lambda: None, lambda: None, Load())
        call = cast("Any", owner.make(1, Head(None), 0, -1))
        data, taken, lengths = b"".join(map(prefixed, messages)), [], cycle(cuts)
        while data:
            size = next(lengths)
            call.add(data[:size], False)
            data = data[size:]
            while (message := call.take()) is not None:
                taken.append(message)
        assert taken == messages
        assert not call.size

    asyncio.run(main())


def test_a_message_that_is_too_large_is_refused_by_its_prefix() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        for path in (ECHO.path, SUM.path):
            stream = peer.begin(path)
            peer.h2.send_data(stream, struct.pack(">BI", 0, 2 << 20))
            headers, _ = await peer.answer(stream)
            assert headers["grpc-status"] == "8"

    run(test)


def test_a_request_that_stops_in_its_middle_is_ended_and_its_connection_goes_on() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        streams = [peer.begin(ECHO.path), peer.begin(ECHO.path)]
        peer.h2.send_data(streams[1], b"\0\0\0\0\5abc")
        for stream in streams:
            headers, _ = await peer.answer(stream)
            assert (headers["grpc-status"], headers["grpc-message"]) == ("4", "no progress in 0.4 s")
        assert (await peer.answer(peer.call(ECHO.path, b"x")))[1] == prefixed(b"x")

    run(test)


def test_an_answer_that_is_not_taken_is_dropped_and_its_connection_goes_on() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        peer.h2.update_settings({frames.INITIAL_WINDOW_SIZE: 4000})
        stream = peer.call(ECHO.path, bytes(16_000))
        await peer.until(lambda: peer.ended(stream))
        assert [event.stream_id for event in peer.events if isinstance(event, h2.events.StreamReset)] == [stream]
        assert (await peer.answer(peer.call(ECHO.path, b"x")))[1] == prefixed(b"x")

    run(test)


def test_an_answer_that_is_taken_slowly_is_not_dropped() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        peer.h2.update_settings({frames.INITIAL_WINDOW_SIZE: 4000})
        stream = peer.call(ECHO.path, bytes(16_000))
        for _ in range(10):
            peer.writer.write(peer.h2.data_to_send())
            await asyncio.sleep(0.15)
            peer.h2.increment_flow_control_window(1000, stream)
        peer.h2.increment_flow_control_window(20_000, stream)
        assert (await peer.answer(stream))[1] == prefixed(bytes(16_000))

    run(test)


def test_who_says_nothing_at_all_is_gone_after_a_while() -> None:
    async def main() -> None:
        async with serving(Endpoints()) as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            async with asyncio.timeout(20):
                while await reader.read(1000):
                    pass
            writer.close()

    asyncio.run(main())


def test_who_reads_nothing_stops_what_it_asked_for_and_is_gone_after_a_while() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        peer.h2.increment_flow_control_window((1 << 31) - 100_000)
        peer.h2.update_settings({frames.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
        for _ in range(3):
            peer.call(MANY.path, b"10000")
        peer.writer.write(peer.h2.data_to_send())
        async with asyncio.timeout(20):
            for _ in range(3):
                await endpoints.cancelled.acquire()
        assert 0 < endpoints.written < 300, "what waits for it is bounded"

    run(test)


def test_calls_that_nobody_waits_for_are_cancelled() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        streams = [peer.call(LATE.path, b"30") for _ in range(3)]
        assert (await peer.answer(peer.call(ECHO.path, b"x")))[1] == prefixed(b"x")
        peer.h2.reset_stream(streams[0])
        peer.writer.write(peer.h2.data_to_send())
        async with asyncio.timeout(20):
            await endpoints.cancelled.acquire()
            peer.writer.close()
            await endpoints.cancelled.acquire()
            await endpoints.cancelled.acquire()

    run(test)


def test_a_call_that_was_given_up_before_it_began_is_begun_only_if_what_it_brought_is_worth_keeping() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        for method in (ECHO, KEPT, KEPT_SUM):
            stream = peer.call(method.path, b"all of " + method.name.encode())
            peer.h2.reset_stream(stream)
            partly = peer.begin(method.path)
            peer.h2.send_data(partly, prefixed(b"not all of it")[:-1])
            peer.h2.reset_stream(partly)
        # All of it comes at once.
        assert (await peer.answer(peer.call(ECHO.path, b"x")))[1] == prefixed(b"x")
        assert endpoints.begun == [b"all of Kept", b"all of KeptSum", b"x"]

    run(test)


def test_a_connection_that_ends_takes_along_what_is_not_worth_keeping() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        owner = ConnectionCalls(
            Routes(endpoints.all(), LIMITS), "", lambda: None, lambda: None, lambda: None, load := Load()
        )
        for method in (ECHO, KEPT, KEPT_SUM):
            peer.call(method.path, method.name.encode())
        owner.connection.receive(peer.h2.data_to_send())
        assert load.calls == 3
        owner.end()
        assert endpoints.begun == [b"Kept", b"KeptSum"]
        assert (load.calls, load.bytes) == (0, 0)

    run(test)


def test_a_draining_server_ends_what_is_under_way_and_takes_no_more() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        peer.call(LATE.path, b"0.5")
        assert (await peer.answer(peer.call(ECHO.path, b"x")))[1] == prefixed(b"x")
        draining = asyncio.create_task(server.drain(20))
        # By hand: for that implementation all is over with the farewell.
        farewell = frames.goaway(frames.WINDOW_MOST, 0) + frames.frame(frames.PING, 0, 0, bytes(8))
        assert await peer.reader.readexactly(len(farewell)) == farewell
        peer.writer.write(frames.frame(frames.PING, frames.ACK, 0, bytes(8)))
        late = frames.frame(
            frames.HEADERS,
            frames.END_HEADERS,
            99,
            encode(
                [
                    (b":method", b"POST"),
                    (b":scheme", b"http"),
                    (b":path", ECHO.path.encode()),
                    (b"content-type", b"application/grpc"),
                ]
            ),
        )
        peer.writer.write(late + frames.frame(frames.DATA, frames.END_STREAM, 99, prefixed(b"on its way")))
        rest = await peer.reader.read()
        assert rest.index(prefixed(b"on its way")) < rest.index(prefixed(b"0.5"))
        async with asyncio.timeout(10):
            await draining

    run(test)


def test_what_outlasts_a_drain_is_broken_off() -> None:
    async def test(peer: Peer, endpoints: Endpoints, server: Http2Server) -> None:
        peer.call(LATE.path, b"30")
        assert (await peer.answer(peer.call(ECHO.path, b"x")))[1] == prefixed(b"x")
        async with asyncio.timeout(10):
            await server.drain(0.2)
        await endpoints.cancelled.acquire()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", peer.writer.get_extra_info("peername")[1]))

    run(test)


def test_connections_that_come_all_at_once_are_accepted_a_few_at_a_time() -> None:
    async def main() -> None:
        server = Http2Server([], LIMITS)
        port = await server.start(Address("127.0.0.1", 0), None)
        # The kernel keeps them meanwhile.
        clients = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(100)]
        try:
            numbers = [0]
            while numbers[-1] < len(clients):
                await asyncio.sleep(0)
                numbers.append(len(server._connections))
            assert max(after - before for before, after in pairwise(numbers)) <= ACCEPTED_MOST
        finally:
            for client in clients:
                client.close()
            await server.drain(0)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_headers_that_are_too_many_are_neither_read_nor_remembered() -> None:
    begun = Endpoints()
    routes = Routes(begun.all(), LIMITS)
    most = LIMITS.header_bytes // 32
    head, expected = routes.interpret([(b"x", b"y")] * (most + 1))
    assert (head.endpoint, expected) == (None, -1)
    assert head.refusal
    usual = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", ECHO.path.encode()),
        (b":authority", b"here"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]
    assert not routes._known
    for timeout in (b"1S", b"20m"):
        assert routes.interpret([*usual, (b"grpc-timeout", timeout)])[0].timeout == timeout
    assert len(routes._known) == 1
    # One that is none counts among the bytes of the headers.
    head, _ = routes.interpret([*usual, (b"grpc-timeout", b"1" * LIMITS.header_bytes)])
    assert head.endpoint is None
