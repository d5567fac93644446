"""The services over gRPC: grpcio's asyncio server, and nothing that a service needs to know.

One event loop takes all calls. What a service can answer at once it answers
there; what waits for a disk (WouldWait), or is long, goes to a pool of threads.
So a slow client, an open upload or a broken connection holds no thread.

Messages are taken as bytes and parsed here, so that what is no message is the
client's error (INVALID_ARGUMENT) and not ours. The C library sets TCP_NODELAY on
every connection by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import Message

from store.presence import WouldWait
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.methods import Method
from tools.server.access import Access, right_for
from tools.server.bytestream import WriteCall
from tools.server.downloads import Reader
from tools.server.execution import Executions
from tools.server.places import Places
from tools.server.scheduler import Execution
from tools.server.services import Services
from tools.server.status import as_status
from tools.server.waiting import FETCH_THREADS, Waiting

_PATIENCE = 0.5
"""Of a silent client's time: so long an upload waits for its turn. Clients give up after a minute themselves."""
_NO_BOUND = (1 << 31) - 1
_UNREQUESTED_SECONDS = 3600
"""Whoever calls gives up before."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DETAILS = "grpc-status-details-bin"
_LAST_MOST = 64 << 10 | 15
"""Bytes of a message that is sent with the status, and so not patiently: more would be held for a client that hangs."""

_Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Wrap = Callable[[Method, Handler], Handler]


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """What one client can take: bytes of a message and of its headers, streams of a connection, seconds of silence."""

    message_bytes: int = 16 << 20
    header_bytes: int = 16 << 10
    streams: int = 1000
    idle_seconds: float = 60.0

    def options(self) -> Sequence[tuple[str, int]]:
        """As the C library takes them."""
        return (
            ("grpc.max_receive_message_length", self.message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", self.header_bytes),
            ("grpc.max_concurrent_streams", self.streams),
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


class GrpcAdapter:
    """Registers services with a server; made and used in the loop's thread."""

    def __init__(self, services: Services, access: Access, limits: GrpcLimits) -> None:
        self._access = access
        self._waiting = Waiting(limits.idle_seconds)
        self._fetching = Waiting(limits.idle_seconds, FETCH_THREADS)
        self._places = Places(services.desk.most_per_client, limits.idle_seconds * _PATIENCE)
        self._services = services
        cas, actions, stream = services.cas, services.actions, services.bytestream
        self._handlers: dict[Method, Handler] = {
            methods.GET_CAPABILITIES: self._quick(
                methods.GET_CAPABILITIES, lambda request, may_wait: services.capabilities.get(request)
            ),
            methods.GET_ACTION_RESULT: self._quick(
                methods.GET_ACTION_RESULT, lambda request, may_wait: actions.get(request, may_wait=may_wait)
            ),
            methods.UPDATE_ACTION_RESULT: self._slow(methods.UPDATE_ACTION_RESULT, actions.update),
            methods.FIND_MISSING_BLOBS: self._quick(
                methods.FIND_MISSING_BLOBS, lambda raw, may_wait: cas.find_missing(raw, may_wait=may_wait), read=bytes
            ),
            methods.BATCH_READ_BLOBS: self._quick(
                methods.BATCH_READ_BLOBS, lambda request, may_wait: cas.batch_read(request, may_wait=may_wait)
            ),
            methods.BATCH_UPDATE_BLOBS: self._slow(methods.BATCH_UPDATE_BLOBS, cas.batch_update),
            methods.GET_TREE: self._messages(methods.GET_TREE, cas.get_tree),
            methods.SPLIT_BLOB: self._slow(methods.SPLIT_BLOB, cas.split),
            methods.SPLICE_BLOB: self._slow(methods.SPLICE_BLOB, cas.splice),
            # On the wire it can't be told from a method that one message answers; here the last one then goes out
            # together with the status: one write and one wait less a call, for most blobs half of them.
            methods.READ: grpc.unary_unary_rpc_method_handler(self._read),
            methods.WRITE: grpc.stream_unary_rpc_method_handler(self._write),
            methods.QUERY_WRITE_STATUS: self._slow(methods.QUERY_WRITE_STATUS, stream.query_write_status),
        }
        if services.executions is not None:
            self._handlers |= self._executing(services.executions)

    def _executing(self, executions: Executions) -> dict[Method, Handler]:
        return {
            methods.EXECUTE: self._watched(
                methods.EXECUTE, lambda request, may_wait: executions.execute(request, may_wait=may_wait)
            ),
            methods.WAIT_EXECUTION: self._watched(
                methods.WAIT_EXECUTION, lambda request, may_wait: executions.wait(request)
            ),
            methods.GET_OPERATION: self._quick(
                methods.GET_OPERATION, lambda request, may_wait: executions.get(request)
            ),
            methods.LIST_OPERATIONS: self._slow(methods.LIST_OPERATIONS, executions.list),
            methods.CANCEL_OPERATION: self._quick(
                methods.CANCEL_OPERATION, lambda request, may_wait: executions.cancel(request)
            ),
        }

    @property
    def methods(self) -> list[Method]:
        """What is served."""
        return list(self._handlers)

    def register(self, server: grpc.aio.Server, wrap: Wrap = lambda method, handler: handler) -> None:
        """Have a server answer with these services, each method `wrap`ped."""
        for service in methods.services_of(self._handlers):
            handlers = {
                method.name: wrap(method, h) for method, h in self._handlers.items() if method.service == service
            }
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    def close(self) -> None:
        """End the threads, when they have done what they are at."""
        self._waiting.close()
        self._fetching.close()

    # How a kind of method is called.

    def _quick(
        self,
        method: Method,
        call: Callable[[Any, bool], Message | bytes],
        read: Callable[[bytes], object] | None = None,
    ) -> Handler:
        """`read` makes of a message what the service takes: by default that message."""
        parse = read or method.request.FromString

        async def handle(raw: bytes, context: _Context) -> bytes:
            try:
                self._check(method, context)
                request = parse(raw)
                try:
                    return _serialize(call(request, False))
                except WouldWait:
                    return _serialize(await self._fetching.in_thread(call, request, True))
            except Exception as error:  # noqa: BLE001 - told to the client
                await _abort(context, error)

        return grpc.unary_unary_rpc_method_handler(handle)

    def _slow(self, method: Method, call: Callable[[Any], Message | bytes]) -> Handler:
        async def handle(raw: bytes, context: _Context) -> bytes:
            try:
                self._check(method, context)
                request = method.request.FromString(raw)
                return _serialize(await self._waiting.in_thread(call, request))
            except Exception as error:  # noqa: BLE001 - told to the client
                await _abort(context, error)

        return grpc.unary_unary_rpc_method_handler(handle)

    def _messages(self, method: Method, call: Callable[[Any], Iterator[Message]]) -> Handler:
        async def handle(raw: bytes, context: _Context) -> None:
            try:
                self._check(method, context)
                messages = await self._fetching.in_thread(call, method.request.FromString(raw))
                while (message := await self._fetching.in_thread(next, messages, None)) is not None:
                    await self._waiting.patiently(context.write(message.SerializeToString()))
            except Exception as error:  # noqa: BLE001 - told to the client
                await _abort(context, error)

        return grpc.unary_stream_rpc_method_handler(handle)

    def _watched(self, method: Method, call: Callable[[Any, bool], Execution]) -> Handler:
        """An execution's states as they come; nobody waits in a thread for the next one."""

        async def handle(raw: bytes, context: _Context) -> None:
            try:
                self._check(method, context)
                request = method.request.FromString(raw)
                try:
                    execution = call(request, False)
                except WouldWait:
                    execution = await self._fetching.in_thread(call, request, True)
                changed = asyncio.Event()
                loop = asyncio.get_running_loop()
                with execution.watch(lambda: loop.call_soon_threadsafe(changed.set)) as watch:
                    done = False
                    while not done:
                        changed.clear()
                        while (state := watch.next()) is not None:
                            await self._waiting.patiently(context.write(state.SerializeToString()))
                            done = state.done
                        if not done:
                            await changed.wait()
            except Exception as error:  # noqa: BLE001 - told to the client
                await _abort(context, error)

        return grpc.unary_stream_rpc_method_handler(handle)

    async def _read(self, raw: bytes, context: _Context) -> bytes:
        """All messages but the last; that is what it returns."""
        service = self._services.bytestream
        try:
            self._check(methods.READ, context)
            request = bytestream.ReadRequest.FromString(raw)
            try:
                reader = service.open_read(request, may_wait=False)
            except WouldWait:
                reader = await self._fetching.in_thread(service.open_read, request, dropped=lambda late: late.close())
            with closing(reader):
                message = await self._read_piece(reader)
                while message:
                    following = await self._read_piece(reader)
                    if not following and len(message) <= _LAST_MOST:
                        break
                    await self._waiting.patiently(context.write(message))
                    message = following
                return message
        except Exception as error:  # noqa: BLE001 - told to the client
            await _abort(context, error)

    async def _read_piece(self, reader: Reader) -> bytes:
        try:
            return reader.read(may_wait=False, head=_head_of_piece)
        except WouldWait:
            return await self._waiting.in_thread(lambda: reader.read(head=_head_of_piece))

    async def _write(self, raws: AsyncIterator[bytes], context: _Context) -> bytes:
        client = _client_of(context)
        try:
            self._check(methods.WRITE, context)
            async with self._places.one(client):
                # Closed also when the client has vanished, which cancels this.
                with closing(self._services.bytestream.begin_write(client)) as call:
                    return (await self._take(raws, call)).SerializeToString()
        except Exception as error:  # noqa: BLE001 - told to the client
            await _abort(context, error)

    async def _take(self, raws: AsyncIterator[bytes], call: WriteCall) -> Message:
        while True:
            try:
                raw = await self._waiting.patiently(anext(raws))
            except StopAsyncIteration:
                return call.end()
            request = bytestream.WriteRequest.FromString(raw)
            try:
                answer = call.feed(request, may_wait=False)
            except WouldWait:
                answer = await self._waiting.in_thread(call.feed, request)
            if answer is not None:
                return answer

    # What they share.

    def _check(self, method: Method, context: _Context) -> None:
        authorization = None
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                authorization = value if isinstance(value, str) else None
        self._access.check(authorization, right_for(method))


def _serialize(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _head_of_piece(size: int) -> bytes:
    """What makes so many bytes a ReadResponse. Not by protobuf, which would copy them twice."""
    head = bytearray(b"\x52")
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head)


def _client_of(context: _Context) -> str:
    """Whose uploads are counted together: those of one address, whatever its port."""
    return context.peer().rpartition(":")[0]


async def _abort(context: _Context, error: Exception) -> NoReturn:
    status = as_status(error)
    details = ((_DETAILS, status.SerializeToString()),) if status.details else ()
    await context.abort(_CODES[status.code], status.message, details)
    raise AssertionError("abort has raised")
