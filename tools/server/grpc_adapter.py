"""The services over grpcio's asyncio server: endpoints as its handlers, their errors as its status codes.

The C library sets TCP_NODELAY on every connection by itself. It costs several times the CPU of our own HTTP/2 for a
small call, and is here for who trusts it more, and to compare with.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio

from store.errors import StoreUnusable
from tools.reapi import methods
from tools.server.address import Address
from tools.server.calls import Answer, Endpoint
from tools.server.limits import GrpcLimits
from tools.server.status import as_status
from tools.server.tls import Certificates, Tls

_NO_BOUND = (1 << 31) - 1
_UNREQUESTED_SECONDS = 3600
"""Whoever calls gives up before."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DETAILS = "grpc-status-details-bin"

_Context = grpc.aio.ServicerContext[Any, Any]


class GrpcioServer:
    """One server, in the running loop."""

    def __init__(self, endpoints: Iterable[Endpoint], limits: GrpcLimits) -> None:
        self._server = grpc.aio.server(options=_options_of(limits))
        _register(self._server, endpoints)

    async def start(self, address: Address, certificates: Certificates | None) -> int:
        """Take calls there, with TLS if there are `certificates`; returns the port. Raises StoreUnusable."""
        try:
            port = self._listen(str(address), certificates)
        except RuntimeError as error:
            raise StoreUnusable(f"can't listen at {address}: {error}") from error
        await self._server.start()
        return port

    def _listen(self, address: str, certificates: Certificates | None) -> int:
        if certificates is None:
            return self._server.add_insecure_port(address)
        credentials = grpc.dynamic_ssl_server_credentials(
            _configuration(certificates.current),
            lambda: _configuration(certificates.current),
            require_client_authentication=certificates.current.authority is not None,
        )
        return self._server.add_secure_port(address, credentials)

    async def drain(self, seconds: float) -> None:
        """Take no more calls, let those that are on end within so many seconds, then break them off."""
        await self._server.stop(seconds)


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)], root_certificates=tls.authority)


def _options_of(limits: GrpcLimits) -> Sequence[tuple[str, int]]:
    """Limits as the C library takes them."""
    return (
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", limits.header_bytes),
        ("grpc.max_concurrent_streams", limits.streams),
        # Calls that the loop hasn't come to yet wait: the library would end some of more than 1,000 as CANCELLED,
        # and all after 30 s, where a build that begins to upload has many thousands. Streams are the bound.
        ("grpc.server.max_pending_requests", _NO_BOUND),
        ("grpc.server.max_pending_requests_hard_limit", _NO_BOUND),
        ("grpc.server_max_unrequested_time_in_server", _UNREQUESTED_SECONDS),
        # A connection whose other end is gone without a word is noticed.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.so_reuseport", 1),
    )


def _register(server: grpc.aio.Server, endpoints: Iterable[Endpoint]) -> None:
    """Have a server answer with these."""
    handlers: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
    for endpoint in endpoints:
        handlers.setdefault(endpoint.method.service, {})[endpoint.method.name] = _handler_of(endpoint)
    for service, named in handlers.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, named),))


def _handler_of(endpoint: Endpoint) -> grpc.RpcMethodHandler[Any, Any]:
    begin, method = endpoint.begin, endpoint.method

    async def handle(request: bytes | AsyncIterator[bytes], context: _Context) -> Answer:
        try:
            answer = begin(request, _Call(context))
            return answer if answer is None or isinstance(answer, bytes) else await answer
        except Exception as error:  # noqa: BLE001 - told to the client
            await _abort(context, error)

    async def handle_as_one(request: bytes | AsyncIterator[bytes], context: _Context) -> Answer:
        return await handle(request, context) or b""

    if method is methods.READ:
        # On the wire it can't be told from a method that one message answers; here the last one then goes out
        # together with the status: one write and one wait less a call, for most blobs half of them.
        return grpc.unary_unary_rpc_method_handler(handle_as_one)
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.streams_in, method.streams_out]
    handler: grpc.RpcMethodHandler[Any, Any] = make(handle)
    return handler


class _Call:
    """A call as endpoints know it."""

    def __init__(self, context: _Context) -> None:
        self._context = context
        self.write = context.write

    @property
    def authorization(self) -> str | None:
        for key, value in self._context.invocation_metadata() or ():
            if key == "authorization":
                return value if isinstance(value, str) else None
        return None

    @property
    def client(self) -> str:
        return self._context.peer().rpartition(":")[0]


async def _abort(context: _Context, error: Exception) -> NoReturn:
    status = as_status(error)
    details = ((_DETAILS, status.SerializeToString()),) if status.details else ()
    await context.abort(_CODES[status.code], status.message, details)
    raise AssertionError("abort has raised")
