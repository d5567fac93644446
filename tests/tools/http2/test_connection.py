"""A server's end of HTTP/2, spoken to by another implementation, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, cycle
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as some

from tests.tools.http2.echo import HEADERS, TRAILERS, Echo
from tools.http2 import frames
from tools.http2.frames import ErrorCode
from tools.http2.hpack import encode
from tools.http2.stream import STREAM_WINDOW

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/echo"), (":authority", "here")]
BLOCK = encode([(name.encode(), value.encode()) for name, value in REQUEST])
END_HEADERS, END_STREAM = frames.END_HEADERS, frames.END_STREAM


class Client:
    """The other implementation, wired to an `Echo`: what one sends the other gets, in pieces of some size."""

    def __init__(self, echo: Echo, piece: int = 1 << 20) -> None:
        self.echo = echo
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        self.events: list[Any] = []
        self.bodies: dict[int, bytes] = {}
        self._piece = piece
        self.h2.initiate_connection()

    def exchange(self, *, acknowledge: bool = True) -> None:
        """Until neither has anything to say. Bodies are taken, and their windows opened again, if so told."""
        while True:
            to_server, to_client = self.h2.data_to_send(), self.echo.output()
            if not to_server and not to_client:
                return
            for start in range(0, len(to_server), self._piece):
                self.echo.connection.receive(to_server[start : start + self._piece])
            for event in self.h2.receive_data(to_client) if to_client else ():
                self.events.append(event)
                if isinstance(event, h2.events.DataReceived):
                    assert event.stream_id is not None
                    self.bodies[event.stream_id] = self.bodies.get(event.stream_id, b"") + (event.data or b"")
                    if acknowledge and event.flow_controlled_length:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    def send(self, stream: int, body: bytes, *, end: bool = True) -> None:
        """A request, as fast as the windows are opened."""
        self.h2.send_headers(stream, REQUEST, end_stream=end and not body)
        while body:
            size = min(len(body), self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            assert size, "the server doesn't open its window"
            self.h2.send_data(stream, body[:size], end_stream=end and size == len(body))
            body = body[size:]
            if not self.h2.local_flow_control_window(stream):
                self.exchange()

    def all_of(self, kind: type) -> Iterator[Any]:
        """The events of a kind."""
        return (event for event in self.events if isinstance(event, kind))


def raw(*parts: bytes) -> Echo:
    """An end that was sent the preface, no settings, and these frames."""
    echo = Echo()
    echo.connection.receive(frames.PREFACE + frames.settings({}) + b"".join(parts))
    return echo


def codes(echo: Echo) -> tuple[list[tuple[int, int]], int | None]:
    """What it has sent: streams that were reset with their codes, and the code of its farewell."""
    resets, farewell = [], None
    data, position = echo.output(), 0
    while position < len(data):
        length, _, stream = frames.read_head(data, position)
        payload = data[position + 9 : position + 9 + (length >> 8)]
        if length & 255 == frames.RST_STREAM:
            resets.append((stream, frames.read_number(payload, 0)[0]))
        elif length & 255 == frames.GOAWAY:
            farewell = frames.read_number(payload, 4)[0]
        position += 9 + (length >> 8)
    return resets, farewell


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_requests_are_answered_however_the_bytes_are_cut(piece: int) -> None:
    client = Client(Echo(), piece)
    for stream, body in ((1, b""), (3, b"abc"), (5, bytes(7000))):
        client.send(stream, body)
        client.exchange()
        assert client.bodies.get(stream, b"") == body
    assert [event.headers for event in client.all_of(h2.events.TrailersReceived)] == [[(b"x-over", b"yes")]] * 3
    assert len(list(client.all_of(h2.events.StreamEnded))) == 3
    assert not client.echo.connection.streams


def test_more_than_both_windows_goes_in_and_out() -> None:
    client = Client(Echo())
    body = bytes(range(256)) * (18 << 12)  # 18 MiB
    client.send(1, body)
    client.exchange()
    assert client.bodies[1] == body


def test_who_does_not_take_gets_no_more_than_its_window_and_the_others_all() -> None:
    client = Client(Echo())
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    client.h2.increment_flow_control_window(1 << 20)
    client.exchange()
    for stream in (1, 3):
        client.send(stream, bytes(5000))
    client.exchange(acknowledge=False)
    assert [len(body) for body in client.bodies.values()] == [1000, 1000]
    assert client.echo.drained_ones == []
    client.h2.increment_flow_control_window(10_000, 3)
    client.exchange(acknowledge=False)
    assert [len(body) for body in client.bodies.values()] == [1000, 5000]
    assert client.echo.drained_ones == [3]
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 2000})
    client.exchange(acknowledge=False)
    assert [len(body) for body in client.bodies.values()] == [2000, 5000]
    client.h2.increment_flow_control_window(10_000, 1)
    client.exchange(acknowledge=False)
    assert [len(body) for body in client.bodies.values()] == [5000, 5000]
    assert not client.echo.connection.streams


def test_streams_that_share_a_small_window_all_get_of_it() -> None:
    client = Client(Echo())
    client.exchange()
    for stream in (1, 3, 5):
        client.send(stream, bytes(60_000))
    client.exchange(acknowledge=False)
    taken = {1: 0, 3: 0, 5: 0}
    while any(size < 60_000 for size in taken.values()):
        client.h2.increment_flow_control_window(1000)
        client.exchange(acknowledge=False)
        taken = {stream: len(client.bodies.get(stream, b"")) for stream in taken}
        open_ones = [size for size in taken.values() if size < 60_000]
        if len(open_ones) > 1 and min(taken.values()):
            assert max(open_ones) - min(open_ones) <= 65_535, taken
    assert not client.echo.connection.streams


def test_an_upload_that_nobody_takes_stops_at_its_room() -> None:
    client = Client(Echo(allows=False))
    client.exchange()
    client.h2.send_headers(1, REQUEST)
    sent = 0
    while size := min(client.h2.local_flow_control_window(1), client.h2.max_outbound_frame_size):
        client.h2.send_data(1, bytes(size))
        sent += size
        client.exchange()
    assert sent == STREAM_WINDOW
    client.send(3, b"another goes on")
    client.exchange()
    assert client.bodies[3] == b"another goes on"


def test_equal_headers_are_interpreted_once() -> None:
    echo = raw(
        *(frames.frame(frames.HEADERS, END_HEADERS | END_STREAM, stream, BLOCK) for stream in range(1, 41, 2)),
    )
    assert echo.interpreted == 1
    assert echo.connection.streams == {}
    changing = encode([(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/")]) + b"\x40\x01a\x01b"
    for stream in (41, 43):
        echo.connection.receive(frames.frame(frames.HEADERS, END_HEADERS | END_STREAM, stream, changing))
    assert echo.interpreted == 3, "what changes the table may mean something else the next time"


def test_headers_that_differ_in_the_time_that_is_left_are_interpreted_once() -> None:
    coder, echo = hpack.Encoder(), Echo(streams_most=300)
    echo.connection.receive(frames.PREFACE + frames.settings({}))
    heads = []
    for number in range(200):
        # The table keeps some sixty of them, so the others come anew now and then.
        request = [*REQUEST, ("grpc-timeout", f"{10**7 + number}u")]
        block = coder.encode(request)
        echo.connection.receive(frames.frame(frames.HEADERS, END_HEADERS, 2 * number + 1, block))
        heads.append(echo.connection.streams[2 * number + 1].head)
        assert heads[-1] == {name.encode(): value.encode() for name, value in request}
    assert echo.interpreted <= 30
    # What comes between may have moved the table.
    echo.connection.receive(
        frames.frame(frames.HEADERS, END_HEADERS | END_STREAM, 1, coder.encode([("x-end", "of the request")]))
    )
    request = [*REQUEST, ("grpc-timeout", "7S")]
    echo.connection.receive(frames.frame(frames.HEADERS, END_HEADERS, 401, coder.encode(request)))
    assert echo.connection.streams[401].head == {name.encode(): value.encode() for name, value in request}


def test_output_is_announced_once() -> None:
    echo = raw(frames.frame(frames.HEADERS, END_HEADERS, 1, BLOCK), frames.frame(frames.HEADERS, END_HEADERS, 3, BLOCK))
    echo.output()
    before = echo.woken
    for stream in (1, 3):
        echo.connection.receive(frames.frame(frames.DATA, END_STREAM, stream, b"x"))
    assert echo.woken == before + 1


def test_headers_in_pieces_are_whole_when_the_last_has_come() -> None:
    pieces = [BLOCK[:3], BLOCK[3:10], BLOCK[10:]]
    echo = raw(
        frames.frame(frames.HEADERS, END_STREAM, 1, pieces[0]),
        frames.frame(frames.CONTINUATION, 0, 1, pieces[1]),
        frames.frame(frames.CONTINUATION, END_HEADERS, 1, pieces[2]),
    )
    assert HEADERS in echo.output()


def test_a_reset_of_the_client_breaks_off_only_its_stream() -> None:
    echo = raw(
        frames.frame(frames.HEADERS, END_HEADERS, 1, BLOCK),
        frames.frame(frames.HEADERS, END_HEADERS, 3, BLOCK),
        frames.rst_stream(1, ErrorCode.CANCEL),
    )
    assert echo.broken_ones == [1]
    echo.connection.receive(frames.frame(frames.DATA, END_STREAM, 3, b"still here"))
    assert b"still here" in echo.output()


def test_what_still_comes_of_a_stream_that_was_ended_here_is_passed_over() -> None:
    echo = raw(frames.frame(frames.HEADERS, END_HEADERS, 1, BLOCK))
    stream = echo.connection.streams[1]
    echo.connection.out.send_trailers(stream, TRAILERS)
    assert codes(echo) == ([(1, ErrorCode.NO_ERROR)], None)
    echo.connection.receive(
        frames.frame(frames.DATA, 0, 1, bytes(100))
        + frames.frame(frames.HEADERS, END_HEADERS | END_STREAM, 1, encode([(b"x", b"y")]))
    )
    assert codes(echo) == ([], None)
    assert not echo.connection.closed


def test_after_a_farewell_streams_are_taken_or_refused_as_it_says() -> None:
    echo = raw()
    echo.connection.say_goodbye(refuse=False)
    echo.connection.receive(frames.frame(frames.HEADERS, END_HEADERS | END_STREAM, 1, BLOCK))
    assert HEADERS in echo.output()
    echo.connection.say_goodbye(refuse=True)
    echo.connection.receive(frames.frame(frames.HEADERS, END_HEADERS | END_STREAM, 3, BLOCK))
    assert codes(echo) == ([(3, ErrorCode.REFUSED_STREAM)], ErrorCode.NO_ERROR)


def test_one_stream_too_many_is_refused_and_harms_nobody() -> None:
    echo = Echo(streams_most=2)
    echo.connection.receive(frames.PREFACE + frames.settings({}))
    for stream in range(1, 5001, 2):
        echo.connection.receive(frames.frame(frames.HEADERS, END_HEADERS, stream, BLOCK))
    resets, farewell = codes(echo)
    assert resets == [(stream, ErrorCode.REFUSED_STREAM) for stream in range(5, 5001, 2)]
    assert farewell is None
    assert list(echo.connection.streams) == [1, 3]


def headers(*more: tuple[bytes, bytes], flags: int = END_HEADERS, stream: int = 1, block: bytes = BLOCK) -> bytes:
    """A frame that begins a request."""
    return frames.frame(frames.HEADERS, flags, stream, block + encode(list(more)))


def many(ending: Callable[[int], bytes]) -> list[bytes]:
    """Streams that are begun and ended in some way, more than anybody needs."""
    return [part for stream in range(1, 2101, 2) for part in (headers(stream=stream), ending(stream))]


HEAD = headers()
CONTINUED = headers(flags=0, block=b"")
SIZED = (b"content-length", b"3")


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([frames.frame(frames.DATA, 0, 1, b"x")], ErrorCode.PROTOCOL_ERROR),
        ([frames.head(frames.DATA, 0, 1, 1 << 20)], ErrorCode.FRAME_SIZE_ERROR),
        ([headers(stream=2)], ErrorCode.PROTOCOL_ERROR),
        ([headers(block=b"\xff\xff\xff\xff\xff\x7f")], ErrorCode.COMPRESSION_ERROR),
        ([headers(flags=0), frames.frame(frames.PING, 0, 0, bytes(8))], ErrorCode.PROTOCOL_ERROR),
        ([frames.frame(frames.CONTINUATION, END_HEADERS, 1, BLOCK)], ErrorCode.PROTOCOL_ERROR),
        ([CONTINUED, *[frames.frame(frames.CONTINUATION, 0, 1)] * 100], ErrorCode.ENHANCE_YOUR_CALM),
        ([CONTINUED, *[frames.frame(frames.CONTINUATION, 0, 1, bytes(16 << 10))] * 5], ErrorCode.ENHANCE_YOUR_CALM),
        ([HEAD, frames.frame(frames.DATA, frames.PADDED, 1, b"\x05abc")], ErrorCode.PROTOCOL_ERROR),
        ([frames.window_update(0, 0)], ErrorCode.PROTOCOL_ERROR),
        ([frames.window_update(0, frames.WINDOW_MOST)], ErrorCode.FLOW_CONTROL_ERROR),
        ([frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 31})], ErrorCode.FLOW_CONTROL_ERROR),
        ([frames.settings({frames.MAX_FRAME_SIZE: 1})], ErrorCode.PROTOCOL_ERROR),
        ([frames.frame(frames.SETTINGS, 0, 0, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        ([frames.frame(frames.PING, 0, 0, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        ([frames.frame(frames.PUSH_PROMISE, 0, 1, bytes(8))], ErrorCode.PROTOCOL_ERROR),
        ([frames.rst_stream(7, 0)], ErrorCode.PROTOCOL_ERROR),
        (many(lambda stream: frames.rst_stream(stream, ErrorCode.CANCEL)), ErrorCode.ENHANCE_YOUR_CALM),
        (many(lambda stream: frames.window_update(stream, 0)), ErrorCode.ENHANCE_YOUR_CALM),
    ],
)
def test_what_nobody_may_do_ends_the_connection(parts: list[bytes], code: ErrorCode) -> None:
    echo = raw(*parts)
    assert codes(echo)[1] == code
    assert echo.connection.closed
    assert not echo.connection.streams
    echo.connection.receive(HEAD)
    assert echo.output() == b""


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([HEAD, frames.window_update(1, 0)], ErrorCode.PROTOCOL_ERROR),
        ([HEAD, frames.window_update(1, frames.WINDOW_MOST)], ErrorCode.FLOW_CONTROL_ERROR),
        ([HEAD, *[frames.frame(frames.DATA, 0, 1, bytes(16 << 10))] * 17], ErrorCode.FLOW_CONTROL_ERROR),
        ([HEAD, HEAD], ErrorCode.PROTOCOL_ERROR),
        ([headers(block=encode([(b":method", b"POST")]))], ErrorCode.PROTOCOL_ERROR),
        ([headers((b"Capital", b""))], ErrorCode.PROTOCOL_ERROR),
        ([headers((b"te", b"gzip"))], ErrorCode.PROTOCOL_ERROR),
        ([headers((b":path", b"/again"))], ErrorCode.PROTOCOL_ERROR),
        ([headers(block=encode([(b"a", b"b")]) + BLOCK)], ErrorCode.PROTOCOL_ERROR),
        ([headers(SIZED, flags=END_HEADERS | END_STREAM)], ErrorCode.PROTOCOL_ERROR),
        ([headers(SIZED), frames.frame(frames.DATA, END_STREAM, 1, b"ab")], ErrorCode.PROTOCOL_ERROR),
        ([headers(SIZED), frames.frame(frames.DATA, 0, 1, b"abcd")], ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_what_is_wrong_with_one_stream_ends_only_that(parts: list[bytes], code: ErrorCode) -> None:
    echo = Echo(allows=False)
    echo.connection.receive(frames.PREFACE + frames.settings({}) + b"".join(parts))
    resets, farewell = codes(echo)
    assert resets[0] == (1, code)
    assert farewell is None
    echo.connection.receive(frames.frame(frames.HEADERS, END_HEADERS | END_STREAM, 9, BLOCK))
    assert HEADERS in echo.output()


def test_padding_and_priorities_and_unknown_frames_and_trailers_are_all_right() -> None:
    flags = END_HEADERS | frames.PADDED | frames.PRIORITIZED
    echo = raw(
        frames.frame(frames.HEADERS, flags, 1, b"\2" + bytes(5) + BLOCK + bytes(2)),
        frames.frame(0x77, 0xFF, 1, b"whatever"),
        frames.frame(frames.PRIORITY, 0, 1, b"\0\0\0\x05\x10"),
        frames.frame(frames.DATA, frames.PADDED, 1, b"\4body" + bytes(4)),
        frames.frame(frames.HEADERS, END_HEADERS | END_STREAM, 1, encode([(b"x-check", b"sum")])),
    )
    assert b"body" in echo.output()
    assert not echo.connection.streams


def test_a_ping_is_answered_and_an_answer_counted() -> None:
    echo = raw(frames.frame(frames.PING, 0, 0, b"12345678"), frames.frame(frames.PING, frames.ACK, 0, bytes(8)))
    assert frames.frame(frames.PING, frames.ACK, 0, b"12345678") in echo.output()
    assert echo.connection.pings_answered == 1


def test_what_is_no_http2_gets_a_farewell() -> None:
    echo = Echo()
    echo.connection.receive(b"GET / HTTP/1.1\r\n\r\n")
    assert codes(echo) == ([], ErrorCode.PROTOCOL_ERROR)
    assert echo.connection.closed


@given(
    some.lists(
        some.tuples(
            some.integers(0, 12),
            some.integers(0, 255),
            some.sampled_from([0, 1, 1, 3, 5, 2, 7, 1 << 30]),
            some.one_of(some.just(BLOCK), some.binary(max_size=30)),
        ),
        max_size=30,
    ),
    some.integers(1, 50),
)
def test_random_frames_never_harm(parts: list[tuple[int, int, int, bytes]], piece: int) -> None:
    echo = raw()
    data = b"".join(frames.frame(*part) for part in parts)
    for start in range(0, len(data), piece):
        echo.connection.receive(data[start : start + piece])
        echo.output()
    if echo.connection.closed:
        assert not echo.connection.streams
    echo.connection.end()


# A little at a time


def requests(*bodies: bytes) -> tuple[bytes, list[int]]:
    """What a client sends for them, and where in it the preface and the frames end."""
    parts = [frames.PREFACE, frames.settings({})]
    for number, body in enumerate(bodies):
        stream = 2 * number + 1
        parts.append(frames.frame(frames.HEADERS, END_HEADERS | (0 if body else END_STREAM), stream, BLOCK))
        for start in range(0, len(body), 1000):
            piece = body[start : start + 1000]
            parts.append(frames.frame(frames.DATA, END_STREAM if start + 1000 >= len(body) else 0, stream, piece))
    return b"".join(parts), list(accumulate(map(len, parts)))


@given(
    some.lists(some.integers(0, 3000), max_size=6),
    some.lists(some.integers(1, 4000), min_size=1),
    some.lists(some.integers(1, 3000), min_size=1),
)
def test_it_does_not_matter_how_what_comes_is_cut_nor_how_much_of_it_is_worked_on_at_a_time(
    sizes: list[int], cuts: list[int], slices: list[int]
) -> None:
    data, _ = requests(*map(bytes, sizes))
    whole, sliced = Echo(), Echo()
    whole.connection.receive(data)
    lengths, most = cycle(cuts), cycle(slices)
    at = 0
    while at < len(data):
        size = next(lengths)
        sliced.connection.feed(data[at : at + size])
        at += size
        # Not to its end each time: more may come before.
        if size % 3:
            while sliced.connection.parse(next(most)):
                pass
            assert sliced.connection.hungry or sliced.connection.unparsed in range(len(frames.PREFACE))
    while sliced.connection.parse(next(most)):
        pass
    assert sliced.output() == whole.output()
    assert (sliced.connection.unparsed, sliced.connection.hungry) == (0, False)


def test_parsing_stops_behind_the_frame_with_which_there_is_enough() -> None:
    data, ends = requests(bytes(5000))
    connection = Echo().connection
    connection.feed(data)
    assert connection.unparsed == len(data)
    # The preface counts as one.
    for most, end in ((1, ends[0]), (1, ends[1]), (1, ends[2]), (1, ends[3]), (1009, ends[4]), (1010, ends[6])):
        assert connection.parse(most)
        assert connection.unparsed == len(data) - end
        assert not connection.hungry
    assert not connection.parse(1)
    assert (connection.unparsed, connection.hungry) == (0, False)
    assert not connection.parse()


def test_what_is_left_is_a_part_of_a_frame_wherever_it_is_cut() -> None:
    data, ends = requests(bytes(1500), b"")
    for cut in range(len(frames.PREFACE), len(data) + 1):
        echo = Echo()
        echo.connection.feed(data[:cut])
        assert not echo.connection.parse()
        begins = max(end for end in ends if end <= cut)
        assert echo.connection.unparsed == cut - begins
        assert echo.connection.hungry == (cut != begins), cut
        # Nothing can be done, however often it is tried; with the rest it is.
        assert not echo.connection.parse(1)
        echo.connection.feed(data[cut:])
        assert not echo.connection.hungry
        assert not echo.connection.parse()
        assert (echo.connection.unparsed, echo.connection.hungry) == (0, False)


def test_a_frame_that_is_larger_than_what_is_worked_on_at_a_time_is_worked_on() -> None:
    echo = Echo()
    echo.connection.receive(requests(b"x")[0])
    body = bytes(frames.FRAME_LEAST)
    echo.connection.feed(frames.frame(frames.HEADERS, END_HEADERS, 3, BLOCK))
    echo.connection.feed(frames.frame(frames.DATA, END_STREAM, 3, body)[:-1])
    assert echo.connection.parse(1)
    assert not echo.connection.parse(1)
    assert echo.connection.hungry
    assert echo.connection.unparsed == frames.HEAD_BYTES + len(body) - 1
    echo.connection.feed(body[:1])
    assert not echo.connection.parse(1)
    assert echo.output().count(TRAILERS) == 2


def test_what_comes_behind_a_mistake_is_dropped() -> None:
    echo = Echo()
    data, _ = requests(b"x")
    echo.connection.feed(data + frames.frame(frames.PING, 0, 1, bytes(8)) + bytes(1000))
    assert not echo.connection.parse()
    assert echo.connection.closed
    assert (echo.connection.unparsed, echo.connection.hungry) == (0, False)
    echo.connection.feed(data)
    assert not echo.connection.parse(1)
    assert (echo.connection.unparsed, echo.connection.hungry) == (0, False)
    assert codes(echo) == ([], ErrorCode.PROTOCOL_ERROR)
