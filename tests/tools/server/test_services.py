"""The services by themselves, with no transport; and the values they are made of."""

from __future__ import annotations

import inspect
import os
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, reject
from hypothesis import strategies as st

import store.errors
import tools.server.errors
from store.digest import Digest, DigestFunction
from store.errors import BadInput, MissingBlob, StoreError
from store.layout import blob_path
from store.presence import Name, WouldWait, as_name
from store.repository import Store
from tests.conftest import count_views
from tests.tools.server.conftest import SHA256
from tools.reapi import methods
from tools.reapi.generate import GENERATED, generate
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated.error_details_pb2 import PreconditionFailure
from tools.reapi.resource_names import Compression, ResourceName, check_instance, parse_read, parse_write
from tools.server.access import Right, right_for
from tools.server.address import Address
from tools.server.errors import FailedPrecondition, NotThere, ServeError
from tools.server.requests import read_digest, write_digest
from tools.server.services import Services
from tools.server.status import as_status, find_code


def test_the_generated_modules_are_what_the_definitions_make(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    generate(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    there = {path.name: path.read_text() for path in GENERATED.glob("*_pb2.py*")}
    assert made == there, "run `make proto`"


# Names

segments = st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=8), max_size=3).map("/".join)
digests = st.builds(
    Digest, st.sampled_from(DigestFunction), st.binary(min_size=32, max_size=32), st.integers(0, (1 << 63) - 1)
)


@given(segments, digests, st.sampled_from(Compression), st.uuids())
def test_resource_names_are_read_as_they_were_written(
    instance: str, digest: Digest, compression: Compression, upload: object
) -> None:
    try:
        check_instance(instance)
    except BadInput:
        reject()
    name = ResourceName(instance, digest, compression)
    assert parse_read(str(name)) == name
    written = name._replace(upload=str(upload))
    assert parse_write(str(written)) == written


@given(st.text(max_size=200))
def test_any_text_is_a_resource_name_or_an_error(text: str) -> None:
    for parse in (parse_read, parse_write):
        for name in (text, f"uploads/{text}", f"blobs/{text}"):
            with suppress(BadInput):
                assert parse(name).digest.size >= 0


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:8980", "127.0.0.1", 8980, True),
        ("[::1]:1", "::1", 1, True),
        ("localhost:0", "localhost", 0, True),
        (":8980", "::", 8980, False),
        ("0.0.0.0:80", "0.0.0.0", 80, False),
        ("build.example:80", "build.example", 80, False),
    ],
)
def test_addresses(text: str, host: str, port: int, loopback: bool) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, address.is_loopback) == (host, port, loopback)


# Errors


def test_every_error_has_a_code_of_its_own_choice() -> None:
    for module in (store.errors, tools.server.errors):
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, StoreError | ServeError) and kind not in (StoreError, ServeError):
                expected = {store.errors.AlreadyExists, store.errors.StaleReference}
                assert (find_code(kind("x")) == codes.INTERNAL) == (kind in expected), kind


def test_missing_inputs_are_told_as_reapi_wants_it() -> None:
    digest = SHA256.of(b"input")
    status = as_status(FailedPrecondition("inputs are missing", [digest]))
    failure = PreconditionFailure()
    assert status.details[0].Unpack(failure)
    assert status.code == codes.FAILED_PRECONDITION
    assert (failure.violations[0].type, failure.violations[0].subject) == ("MISSING", f"blobs/{digest.hex}/5")


def test_what_nobody_expected_is_not_told_to_clients(caplog: pytest.LogCaptureFixture) -> None:
    status = as_status(RuntimeError("a secret"))
    assert (status.code, "secret" in status.message) == (codes.INTERNAL, False)
    assert "unexpected RuntimeError" in caplog.text


def test_all_that_changes_something_needs_the_right_to_write() -> None:
    everything = [value for value in vars(methods).values() if isinstance(value, methods.Method)]
    assert {method.name for method in everything if right_for(method) is Right.WRITE} == {
        "UpdateActionResult",
        "BatchUpdateBlobs",
        "SpliceBlob",
        "Write",
        "Execute",
        "CancelOperation",
    }


# Hot paths


def add(services: Services, *blobs: bytes) -> list[Digest]:
    digests = [SHA256.of(blob) for blob in blobs]
    assert services.uploads.add_all(list(zip(digests, blobs, strict=True))) == [None] * len(blobs)
    return digests


