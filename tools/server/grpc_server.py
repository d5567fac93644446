"""A gRPC server with the services, health and reflection: its life, from listening to drained."""

from __future__ import annotations

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tools.reapi.methods import services_of
from tools.server.access import Access
from tools.server.grpc_adapter import GrpcAdapter, GrpcLimits, Wrap
from tools.server.services import Services
from tools.server.tls import Certificates, Tls


class GrpcServer:
    """One server, in the running loop."""

    def __init__(
        self,
        services: Services,
        access: Access,
        limits: GrpcLimits,
        wrap: Wrap = lambda method, handler: handler,
    ) -> None:
        """`wrap` goes around each method."""
        self._server = grpc.aio.server(options=limits.options())
        self._adapter = GrpcAdapter(services, access, limits)
        self._adapter.register(self._server, wrap)
        # What is generated registers methods, beside handing its handlers over, which is enough: grpcio waits for the
        # next call with a task for each registered method, and all of them are looked at for each call.
        self._server.add_registered_method_handlers = lambda *_: None  # type: ignore[method-assign]
        # Neither asks for a token: who checks whether a server lives needn't be able to use it.
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = services_of(self._adapter.methods)
        reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    def listen(self, address: str, certificates: Certificates | None) -> int:
        """Take a port, with TLS if there are `certificates`; returns it, or 0 where that failed."""
        if certificates is None:
            return self._server.add_insecure_port(address)
        credentials = grpc.dynamic_ssl_server_credentials(
            _configuration(certificates.current),
            lambda: _configuration(certificates.current),
            require_client_authentication=certificates.current.authority is not None,
        )
        return self._server.add_secure_port(address, credentials)

    async def start(self) -> None:
        """Answer calls from now on."""
        await self._server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, seconds: float) -> None:
        """Take no more calls, let those that are on end within so many seconds, then break them off."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(seconds)
        self._adapter.close()


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)], root_certificates=tls.authority)
