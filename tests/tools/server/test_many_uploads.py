"""A build that begins to upload: thousands of calls at once, on several connections, and all of them come through."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import pytest

from tests.tools.conftest import Casfs
from tests.tools.server.conftest import SHA256, pieces, running
from tools.reapi import methods
from tools.reapi.resource_names import ResourceName

CONNECTIONS = 5


async def upload(address: str, blobs: list[bytes], piece: int, connections: int = CONNECTIONS) -> list[int]:
    """Begin to upload all of them, with messages of `piece` bytes; the committed sizes."""
    async with AsyncExitStack() as stack:
        stubs: list[Any] = []
        for _ in range(connections):
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
            stubs.append(
                channel.stream_unary(
                    methods.WRITE.path,
                    request_serializer=methods.WRITE.request.SerializeToString,
                    response_deserializer=methods.WRITE.response.FromString,
                )
            )

        async def one(number: int, data: bytes) -> int:
            name = str(ResourceName("", SHA256.of(data), upload=f"u{number}"))
            answer = await stubs[number % connections](pieces(name, data, piece), timeout=90)
            return int(answer.committed_size)

        return await asyncio.gather(*(one(number, data) for number, data in enumerate(blobs)))


@pytest.mark.parametrize(
    ("count", "size", "piece", "options"),
    [
        # However many wait, none is ended for it: a server on gRPC's C library ends some beyond a thousand.
        (4000, 30, 1000, ()),
        # Small ones of several messages need no turn.
        (400, 3000, 1000, ("--max-uploads", "4")),
        # Large ones that are open while others begin: what is beyond the limit waits for its turn.
        (200, 60_000, 20_000, ("--max-uploads", "4")),
    ],
)
def test_all_come_through(casfs: Casfs, count: int, size: int, piece: int, options: tuple[str, ...]) -> None:
    source = random.Random(count)
    blobs = [source.randbytes(size) for _ in range(count)]
    with running(casfs, *options) as server:
        assert asyncio.run(upload(server.address, blobs, piece)) == [size] * count
    assert casfs.ok("stats", "--json").json["blobs"] == count
