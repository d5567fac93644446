"""A gRPC server with the services, health and reflection, on our own HTTP/2."""

from __future__ import annotations

from collections.abc import Iterator, Set

from store.digest import Digest
from tools.reapi.methods import services_of
from tools.server.access import Access
from tools.server.address import Address
from tools.server.calls import Calls, Wrap
from tools.server.calls_under_way import CallUnderWay
from tools.server.gate import Gate
from tools.server.health import Health, Reflection
from tools.server.http2_server import Http2Server
from tools.server.limits import GrpcLimits
from tools.server.load import Load
from tools.server.overload import Pressure
from tools.server.services import Services
from tools.server.tls import Certificates


class GrpcServer:
    """One server, in the running loop."""

    def __init__(
        self,
        services: Services,
        access: Access,
        limits: GrpcLimits,
        wrap: Wrap = lambda endpoint: endpoint,
    ) -> None:
        """`wrap` goes around each method of the services."""
        self.gate = Gate(services.uploads.add_all, Load(), limits.uploads)
        """Through which uploads by other doors have to go, too."""
        self._calls = Calls(services, access, limits.idle_seconds, self.gate)
        endpoints = list(map(wrap, self._calls.endpoints))
        self._health = Health(services_of(endpoint.method for endpoint in endpoints))
        endpoints += self._health.endpoints
        endpoints += Reflection(endpoints).endpoints
        self._server = Http2Server(endpoints, limits, self.gate.load)

    async def start(self, address: Address, certificates: Certificates | None) -> int:
        """Take calls there, with TLS if there are `certificates`; returns the port. Raises StoreUnusable."""
        port = await self._server.start(address, certificates)
        self._health.set(serving=True)
        return port

    def pressure(self) -> Pressure:
        """What waits now, brought by other doors included. For any thread."""
        gate, load = self.gate, self.gate.load
        turns = gate.waiting_turns
        return Pressure(load.calls - turns, load.bytes, turns, gate.storing, load.left)

    def oldest_wait(self, now: float) -> float:
        """For how many seconds the oldest of it has waited."""
        times = (self.gate.oldest(), self._server.oldest())
        return max((now - time for time in times if time is not None), default=0.0)

    def take_full(self) -> bool:
        """Whether connections were not read at some time since the last call."""
        was_full = self.gate.load.was_full or self.gate.load.is_full
        self.gate.load.was_full = False
        return was_full

    def under_way(self, waiting: Set[Digest]) -> Iterator[CallUnderWay]:
        """All calls; `waiting`: blobs for which the store's threads have no room."""
        return self._server.under_way(waiting)

    async def drain(self, seconds: float) -> None:
        """Take no more calls, let those that are on end within so many seconds, then break them off."""
        self._health.set(serving=False)
        await self._server.drain(seconds)

    def close(self) -> None:
        """End the threads, when they have done what they are at; after it has drained, and who else uses the gate."""
        self.gate.close()
        self._calls.close()
