"""A real server in this process whose services can be made odd: slow, lying, old, careless."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from store.action_cache import action_key
from store.digest import DigestFunction
from store.presence import WouldWait
from store.repository import Store
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.access import Anybody
from tools.server.address import Address
from tools.server.calls import Wrap
from tools.server.downloads import Reader, no_head
from tools.server.errors import InvalidArgument, Unimplemented
from tools.server.grpc_server import GrpcServer
from tools.server.limits import GrpcLimits
from tools.server.requests import get_function, read_digest
from tools.server.services import Services


@dataclass(frozen=True, slots=True)
class Odd:
    """What is odd. `silent`: doesn't say what it can do; `careless`: has results whose blobs are gone."""

    zstd: bool = True
    functions: tuple[DigestFunction, ...] = tuple(DigestFunction)
    batch_bytes: int = 0
    silent: bool = False
    delay: float = 0.0
    lying: bool = False
    careless: bool = False


class _Layer:
    """Whatever isn't defined here is as it was."""

    def __init__(self, real: Any, odd: Odd, store: Store) -> None:
        self._real = real
        self._odd = odd
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Capabilities(_Layer):
    def get(self, request: reapi.GetCapabilitiesRequest) -> reapi.ServerCapabilities:
        if self._odd.silent:
            raise Unimplemented("capabilities? what for?")
        answer: reapi.ServerCapabilities = self._real.get(request)
        cache = answer.cache_capabilities
        functions: Any = self._odd.functions
        cache.digest_functions[:] = functions
        if not self._odd.zstd:
            cache.supported_compressors[:] = []
            cache.supported_batch_update_compressors[:] = []
        cache.max_batch_total_size_bytes = self._odd.batch_bytes or cache.max_batch_total_size_bytes
        return answer


class _Cas(_Layer):
    def batch_read(self, request: reapi.BatchReadBlobsRequest, *, may_wait: bool = True) -> bytes:
        if not may_wait:
            raise WouldWait
        time.sleep(self._odd.delay)
        if request.acceptable_compressors and (not self._odd.zstd or self._odd.silent):
            raise InvalidArgument("compressors? what for?")
        if self._odd.batch_bytes and sum(digest.size_bytes for digest in request.digests) > self._odd.batch_bytes:
            raise InvalidArgument("too much")
        answer = reapi.BatchReadBlobsResponse.FromString(self._real.batch_read(request))
        for item in answer.responses if self._odd.lying else ():
            item.data, item.compressor = b"wrong", reapi.Compressor.IDENTITY
        return answer.SerializeToString()


class _Wrong:
    """A reader of other bytes."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @property
    def left(self) -> int | None:
        return self._reader.left

    def read(self, *, may_wait: bool = True, head: Callable[[int], bytes] = no_head) -> bytes:
        size = len(self._reader.read(may_wait=may_wait))
        return head(size) + b"?" * size if size else b""

    def close(self) -> None:
        self._reader.close()


class _ByteStream(_Layer):
    def open_read(self, request: Any, *, may_wait: bool = True) -> Reader:
        if not may_wait:
            raise WouldWait
        time.sleep(self._odd.delay)
        if "compressed-blobs" in request.resource_name and (not self._odd.zstd or self._odd.silent):
            raise InvalidArgument("compressors? what for?")
        reader: Reader = self._real.open_read(request)
        return _Wrong(reader) if self._odd.lying else reader


class _Actions(_Layer):
    def get(self, request: reapi.GetActionResultRequest, *, may_wait: bool = True) -> bytes:
        if not self._odd.careless:
            found: bytes = self._real.get(request, may_wait=may_wait)
            return found
        function = get_function(request.digest_function, [request.action_digest.hash])
        key = action_key(read_digest(request.action_digest, function), request.instance_name)
        return self._store.actions.read(key) or b""


@contextmanager
def serving(store: Store, odd: Odd | None = None, wrap: Wrap = lambda endpoint: endpoint) -> Iterator[str]:
    """A server of a store, in this process; its URL. `wrap` goes around each method."""
    odd = odd or Odd()
    ready: Future[int] = Future()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    with Services(store) as services:
        layered: Any = services
        for name, layer in (
            ("capabilities", _Capabilities),
            ("cas", _Cas),
            ("bytestream", _ByteStream),
            ("actions", _Actions),
        ):
            setattr(layered, name, layer(getattr(services, name), odd, store))

        async def main() -> None:
            server = GrpcServer(services, Anybody(), GrpcLimits(), wrap)
            ready.set_result(await server.start(Address("127.0.0.1", 0), None))
            await stop.wait()
            await server.drain(0.1)
            server.close()

        thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
        thread.start()
        try:
            yield f"grpc://127.0.0.1:{ready.result(10)}"
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()
