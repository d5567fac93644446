"""Counting around gRPC's methods: neither services nor the adapter know of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, cast

import grpc

from store.errors import BadDigest
from tools.reapi import methods
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method
from tools.server.grpc_adapter import Handler
from tools.server.metrics import Half, Metrics
from tools.server.recent import Named, Recent
from tools.server.requests import get_function, read_digest

_LOOKUPS = {methods.GET_ACTION_RESULT: Half.RESULT, methods.READ: Half.BLOB}
_RESULTS = {methods.GET_ACTION_RESULT: "hit", methods.UPDATE_ACTION_RESULT: "stored"}
_SMALL_BYTES = 1 << 10
_Behaviour = Callable[[Any, Any], Awaitable[bytes | None]]


class GrpcCounting:
    """Wraps handlers, for `GrpcAdapter.register`."""

    def __init__(self, metrics: Metrics, recent: Recent) -> None:
        self._metrics = metrics
        self._recent = recent

    def wrap(self, method: Method, handler: Handler) -> Handler:
        """The same handler, counted."""
        inner: Any = handler
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._counted(method, inner.stream_unary))
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._counted(method, inner.unary_stream))
        return grpc.unary_unary_rpc_method_handler(self._counted(method, inner.unary_unary))

    def _counted(self, method: Method, behaviour: _Behaviour) -> Any:
        async def handle(request: Any, context: Any) -> bytes | None:
            begun = time.perf_counter()
            call = _Call(context)
            answer = None
            if method is methods.WRITE:
                self._metrics.note_upload(1)
            try:
                answer = await behaviour(call.count(request), call)
                call.code = "OK"
                return answer
            finally:
                call.sent += len(answer or b"")
                if method is methods.WRITE:
                    self._metrics.note_upload(-1)
                self._metrics.note_request("grpc", method.name, call.code, time.perf_counter() - begun)
                self._metrics.note_bytes("grpc", call.received, call.sent)
                self._note_lookups(method, call.code, answer)
                if call.code == "OK" and method in _RESULTS:
                    self._note_result(method, request)

        return handle

    def _note_lookups(self, method: Method, code: str, answer: bytes | None) -> None:
        if method in _LOOKUPS and code in ("OK", "NOT_FOUND"):
            self._metrics.note_lookup(_LOOKUPS[method], hit=code == "OK")
        elif method is methods.BATCH_READ_BLOBS and answer:
            codes = [item.status.code for item in reapi.BatchReadBlobsResponse.FromString(answer).responses]
            for hit, number in ((True, codes.count(0)), (False, len(codes) - codes.count(0))):
                if number:
                    self._metrics.note_lookup(Half.BLOB, hit=hit, number=number)

    def _note_result(self, method: Method, raw: bytes) -> None:
        what = _RESULTS[method]
        if method is methods.GET_ACTION_RESULT and len(raw) <= _SMALL_BYTES:
            self._recent.note_message(raw, what)
        elif (named := read_named(raw, method)) is not None:
            instance, action, _ = named
            self._recent.note(instance, action, what)


def read_named(message: bytes, method: Method = methods.GET_ACTION_RESULT) -> Named | None:
    """What a request about an action's result is about, for `Recent`."""
    request = cast("reapi.GetActionResultRequest", method.request.FromString(message))
    try:
        function = get_function(request.digest_function, [request.action_digest.hash])
        return request.instance_name, read_digest(request.action_digest, function), False
    except BadDigest:
        return None  # the service would have refused it


class _Call:
    """The part of a call's context that the adapter uses, counting."""

    def __init__(self, context: Any) -> None:
        self.code = "CANCELLED"
        """Until it is known better."""
        self.received = 0
        self.sent = 0
        self._context = context
        self.invocation_metadata = context.invocation_metadata
        self.peer = context.peer

    def count(self, request: Any) -> Any:
        """The request, or its messages, counted as they come."""
        if isinstance(request, bytes):
            self.received += len(request)
            return request
        return self._count_all(request)

    async def _count_all(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for message in messages:
            self.received += len(message)
            yield message

    async def write(self, message: bytes) -> None:
        """Send a message."""
        self.sent += len(message)
        await self._context.write(message)

    async def abort(self, code: grpc.StatusCode, *more: Any) -> NoReturn:
        """End the call."""
        self.code = code.name
        await self._context.abort(code, *more)
        raise AssertionError("abort has raised")
