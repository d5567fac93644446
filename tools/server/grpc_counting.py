"""Counting around gRPC's methods: neither services nor transports know of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, cast

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
        method = endpoint.method

        def begin(request: Any, context: Call) -> Answer | Later | Coroutine[Any, Any, Answer]:
            call = _Counted(context, request, partial(self._note_later, method))
            if not isinstance(request, bytes):
                request = _CountedMessages(request, call)
            try:
                answer = endpoint.begin(request, call)
            except Exception as error:
                self._note(method, call, codes.Code.Name(find_code(error)), None)
                raise
            if answer is None or isinstance(answer, bytes):
                self._note(method, call, "OK", answer)
                return answer
            if answer is LATER:
                if method is methods.WRITE:
                    self._metrics.note_upload(1)
                return answer
            return cast("Coroutine[Any, Any, Answer]", _Coming(self._finish(method, call, answer), answer))

        return endpoint._replace(begin=begin)

    async def _finish(self, method: Method, call: _Counted, coming: Coroutine[Any, Any, Answer]) -> Answer:
        code, answer = "CANCELLED", None
        if method is methods.WRITE:
            self._metrics.note_upload(1)
        try:
            answer = await coming
            code = "OK"
            return answer
        except Exception as error:
            code = codes.Code.Name(find_code(error))
            raise
        finally:
            if method is methods.WRITE:
                self._metrics.note_upload(-1)
            self._note(method, call, code, answer)

    def _note_later(self, method: Method, call: _Counted, code: str, answer: Answer) -> None:
        if method is methods.WRITE:
            self._metrics.note_upload(-1)
        self._note(method, call, code, answer)

    def _note(self, method: Method, call: _Counted, code: str, answer: Answer) -> None:
        self._metrics.note_request("grpc", method.name, code, time.perf_counter() - call.begun)
        self._metrics.note_bytes("grpc", call.received, call.sent + len(answer or b""))
        self._note_lookups(method, code, answer)
        if code == "OK" and method in _RESULTS:
            self._note_result(method, call.request)

    def _note_lookups(self, method: Method, code: str, answer: Answer) -> None:
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
    """A call, counted; `note` is told how it ended where that comes later."""

    def __init__(self, call: Call, request: Any, note: Callable[[_Counted, str, Answer], object]) -> None:
        self.begun = time.perf_counter()
        self.sent = 0
        self.authorization = call.authorization
        self.client = call.client
        self.connection = call.connection
        self.note_blobs = call.note_blobs
        self.widen = call.widen
        self._call = call
        self._note = note
        self.request = request
        self.received = len(request) if isinstance(request, bytes) else 0

    # What was given up before isn't answered, whatever became of what it brought.

    def answer(self, message: Answer) -> bool:
        is_waited_for = self._call.answer(message)
        if is_waited_for:
            self._note(self, "OK", message)
        else:
            self._note(self, "CANCELLED", None)
        return is_waited_for

    def fail(self, error: Exception) -> bool:
        is_waited_for = self._call.fail(error)
        self._note(self, codes.Code.Name(find_code(error)) if is_waited_for else "CANCELLED", None)
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
