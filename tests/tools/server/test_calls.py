"""How the services' answers go out over gRPC: in how many steps."""

from __future__ import annotations

from typing import Any

import pytest

from store.digest import Digest, DigestFunction
from store.errors import BadName
from store.layout import blob_path
from store.presence import WouldWait
from store.repository import Store
from tests.tools.server.conftest import SHA256, Client
from tests.tools.server.odd import serving
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.resource_names import Compression, ResourceName
from tools.server.calls import Endpoint
from tools.server.errors import InvalidArgument
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
