"""How the services' answers go out over gRPC: in how many steps."""

from __future__ import annotations

from typing import Any

from store.repository import Store
from tests.tools.server.conftest import SHA256, Client
from tests.tools.server.odd import serving
from tools.reapi import methods
from tools.server.calls import Endpoint


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


def test_a_small_blob_goes_out_in_one_step_with_its_status(store: Store) -> None:
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
