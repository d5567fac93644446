"""What is written by hand is what protobuf would write."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from store.digest import DigestFunction
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.wire import read_find_missing, write_batch_read, write_varint
from tools.server.requests import write_digest


@pytest.mark.parametrize("size", [0, 1, 55, 56, 59, 127, 128, 300, 16_383, 16_384, 70_000, 2_097_152])
def test_an_answer_to_batch_read_is_what_protobuf_writes(size: int) -> None:
    contents = [bytes(size), b"x" * size, b"", b"small"]
    digests = [DigestFunction.SHA256.of(data) for data in contents]
    expected = reapi.BatchReadBlobsResponse(
        responses=[
            reapi.BatchReadBlobsResponse.Response(digest=write_digest(digest), data=data)
            for digest, data in zip(digests, contents, strict=True)
        ]
    )
    written = write_batch_read((digest.hex, digest.size, data) for digest, data in zip(digests, contents, strict=True))
    assert written == expected.SerializeToString()


def test_a_varint_is_what_protobuf_writes() -> None:
    for value in (1, 127, 128, 1 << 14, (1 << 63) - 1):
        assert b"\x10" + write_varint(value) == reapi.Digest(size_bytes=value).SerializeToString()
    assert write_varint(0) == b"\0"


_HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
_DIGESTS = st.builds(reapi.Digest, hash=_HASHES, size_bytes=st.integers(0, (1 << 35) - 1))
_REQUESTS = st.builds(
    reapi.FindMissingBlobsRequest,
    instance_name=st.text(st.characters(codec="utf-8"), max_size=20),
    blob_digests=st.lists(_DIGESTS, max_size=20),
    digest_function=st.sampled_from([0, 1, 9]),
)


@settings(deadline=None)
@given(_REQUESTS)
def test_a_request_is_read_as_protobuf_reads_it(request: reapi.FindMissingBlobsRequest) -> None:
    asked = read_find_missing(request.SerializeToString())
    assert asked is not None
    assert (asked.instance, asked.function) == (request.instance_name, request.digest_function)
    # A spelling is a request's field, so each is the request for that digest alone.
    alone = [reapi.FindMissingBlobsRequest.FromString(spelling).blob_digests for spelling in asked.digests]
    assert [list(digests) for digests in alone] == [[digest] for digest in request.blob_digests]


@settings(deadline=None)
@given(_REQUESTS, st.data())
def test_whatever_else_is_read_as_protobuf_does_or_left_to_it(
    request: reapi.FindMissingBlobsRequest, data: st.DataObject
) -> None:
    raw = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    asked = read_find_missing(bytes(raw))
    if asked is None:
        return
    try:
        parsed = reapi.FindMissingBlobsRequest.FromString(bytes(raw))
    except DecodeError:
        # Of what is no text: a hash that nobody knows.
        assert any(not spelling.isascii() for spelling in asked.digests)
        return
    assert (asked.instance, asked.function) == (parsed.instance_name, parsed.digest_function)
    assert len(asked.digests) == len(parsed.blob_digests)


@pytest.mark.parametrize("size", [1 << 35, (1 << 63) - 1, -1])
def test_a_digest_of_an_unlikely_size_is_left_to_protobuf(size: int) -> None:
    request = reapi.FindMissingBlobsRequest(blob_digests=[reapi.Digest(hash="0" * 64, size_bytes=size)])
    assert read_find_missing(request.SerializeToString()) is None
