"""What is counted of calls that are answered later."""

from __future__ import annotations

import asyncio
from typing import Any

import h2.events

from tests.tools.server.test_http2_calls import LIMITS, connected
from tools.reapi import methods
from tools.server.address import Address
from tools.server.calls import LATER, Call, Endpoint, Later
from tools.server.errors import FailedPrecondition
from tools.server.grpc_counting import GrpcCounting
from tools.server.http2_server import Http2Server
from tools.server.metrics import Metrics, Sizes
from tools.server.recent import Recent


class Counted:
    """A Write that is answered when a test says so. `calls`: those that wait."""

    def __init__(self) -> None:
        self.metrics = Metrics(lambda: Sizes(0, 0))
        self.calls: list[Call] = []
        counting = GrpcCounting(self.metrics, Recent(self.metrics.lookups))
        self.endpoint = counting.wrap(Endpoint(methods.WRITE, self._begin, keeps=True))

    def _begin(self, messages: Any, call: Call) -> Later:
        messages.take()
        self.calls.append(call)
        return LATER

    def numbers(self) -> dict[str, float]:
        """Of uploads that are open, of calls by their status, and of bytes that were sent, as far as there are any."""
        found = {}
        for line in self.metrics.render()[0].decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name == "casfs_open_uploads":
                found["open"] = float(value)
            elif name.startswith("casfs_requests_total"):
                found[name.split('status="')[1].split('"')[0]] = float(value)
            elif name.startswith("casfs_transferred_bytes_total") and 'direction="out"' in name:
                found["sent"] = float(value)
        return found


def test_what_is_answered_later_is_open_until_then_and_counted_as_its_client_saw_it() -> None:
    async def main() -> None:
        counted = Counted()
        server = Http2Server([counted.endpoint], LIMITS)
        port = await server.start(Address("127.0.0.1", 0), None)
        async with asyncio.timeout(30), connected(Address("127.0.0.1", port)) as peer:
            streams = [peer.call(methods.WRITE.path, b"message") for _ in range(4)]
            # One before it is begun, one later.
            peer.h2.reset_stream(streams[0])
            await peer.until(lambda: len(counted.calls) == 4)
            assert counted.numbers() == {"open": 4}
            peer.h2.reset_stream(streams[1])
            peer.h2.ping(bytes(8))
            await peer.until(lambda: any(isinstance(event, h2.events.PingAckReceived) for event in peer.events))
            assert not counted.calls[0].fail(FailedPrecondition("nobody is told"))
            assert not counted.calls[1].answer(b"nobody is told")
            assert counted.calls[2].answer(b"told")
            assert counted.calls[3].fail(FailedPrecondition("told"))
            assert counted.numbers() == {"open": 0, "CANCELLED": 2, "OK": 1, "FAILED_PRECONDITION": 1, "sent": 4}
            for stream, status in ((streams[2], "0"), (streams[3], "9")):
                assert (await peer.answer(stream))[0]["grpc-status"] == status
        await server.drain(0)

    asyncio.run(main())
