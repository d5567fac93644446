"""A gRPC server with the services, health and reflection, on the transport that is chosen."""

from __future__ import annotations

from typing import Protocol

from tools.reapi.methods import services_of
from tools.server.access import Access
from tools.server.address import Address
from tools.server.calls import Calls, Endpoint, Wrap
from tools.server.health import Health, Reflection
from tools.server.limits import GrpcLimits
from tools.server.services import Services
from tools.server.tls import Certificates


class _Server(Protocol):
    async def start(self, address: Address, certificates: Certificates | None) -> int: ...

    async def drain(self, seconds: float) -> None: ...


class GrpcServer:
    """One server, in the running loop."""

    def __init__(
        self,
        services: Services,
        access: Access,
        limits: GrpcLimits,
        wrap: Wrap = lambda endpoint: endpoint,
        transport: str = "http2",
    ) -> None:
        """`wrap` goes around each method of the services. `transport`: our own, or that of "grpcio"."""
        self._calls = Calls(services, access, limits.idle_seconds)
        endpoints = list(map(wrap, self._calls.endpoints))
        self._health = Health(services_of(endpoint.method for endpoint in endpoints))
        endpoints += self._health.endpoints
        endpoints += Reflection(endpoints).endpoints
        self._server = _make_server(transport, endpoints, limits)

    async def start(self, address: Address, certificates: Certificates | None) -> int:
        """Take calls there, with TLS if there are `certificates`; returns the port. Raises StoreUnusable."""
        port = await self._server.start(address, certificates)
        self._health.set(serving=True)
        return port

    async def drain(self, seconds: float) -> None:
        """Take no more calls, let those that are on end within so many seconds, then break them off."""
        self._health.set(serving=False)
        await self._server.drain(seconds)
        self._calls.close()


def _make_server(transport: str, endpoints: list[Endpoint], limits: GrpcLimits) -> _Server:
    if transport == "grpcio":
        from tools.server.grpc_adapter import GrpcioServer

        return GrpcioServer(endpoints, limits)
    from tools.server.http2_server import Http2Server

    return Http2Server(endpoints, limits)
