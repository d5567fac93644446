"""How calls are answered over gRPC: in how many steps, and what of it in the loop."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import grpc
import pytest

from store.digest import Digest, DigestFunction
from store.errors import BadName, StoreError, StoreUnusable
from store.layout import blob_path
from store.presence import WouldWait
from store.repository import Store
from store.uploads import Uploads
from tests.tools.server.conftest import SHA256, Client
from tests.tools.server.odd import serving
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.resource_names import Compression, ResourceName
from tools.server.actions import ActionResults
from tools.server.calls import Endpoint
from tools.server.cas import ContentAddressableStorage
from tools.server.errors import InvalidArgument
from tools.server.requests import write_digest
from tools.server.services import ServiceOptions, Services


class Writes:
    """Notes the size of what a method writes before its end."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def wrap(self, endpoint: Endpoint) -> Endpoint:
        if endpoint.method is not methods.READ:
            return endpoint
        noted = self.sizes

        class Call:
            def __init__(self, real: Any) -> None:
                self._real = real

            def __getattr__(self, name: str) -> Any:
                return getattr(self._real, name)

            async def write(self, message: bytes) -> None:
                noted.append(len(message))
                await self._real.write(message)

        def begin(raw: bytes, call: Any) -> Any:
            return endpoint.begin(raw, Call(call))

        return Endpoint(endpoint.method, begin)


@pytest.mark.parametrize("instance", ["", "one", "one/of-two"])
@pytest.mark.parametrize("function", DigestFunction)
def test_a_small_blob_is_read_without_a_parser(store: Store, function: DigestFunction, instance: str) -> None:
    data = b"small"
    digest = _add(store, function, data)
    with Services(store) as services:
        stream = services.bytestream
        resource = str(ResourceName(instance, digest))
        assert stream.read_small(_read(resource)) == data
        # What is said of these is `open_read`'s matter.
        assert stream.read_small(_read(resource, read_offset=1)) is None
        assert stream.read_small(_read(resource, read_limit=1)) is None
        assert stream.read_small(_read(resource) + _read("blobs")) is None
        assert stream.read_small(_read(resource)[:-1]) is None
        assert stream.read_small(_read(str(ResourceName(instance, digest._replace(size=4))))) is None
        assert stream.read_small(_read(str(ResourceName(instance, digest, Compression.ZSTD)))) is None
        path = store.layout.blobs / blob_path(digest)
        path.chmod(0o644)
        path.write_bytes(data + b"!")
        with pytest.raises(WouldWait):  # a file of another size
            stream.read_small(_read(resource))
        path.unlink()
        with pytest.raises(WouldWait):
            stream.read_small(_read(resource))


def test_a_small_blob_is_read_only_of_an_instance_that_is_served(store: Store) -> None:
    digest = _add(store, SHA256, b"small")
    with Services(store, ServiceOptions(instances=("one",))) as services:
        assert services.bytestream.read_small(_read(str(ResourceName("one", digest)))) == b"small"
        for other in ("", "two"):
            with pytest.raises(InvalidArgument):
                services.bytestream.read_small(_read(str(ResourceName(other, digest))))
    with Services(store) as services, pytest.raises(BadName):
        services.bytestream.read_small(_read(str(ResourceName("one/blobs", digest))))


def _add(store: Store, function: DigestFunction, data: bytes) -> Digest:
    with store.ingest() as ingest:
        return ingest.add_bytes(data, function)


def _read(resource: str, **more: int) -> bytes:
    return bytestream.ReadRequest(resource_name=resource, **more).SerializeToString()


def test_a_small_blob_goes_goes_out_in_one_step_with_its_status(store: Store) -> None:
    writes = Writes()
    small, large = b"small", bytes(300 << 10)
    with serving(store, wrap=writes.wrap) as url:
        client = Client(url.removeprefix("grpc://"))
        try:
            client.add(small, large)
            assert client.read(SHA256.of(small)) == small
            assert writes.sizes == []
            assert client.read(SHA256.of(large)) == large
        finally:
            client.close()
    assert [size >> 10 for size in writes.sizes] == [256], "and 44 KiB with the status"


def note_threads(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, noted: dict[str, str]) -> None:
    """Of that method: the thread it is called in."""
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        noted[name] = threading.current_thread().name
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