def find_missing(services: Services, raw: bytes, *, may_wait: bool = True) -> bytes:
    """FindMissingBlobs of a serialized request."""
    return services.cas.find_missing(services.cas.read_question(raw), may_wait=may_wait)


def test_what_is_asked_most_takes_one_view_and_never_waits(
    store: Store, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = add(services, *(b"%d" % number for number in range(100)))
    action = write_digest(SHA256.of(b"action"))
    result = reapi.ActionResult(output_files=[reapi.OutputFile(path="o", digest=write_digest(blobs[0]))])
    services.actions.update(reapi.UpdateActionResultRequest(action_digest=action, action_result=result))
    get = reapi.GetActionResultRequest(action_digest=action)
    find = reapi.FindMissingBlobsRequest(blob_digests=map(write_digest, blobs))
    batch = reapi.BatchReadBlobsRequest(digests=map(write_digest, blobs))
    read = bytestream.ReadRequest(resource_name=str(ResourceName("", blobs[7])))
    services.actions.get(get)

    views = count_views(store, monkeypatch)
    assert services.actions.get(get, may_wait=False) == result.SerializeToString()
    assert len(views) == 1
    assert find_missing(services, find.SerializeToString(), may_wait=False) == b""
    assert len(views) == 2
    answer = reapi.BatchReadBlobsResponse.FromString(services.cas.batch_read(batch, may_wait=False))
    assert [item.data for item in answer.responses] == [b"%d" % number for number in range(100)]
    assert len(views) == 3
    reader = services.bytestream.open_read(read, may_wait=False)
    assert (reader.read(may_wait=False), reader.read(may_wait=False)) == (b"7", b"")
    reader.close()
    assert len(views) == 4


def test_what_was_lately_found_is_known_by_its_spelling_until_something_is_removed(
    store: Store, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = [*add(services, *(b"%d" % number for number in range(10))), SHA256.of(b"")]
    raw = reapi.FindMissingBlobsRequest(blob_digests=map(write_digest, blobs)).SerializeToString()
    asked: list[object] = []
    find_absent = store.presence.find_absent

    def counted(names: list[Name], *, may_wait: bool = True) -> list[Name]:
        asked.append(names)
        return find_absent(names, may_wait=may_wait)

    monkeypatch.setattr(store.presence, "find_absent", counted)
    views = count_views(store, monkeypatch)
    assert find_missing(services, raw) == b""
    assert (len(asked), len(views)) == (1, 1)
    # Neither parsed nor looked up, by any instance; but another function's digests are others.
    assert find_missing(services, raw, may_wait=False) == b""
    assert find_missing(services, b"\x0a\x04main" + raw + b"\x18\x01", may_wait=False) == b""
    assert (len(asked), len(views)) == (1, 3)
    missing = reapi.FindMissingBlobsResponse.FromString(find_missing(services, raw + b"\x18\x09"))
    assert len(missing.missing_blob_digests) == len(blobs)

    # Of a question about a new one too, only that is looked up; one that isn't here is asked for each time.
    absent = SHA256.of(b"not here")
    [new] = add(services, b"new")
    both = reapi.FindMissingBlobsRequest(blob_digests=map(write_digest, [absent, new, *blobs, absent]))
    for names in ([absent, new], [absent]):
        asked.clear()
        missing = reapi.FindMissingBlobsResponse.FromString(find_missing(services, both.SerializeToString()))
        assert [read_digest(digest, SHA256) for digest in missing.missing_blob_digests] == [absent]
        assert asked == [list(map(as_name, names))]

    # One that can't be answered at once isn't parsed again to be answered later.
    question = services.cas.read_question(both.SerializeToString())
    assert [len(names) for names in question] == [1, 1]

    store.blobs.quarantine(blobs[3])
    missing = reapi.FindMissingBlobsResponse.FromString(find_missing(services, raw))
    assert [read_digest(digest, SHA256) for digest in missing.missing_blob_digests] == [blobs[3]]


def test_a_result_is_believed_no_longer_than_its_blobs_are_there(store: Store, services: Services) -> None:
    [output] = add(services, b"output")
    action = write_digest(SHA256.of(b"action"))
    result = reapi.ActionResult(output_files=[reapi.OutputFile(path="o", digest=write_digest(output))])
    services.actions.update(reapi.UpdateActionResultRequest(action_digest=action, action_result=result))
    get = reapi.GetActionResultRequest(action_digest=action)
    assert services.actions.get(get)
    (store.layout.blobs / blob_path(output)).unlink()
    with pytest.raises(MissingBlob):
        services.downloads.read(output)
    with pytest.raises(NotThere):
        services.actions.get(get)


def test_a_hit_touches_the_result_no_later_than_its_blobs(store: Store, services: Services) -> None:
    [output] = add(services, b"output")
    action = SHA256.of(b"action")
    result = reapi.ActionResult(output_files=[reapi.OutputFile(path="o", digest=write_digest(output))])
    services.actions.update(reapi.UpdateActionResultRequest(action_digest=write_digest(action), action_result=result))
    store.actions.touch(action.key, 1)
    before = time.time()
    services.actions.get(reapi.GetActionResultRequest(action_digest=write_digest(action)))
    blob_time = (store.layout.blobs / blob_path(output)).stat().st_mtime
    assert int(before) <= store.actions.used(action.key) <= blob_time


def test_what_is_not_in_the_page_cache_is_not_read_where_nothing_may_wait(store: Store, services: Services) -> None:
    [digest] = add(services, bytes(1 << 20))
    path = store.layout.blobs / blob_path(digest)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    request = bytestream.ReadRequest(resource_name=str(ResourceName("", digest)))
    reader = services.bytestream.open_read(request, may_wait=False)
    try:
        data = reader.read(may_wait=False)
    except WouldWait:
        data = reader.read()
    assert data == bytes(1 << 20)[: len(data)]
    reader.close()


# Uploads


def write_some(services: Services, name: ResourceName, data: bytes) -> None:
    """An upload that breaks off."""
    call = services.bytestream.begin_write()
    assert call.feed(bytestream.WriteRequest(resource_name=str(name), data=data)) is None
    call.close()


def query(services: Services, name: ResourceName) -> int:
    stream = services.bytestream
    return stream.status(name, is_here=stream.is_here(name)).committed_size


def test_an_upload_that_broke_off_is_kept_for_a_while(
    store: Store, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (ResourceName("", SHA256.of(text), upload="u") for text in (b"first one", b"second one"))
    write_some(services, first, b"first")
    assert query(services, first) == 5
    later = time.monotonic() + 1e6
    monkeypatch.setattr(time, "monotonic", lambda: later)
    write_some(services, second, b"sec")
    assert (query(services, first), query(services, second)) == (0, 3)
    files = [path for path in store.layout.tmp.rglob("*") if path.is_file()]
    assert [path.stat().st_size for path in files] == [3]


@pytest.mark.parametrize("compression", Compression)
def test_who_was_told_of_less_than_is_here_goes_on_from_there(services: Services, compression: Compression) -> None:
    data = random.Random(1).randbytes(1000)
    sent = data if compression is Compression.IDENTITY else zstandard.compress(data)
    name = ResourceName("", SHA256.of(data), compression, "u")
    write_some(services, name, sent[:300])
    call = services.bytestream.begin_write()
    answer, at = None, 100
    # What is here already ends in the middle of the second message.
    for end in (250, 400, len(sent)):
        request = bytestream.WriteRequest(
            resource_name=str(name), write_offset=at, data=sent[at:end], finish_write=end == len(sent)
        )
        answer, at = call.feed(request), end
    assert answer is not None
    assert answer.committed_size == len(sent)
    assert query(services, name) == len(data)


def test_the_empty_blob_was_always_brought(services: Services) -> None:
    for compression in Compression:
        name = ResourceName("", SHA256.of(b""), compression, "u")
        assert services.bytestream.is_remembered(name)
        answered = services.bytestream.whole_answer(name).committed_size
        assert answered == (-1 if compression is Compression.ZSTD else 0)
    assert not services.bytestream.is_remembered(ResourceName("", SHA256.of(b"x"), upload="u"))


def test_quick_feeding_leaves_to_a_thread_what_waits(services: Services) -> None:
    data = b"x" * 200_000
    name = str(ResourceName("", SHA256.of(data), upload="u"))
    call = services.bytestream.begin_write()
    first = bytestream.WriteRequest(resource_name=name, data=data[:10])
    with pytest.raises(WouldWait):
        call.feed(first, may_wait=False)
    assert call.feed(first) is None
    assert call.feed(bytestream.WriteRequest(write_offset=10, data=data[10:20]), may_wait=False) is None
    large = bytestream.WriteRequest(write_offset=20, data=data[20:], finish_write=True)
    with pytest.raises(WouldWait):
        call.feed(large, may_wait=False)
    answer = call.feed(large)
    assert answer is not None
    assert answer.committed_size == len(data)
    call.close()
