"""Counting around gRPC's methods: neither services nor transports know of it."""

from __future__ import annotations

import time
from collections.abc import Collection, Coroutine, Generator
from typing import Any, cast

from store.digest import Digest
from store.errors import BadDigest
from tools.reapi import methods
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method
from tools.server.calls import LATER, Answer, Call, Endpoint, Later, Messages
from tools.server.metrics import Half, Metrics
from tools.server.recent import Named, Recent
from tools.server.requests import get_function, read_digest
from tools.server.status import find_code

_LOOKUPS = {methods.GET_ACTION_RESULT: Half.RESULT, methods.READ: Half.BLOB}
_RESULTS = {methods.GET_ACTION_RESULT: "hit", methods.UPDATE_ACTION_RESULT: "stored"}
_SMALL_BYTES = 1 << 10


class GrpcCounting:
    """Wraps endpoints."""

    def __init__(self, metrics: Metrics, recent: Recent) -> None:
        self._metrics = metrics
        self._recent = recent

    def wrap(self, endpoint: Endpoint) -> Endpoint:
        """The same endpoint, counted."""
        counting = _MethodCounting(endpoint.method, self._metrics, self._recent)
        inner = endpoint.begin

        def begin(request: Any, context: Call) -> Answer | Later | Coroutine[Any, Any, Answer]:
            call = _Counted(context, request, counting)
            if not isinstance(request, bytes):
                request = _CountedMessages(request, call)
            try:
                answer = inner(request, call)
            except Exception as error:
                counting.note(call, codes.Code.Name(find_code(error)), None)
                raise
            if answer is None or isinstance(answer, bytes):
                counting.note(call, "OK", answer)
                return answer
            if answer is LATER:
                counting.note_open()
                return answer
            return cast("Coroutine[Any, Any, Answer]", _Coming(counting.finish(call, answer), answer))

        return endpoint._replace(begin=begin)


class _MethodCounting:
    """What is counted of a method's calls."""

    def __init__(self, method: Method, metrics: Metrics, recent: Recent) -> None:
        self._is_write = method is methods.WRITE
        self._method = method
        self._name = method.name
        self._metrics = metrics
        self._recent = recent
        self._half = _LOOKUPS.get(method)
        self._reads_many = method is methods.BATCH_READ_BLOBS
        self._what = _RESULTS.get(method)

    async def finish(self, call: _Counted, coming: Coroutine[Any, Any, Answer]) -> Answer:
        """Wait for an answer."""
        code, answer = "CANCELLED", None
        self.note_open()
        try:
            answer = await coming
            code = "OK"
            return answer
        except Exception as error:
            code = codes.Code.Name(find_code(error))
            raise
        finally:
            self.note_later(call, code, answer)

    def note_open(self) -> None:
        """A call isn't answered at once; `note_later` follows."""
        if self._is_write:
            self._metrics.note_upload(1)

    def note_later(self, call: _Counted, code: str, answer: Answer) -> None:
        """A call ended that wasn't answered at once."""
        if self._is_write:
            self._metrics.note_upload(-1)
        self.note(call, code, answer)

    def note(self, call: _Counted, code: str, answer: Answer) -> None:
        """A call ended."""
        metrics = self._metrics
        metrics.note_request("grpc", self._name, code, time.perf_counter() - call.begun)
        metrics.note_bytes("grpc", call.received, call.sent + len(answer or b""))
        if self._half is not None and code in ("OK", "NOT_FOUND"):
            metrics.note_lookup(self._half, hit=code == "OK")
        elif self._reads_many and answer:
            codes = [item.status.code for item in reapi.BatchReadBlobsResponse.FromString(answer).responses]
            for hit, number in ((True, codes.count(0)), (False, len(codes) - codes.count(0))):
                if number:
                    metrics.note_lookup(Half.BLOB, hit=hit, number=number)
        if self._what is not None and code == "OK":
            self._note_result(self._what, call.request)

    def _note_result(self, what: str, raw: bytes) -> None:
        if self._method is methods.GET_ACTION_RESULT and len(raw) <= _SMALL_BYTES:
            self._recent.note_message(raw, what)
        elif (named := read_named(raw, self._method)) is not None:
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


class _Coming:
    """What is awaited for an answer, counted; closed before it was begun, it closes what is within, too."""

    def __init__(self, counted: Coroutine[Any, Any, Answer], within: Coroutine[Any, Any, Answer]) -> None:
        self._counted = counted
        self._within = within

    def __await__(self) -> Generator[Any, Any, Answer]:
        return self._counted.__await__()

    def close(self) -> None:
        """Nobody will await it; harmless when it was awaited."""
        self._counted.close()
        self._within.close()


class _Counted:
    """A call, counted."""

    __slots__ = ("_call", "_counting", "begun", "received", "request", "sent")

    def __init__(self, call: Call, request: Any, counting: _MethodCounting) -> None:
        self.begun = time.perf_counter()
        self.sent = 0
        self._call = call
        self._counting = counting
        self.request = request
        self.received = len(request) if isinstance(request, bytes) else 0

    @property
    def authorization(self) -> str | None:
        return self._call.authorization

    @property
    def client(self) -> str:
        return self._call.client

    @property
    def connection(self) -> int:
        return self._call.connection

    def note_blobs(self, blobs: Collection[Digest]) -> None:
        self._call.note_blobs(blobs)

    def widen(self) -> None:
        self._call.widen()

    # What was given up before isn't answered, whatever became of what it brought.

    def answer(self, message: Answer) -> bool:
        is_waited_for = self._call.answer(message)
        if is_waited_for:
            self._counting.note_later(self, "OK", message)
        else:
            self._counting.note_later(self, "CANCELLED", None)
        return is_waited_for

    def fail(self, error: Exception) -> bool:
        is_waited_for = self._call.fail(error)
        self._counting.note_later(self, codes.Code.Name(find_code(error)) if is_waited_for else "CANCELLED", None)
        return is_waited_for

    async def write(self, message: bytes) -> None:
        self.sent += len(message)
        await self._call.write(message)


class _CountedMessages:
    """A call's messages, counted. Not the call itself: what refers to itself is garbage that has to be looked for."""

    def __init__(self, messages: Messages, call: _Counted) -> None:
        self._messages = messages
        self._call = call

    def take(self) -> bytes | None:
        message = self._messages.take()
        if message is not None:
            self._call.received += len(message)
        return message

    def __aiter__(self) -> _CountedMessages:
        return self

    async def __anext__(self) -> bytes:
        message = await anext(self._messages)
        self._call.received += len(message)
        return message
