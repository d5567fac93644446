"""Whether a server lives and what it speaks: gRPC's health and reflection services, as endpoints.

Neither asks for a token: who checks whether a server lives needn't be able to use it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health_pb2 as health
from grpc_reflection.v1alpha import reflection_pb2 as reflection

from tools.reapi.methods import Method, services_of
from tools.server.calls import Call, Endpoint
from tools.server.errors import NotThere

_CHECK = Method("grpc.health.v1.Health", "Check", health.HealthCheckRequest, health.HealthCheckResponse)
_WATCH = _CHECK._replace(name="Watch", streams_out=True)
_INFO = Method(
    "grpc.reflection.v1alpha.ServerReflection",
    "ServerReflectionInfo",
    reflection.ServerReflectionRequest,
    reflection.ServerReflectionResponse,
    streams_in=True,
    streams_out=True,
)
_INFOS = (_INFO, _INFO._replace(service="grpc.reflection.v1.ServerReflection"))
"""Both versions have the same messages on the wire."""


class Health:
    """Of a server and of each of its services. Used in the loop's thread."""

    def __init__(self, services: Iterable[str]) -> None:
        self._names = frozenset(("", *services))
        self._serving = self._ended = False
        self._changed = asyncio.Event()
        self.endpoints = [Endpoint(_CHECK, self._check), Endpoint(_WATCH, self._watch)]

    def set(self, *, serving: bool) -> None:
        """Say so from now on."""
        # Who watches learns that, and isn't waited for by a server that drains.
        self._ended = self._serving and not serving
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _check(self, raw: bytes, context: Call) -> bytes:
        name = health.HealthCheckRequest.FromString(raw).service
        if name not in self._names:
            raise NotThere(f"there is no service {name[:200]!r} here")
        return self._answer(name)

    async def _watch(self, raw: bytes, context: Call) -> None:
        name = health.HealthCheckRequest.FromString(raw).service
        while True:
            changed = self._changed
            await context.write(self._answer(name))
            if self._ended:
                return
            await changed.wait()

    def _answer(self, name: str) -> bytes:
        status: Any = health.HealthCheckResponse.SERVICE_UNKNOWN
        if name in self._names:
            status = health.HealthCheckResponse.SERVING if self._serving else health.HealthCheckResponse.NOT_SERVING
        return health.HealthCheckResponse(status=status).SerializeToString()


class Reflection:
    """What there is to call, and the files that say how."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.endpoints = [Endpoint(method, self._info) for method in _INFOS]
        self._names = services_of(endpoint.method for endpoint in (*endpoints, *self.endpoints))

    async def _info(self, raws: AsyncIterator[bytes], context: Call) -> None:
        async for raw in raws:
            request = reflection.ServerReflectionRequest.FromString(raw)
            try:
                answer = self._answer(request)
            except (KeyError, TypeError) as error:
                answer = reflection.ServerReflectionResponse(
                    error_response=reflection.ErrorResponse(error_code=5, error_message=str(error))
                )
            answer.valid_host = request.host
            answer.original_request.CopyFrom(request)
            await context.write(answer.SerializeToString())

    def _answer(self, request: reflection.ServerReflectionRequest) -> reflection.ServerReflectionResponse:
        """Raises KeyError for what isn't known."""
        pool = Default()
        kind = request.WhichOneof("message_request")
        if kind == "list_services":
            services = [reflection.ServiceResponse(name=name) for name in self._names]
            return reflection.ServerReflectionResponse(
                list_services_response=reflection.ListServiceResponse(service=services)
            )
        if kind == "file_by_filename":
            return _files(pool.FindFileByName(request.file_by_filename))
        if kind == "file_containing_symbol":
            return _files(pool.FindFileContainingSymbol(request.file_containing_symbol))
        if kind == "file_containing_extension":
            extension = request.file_containing_extension
            message = pool.FindMessageTypeByName(extension.containing_type)
            found = pool.FindExtensionByNumber(message, extension.extension_number)
            return _files(pool.FindFileContainingSymbol(found.full_name))
        if kind == "all_extension_numbers_of_type":
            message = pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
            numbers = sorted(extension.number for extension in pool.FindAllExtensions(message))
            return reflection.ServerReflectionResponse(
                all_extension_numbers_response=reflection.ExtensionNumberResponse(
                    base_type_name=message.full_name, extension_number=numbers
                )
            )
        raise KeyError("a question that isn't known here")


def _files(file: FileDescriptor) -> reflection.ServerReflectionResponse:
    """A file and all that it needs."""
    found: dict[str, bytes] = {}

    def add(one: FileDescriptor) -> None:
        if one.name not in found:
            found[one.name] = one.serialized_pb
            for needed in one.dependencies:
                add(needed)

    add(file)
    return reflection.ServerReflectionResponse(
        file_descriptor_response=reflection.FileDescriptorResponse(file_descriptor_proto=found.values())
    )
