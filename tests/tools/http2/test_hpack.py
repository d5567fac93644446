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