def test_what_has_thousands_of_parts_is_not_taken_apart_in_the_loop(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: dict[str, str] = {}
    for owner, name in (
        (ContentAddressableStorage, "read_question"),
        (ContentAddressableStorage, "read_batch"),
        (ContentAddressableStorage, "batch_read"),
        (ActionResults, "_all_named_by"),
    ):
        note_threads(monkeypatch, owner, name, noted)
    blobs = [b"%d" % number for number in range(1000)]
    digests = [SHA256.of(blob) for blob in blobs]
    unknown = [reapi.Digest(hash=f"{number:064x}", size_bytes=1) for number in range(20_000)]
    action = write_digest(SHA256.of(b"action"))
    with serving(store) as url, closing(Client(url.removeprefix("grpc://"))) as client:
        items = [
            reapi.BatchUpdateBlobsRequest.Request(digest=write_digest(digest), data=blob)
            for digest, blob in zip(digests, blobs, strict=True)
        ]
        items.append(reapi.BatchUpdateBlobsRequest.Request(digest=unknown[0], data=b"another"))
        answer = client.call(methods.BATCH_UPDATE_BLOBS, reapi.BatchUpdateBlobsRequest(requests=items))
        assert [item.digest for item in answer.responses] == [item.digest for item in items]
        assert [item.status.code for item in answer.responses] == [0] * len(blobs) + [codes.INVALID_ARGUMENT]

        question = reapi.FindMissingBlobsRequest(blob_digests=[*map(write_digest, digests), *unknown])
        missing = client.call(methods.FIND_MISSING_BLOBS, question)
        assert list(missing.missing_blob_digests) == unknown

        wanted = reapi.BatchReadBlobsRequest(digests=[write_digest(digest) for digest in digests] * 16)
        found = client.call(methods.BATCH_READ_BLOBS, wanted).responses
        assert [item.data for item in found] == blobs * 16

        outputs = [reapi.OutputFile(path="out", digest=write_digest(digest)) for digest in digests]
        result = reapi.ActionResult(output_files=outputs * 5)
        client.call(
            methods.UPDATE_ACTION_RESULT,
            reapi.UpdateActionResultRequest(action_digest=action, action_result=result),
        )
        get = reapi.GetActionResultRequest(action_digest=action)
        assert client.call(methods.GET_ACTION_RESULT, get) == result
    assert len(noted) == 4
    assert all(thread.startswith("serve") for thread in noted.values()), noted


def batch_of(count: int) -> reapi.BatchUpdateBlobsRequest:
    """Blobs that differ."""
    request = reapi.BatchUpdateBlobsRequest()
    for number in range(count):
        data = b"%d" % number
        request.requests.add(digest=write_digest(SHA256.of(data)), data=data)
    return request


@pytest.mark.parametrize("count", [10, 1000])
def test_a_batch_that_comes_anew_is_answered_and_not_stored_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    stored: list[int] = []
    real = Uploads.add_all

    def add_all(self: Uploads, blobs: Sequence[tuple[Digest, bytes]]) -> list[StoreError | None]:
        stored.append(len(blobs))
        return real(self, blobs)

    monkeypatch.setattr(Uploads, "add_all", add_all)
    with serving(store) as url, closing(Client(url.removeprefix("grpc://"))) as client:
        # What is here is remembered from the first question on, with which clients begin.
        assert client.missing([SHA256.of(b"0")])
        for _ in range(2):
            answer = client.call(methods.BATCH_UPDATE_BLOBS, batch_of(count))
            assert [item.status.code for item in answer.responses] == [0] * count
    assert sum(stored) == count


@pytest.mark.parametrize("count", [10, 1000])
def test_a_batch_of_which_nothing_could_be_stored_fails_as_a_call(
    store: Store, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    def add_all(_: Uploads, blobs: Sequence[tuple[Digest, bytes]]) -> list[StoreError | None]:
        return [None if data == kept else StoreUnusable("the disk is gone") for _, data in blobs]

    kept = b""
    monkeypatch.setattr(Uploads, "add_all", add_all)
    with serving(store) as url, closing(Client(url.removeprefix("grpc://"))) as client:
        with pytest.raises(grpc.RpcError) as failed:
            client.call(methods.BATCH_UPDATE_BLOBS, batch_of(count))
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        kept = b"7"
        answer = client.call(methods.BATCH_UPDATE_BLOBS, batch_of(count))
    assert {number for number, item in enumerate(answer.responses) if not item.status.code} == {7}
    assert answer.responses[0].status.code == codes.UNAVAILABLE
