"""Compression of headers: against the RFC's own examples, and against another implementation."""

from __future__ import annotations

import random

import hpack as other
import pytest
from hypothesis import given
from hypothesis import strategies as some

from tools.http2 import huffman
from tools.http2.hpack import Decoder, Header, HpackError, encode

TEXT = some.binary(max_size=40)
HEADERS = some.lists(
    some.one_of(
        some.tuples(some.sampled_from([b"x-a", b"content-type", b"grpc-timeout"]), TEXT),
        some.tuples(TEXT, TEXT),
        some.sampled_from([(b":method", b"POST"), (b":method", b"GET"), (b":path", b"/a"), (b"x-long", b"v" * 5000)]),
    ),
    max_size=12,
)


def test_the_examples_of_the_rfc_one_after_the_other() -> None:
    """RFC 7541, C.4: three requests, Huffman-coded, on one connection."""
    decoder = Decoder()
    first = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")]
    assert decoder.decode(bytes.fromhex("828684418cf1e3c2e5f23a6ba0ab90f4ff")) == first
    assert decoder.decode(bytes.fromhex("828684be5886a8eb10649cbf")) == [*first, (b"cache-control", b"no-cache")]
    assert decoder.decode(bytes.fromhex("828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf")) == [
        (b":method", b"GET"),
        (b":scheme", b"https"),
        (b":path", b"/index.html"),
        (b":authority", b"www.example.com"),
        (b"custom-key", b"custom-value"),
    ]


@given(some.lists(some.tuples(HEADERS, some.booleans(), some.sampled_from([None, None, 0, 64, 4096])), max_size=12))
def test_what_another_implementation_encodes_is_decoded(
    blocks: list[tuple[list[Header], bool, int | None]],
) -> None:
    encoder, decoder = other.Encoder(), Decoder()
    for headers, coded, size in blocks:
        if size is not None:
            encoder.header_table_size = size
        before = decoder.changes
        block = encoder.encode(headers, huffman=coded)
        assert decoder.decode(block) == headers
        if headers and decoder.changes == before:
            assert decoder.decode(block) == headers, "the table is as it was, so it means the same"


class Plain(Decoder):
    """Compares no block with the last one."""

    def decode(self, block: bytes) -> list[Header]:
        self._deepest = -1
        return super().decode(block)


def _decode(decoder: Decoder, block: bytes) -> list[Header] | str:
    try:
        return decoder.decode(block)
    except HpackError as error:
        return str(error)


@some.composite
def _alike(draw: some.DrawFn) -> list[bytes]:
    """Blocks of requests that differ in a header or two, whole or with a byte that is wrong."""
    encoder = other.Encoder()
    around = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/a/b"),
        (b"te", b"trailers"),
        (b"x", b"y" * 99),
    ]
    place = draw(some.integers(0, len(around)))
    blocks = []
    for _ in range(draw(some.integers(1, 60))):
        varying = draw(some.sampled_from([b"grpc-timeout"] * 9 + [b"x-other"]))
        value = draw(some.binary(max_size=draw(some.sampled_from([4, 4, 4, 600]))))
        headers = [*around[:place], (varying, value), *around[place:]]
        if not draw(some.integers(0, 12)):
            headers = draw(HEADERS)
        if not draw(some.integers(0, 20)):
            encoder.header_table_size = draw(some.sampled_from([0, 64, 300, 4096]))
        block = bytearray(encoder.encode(headers, huffman=draw(some.booleans())))
        if block and not draw(some.integers(0, 30)):
            block[draw(some.integers(0, len(block) - 1))] = draw(some.integers(0, 255))
        blocks.append(bytes(block))
    return blocks


@given(_alike())
def test_a_block_like_the_last_one_is_decoded_as_any_other(blocks: list[bytes]) -> None:
    quick, plain = Decoder(), Plain()
    last: list[Header] = []
    for block in blocks:
        found = _decode(quick, block)
        assert found == _decode(plain, block)
        if isinstance(found, str):
            return
        assert (quick._entries, quick._bytes, quick.changes) == (plain._entries, plain._bytes, plain.changes)
        if quick.varied >= 0:
            assert len(found) == len(last)
            assert [place for place, pair in enumerate(zip(found, last, strict=True)) if pair[0] != pair[1]] in (
                [],
                [quick.varied],
            )
        last = found


def test_a_grpc_clients_blocks_are_taken_apart_seldom() -> None:
    encoder, decoder = other.Encoder(), Decoder()
    headers = [(b":method", b"POST"), (b":path", b"/a/b"), (b"user-agent", b"grpc-go"), (b"te", b"trailers")]
    varied = 0
    for number in range(1000):
        request = [*headers, (b"grpc-timeout", b"%du" % (10**7 + number))]
        assert decoder.decode(encoder.encode(request)) == request
        varied += decoder.varied == len(headers)
    assert varied > 800


@given(HEADERS)
def test_another_implementation_decodes_what_is_encoded(headers: list[Header]) -> None:
    decoder = other.Decoder(max_header_list_size=1 << 20)
    for _ in range(2):
        assert [tuple(header) for header in decoder.decode(encode(headers), raw=True)] == headers


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ("80", "index 0"),
        ("be", "isn't in the table"),
        ("ffffffffff7f", "too large"),
        ("ff", "index out of range"),
        ("40", "index out of range"),
        ("000561", "longer than its block"),
        ("3fe21f", "offered"),
        ("8220", "behind a header"),
        ("008100", "Huffman"),  # filled up with zeros
        ("0085fffffffffffe", "Huffman"),  # filled up with more than seven bits
        ("0085ffffffffff00", "Huffman"),
    ],
)
def test_what_can_not_be_decoded_is_an_error(block: str, why: str) -> None:
    with pytest.raises(HpackError, match=why):
        Decoder().decode(bytes.fromhex(block))


@given(some.binary(max_size=200))
def test_random_bytes_are_headers_or_an_error(block: bytes) -> None:
    decoder = Decoder()
    try:
        decoder.decode(block)
    except HpackError:
        return


def test_every_byte_has_its_code() -> None:
    coder = other.huffman.HuffmanEncoder(
        other.huffman_constants.REQUEST_CODES, other.huffman_constants.REQUEST_CODES_LENGTH
    )
    for text in (bytes(range(256)), bytes(reversed(range(256))), random.Random(0).randbytes(500)):
        assert huffman.decode(coder.encode(text)) == text


def test_the_table_stays_as_small_as_it_has_to_be() -> None:
    decoder = Decoder()
    for number in range(1000):
        decoder.decode(b"\x40\x01a" + bytes((100,)) + b"%0100d" % number)
    kept = 4096 // (1 + 100 + 32)
    oldest = decoder.decode(bytes((0x80 | 61 + kept,)))
    assert oldest == [(b"a", b"%0100d" % (1000 - kept))]
    with pytest.raises(HpackError):
        decoder.decode(bytes((0x80 | 62 + kept,)))
