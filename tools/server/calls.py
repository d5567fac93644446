"""The services' methods as a transport calls them: one message in or many, one out or many, at once or later.

One event loop takes all calls. What a service can answer at once it answers
there; what waits for a disk (WouldWait), or is long, goes to a pool of threads.
So a slow client, an open upload or a broken connection holds no thread.

Messages are taken as bytes and parsed here, so that what is no message is the
client's error (INVALID_ARGUMENT) and not ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from enum import Enum
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

from google.protobuf.message import Message

from store.digest import Digest
from store.errors import StoreUnusable
from store.presence import WouldWait
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method
from tools.reapi.wire import write_varint
from tools.server.access import Access, right_for
from tools.server.bytestream import SmallWrite, WriteCall
from tools.server.cas import Batch
from tools.server.downloads import Reader
from tools.server.errors import InvalidArgument
from tools.server.execution import Executions
from tools.server.gate import Client, Gate, settle_future
from tools.server.scheduler import Execution
from tools.server.services import Services
from tools.server.waiting import FETCH_THREADS, LOOK_THREADS, Waiting
from tools.server.waits import Reason, waiting_for

_QUICK_SECONDS = 0.1
"""An action that takes no longer is quick. Its other states cost a client, Bazel, a millisecond of CPU."""
_SMALL_BYTES = 64 << 10
_LAST_MOST = _SMALL_BYTES | 15
"""Bytes of a message that is sent with the status, and so not patiently: more would be held for a client that hangs."""
_LOOKED_AT_MOST = 1 << 20
"""Bytes of a message that is looked at in the loop: with thousands of digests in it that takes some tens of ms."""
_ITEMS_MOST = 256
"""Of a batch of uploads that is taken apart in the loop, and of those that are handed on at a time."""
_WHOLE_MOST = 28 << 10
"""Bytes of an upload that comes whole before it has its turn: they fit into a stream's first window."""
_GATHERED_MOST = 256 << 10
"""And of one that is gathered in memory when it has its turn, and then stored together with others."""


class Call(Protocol):
    """What a method knows of the call it answers."""

    @property
    def authorization(self) -> str | None:
        """The header of that name."""
        ...

    @property
    def client(self) -> str:
        """The address it comes from, without the port."""
        ...

    @property
    def connection(self) -> int:
        """A number that tells connections apart."""
        ...

    def answer(self, message: Answer) -> bool:
        """Answer what `begin` said would be answered `LATER`; whether somebody still waits for it."""
        ...

    def fail(self, error: Exception) -> bool:
        """Say what went wrong in place of an answer; whether somebody still waits for it."""
        ...

    def note_blobs(self, blobs: Collection[Digest]) -> None:
        """It will be answered when these are in the store: for who asks what it waits for."""
        ...

    def widen(self) -> None:
        """It has its turn: more of its messages may be on their way here at a time."""
        ...

    async def write(self, message: bytes) -> None:
        """Send a message, and wait until the client takes more."""
        ...


class Messages(Protocol):
    """Those of a request that has many, in order."""

    def take(self) -> bytes | None:
        """The next one, if it is there."""
        ...

    def __aiter__(self) -> Messages: ...

    async def __anext__(self) -> bytes: ...


Answer = bytes | None
"""The only message, or the last; None: there was none, or all were written."""


class Later(Enum):
    """What says that an answer comes later, by `Call.answer` or `Call.fail`, and that nothing has to be awaited."""

    LATER = "later"


LATER = Later.LATER
Begin = Callable[[Any, Any], "Answer | Later | Coroutine[Any, Any, Answer]"]


class Endpoint(NamedTuple):
    """A method as it is called.

    `begin` takes a message (or `Messages`, where the method has many: then the
    first of them is there, or there is none) and a `Call`; it raises, or returns
    the answer, or what is to be awaited for it, or LATER. Errors are those of the
    table in `tools.server.status`. `keeps`: it is called even if the client has
    given up, as what it brought is worth keeping.
    """

    method: Method
    begin: Begin
    keeps: bool = False


Wrap = Callable[[Endpoint], Endpoint]


class Calls:
    """The endpoints of services; made and used in the loop's thread."""

    def __init__(self, services: Services, access: Access, idle_seconds: float, gate: Gate) -> None:
        """`idle_seconds`: how long a client may make no progress."""
        self._waiting = Waiting(idle_seconds)
        self._fetching = Waiting(idle_seconds, FETCH_THREADS)
        # Of their own: who asks what is here doesn't wait behind those who wait for a slow source.
        self._looking = Waiting(idle_seconds, LOOK_THREADS)
        self._gate = gate
        self._cas = services.cas
        self._stream = services.bytestream
        cas, actions = services.cas, services.actions
        endpoints = [
            self._quick(methods.GET_CAPABILITIES, lambda request, may_wait: services.capabilities.get(request)),
            self._quick(
                methods.GET_ACTION_RESULT,
                lambda request, may_wait: actions.get(request, may_wait=may_wait),
                pool=self._looking,
            ),
            self._slow(methods.UPDATE_ACTION_RESULT, actions.update),
            self._quick(
                methods.FIND_MISSING_BLOBS,
                lambda question, may_wait: cas.find_missing(question, may_wait=may_wait),
                read=cas.read_question,
                pool=self._looking,
            ),
            self._quick(methods.BATCH_READ_BLOBS, lambda request, may_wait: cas.batch_read(request, may_wait=may_wait)),
            Endpoint(methods.BATCH_UPDATE_BLOBS, self._batch_update, keeps=True),
            self._messages(methods.GET_TREE, cas.get_tree),
            self._slow(methods.SPLIT_BLOB, cas.split),
            self._slow(methods.SPLICE_BLOB, cas.splice),
            Endpoint(methods.READ, self._read),
            Endpoint(methods.WRITE, self._write, keeps=True),
            Endpoint(methods.QUERY_WRITE_STATUS, self._query_write_status),
        ]
        if services.executions is not None:
            endpoints += self._executing(services.executions)
        self.endpoints = [_guarded(endpoint, access) for endpoint in endpoints]

    def _executing(self, executions: Executions) -> list[Endpoint]:
        return [
            self._watched(methods.EXECUTE, lambda request, may_wait: executions.execute(request, may_wait=may_wait)),
            self._watched(methods.WAIT_EXECUTION, lambda request, may_wait: executions.wait(request)),
            self._quick(methods.GET_OPERATION, lambda request, may_wait: executions.get(request)),
            self._slow(methods.LIST_OPERATIONS, executions.list),
            self._quick(methods.CANCEL_OPERATION, lambda request, may_wait: executions.cancel(request)),
        ]

    def close(self) -> None:
        """End the threads, when they have done what they are at."""
        self._waiting.close()
        self._fetching.close()
        self._looking.close()

    # How a kind of method is called.

    def _quick(
        self,
        method: Method,
        call: Callable[[Any, bool], Message | bytes],
        read: Callable[[bytes], object] | None = None,
        pool: Waiting | None = None,
    ) -> Endpoint:
        """`read` makes of a message what the service takes: by default that message.

        `pool`: whose threads call it where it would wait; by default those that may wait for sources.
        """
        parse = read or method.request.FromString
        threads = pool or self._fetching

        def begin(raw: bytes, context: Call) -> Answer | Coroutine[Any, Any, Answer]:
            if len(raw) > _LOOKED_AT_MOST:
                return later(raw, parse)
            request = parse(raw)
            try:
                return _serialize(call(request, False))
            except WouldWait:
                return later(request, lambda request: request)

        async def later(request: Any, parse: Callable[[Any], object]) -> bytes:
            return await threads.in_thread(lambda: _serialize(call(parse(request), True)))

        return Endpoint(method, begin)

    def _slow(self, method: Method, call: Callable[[Any], Message | bytes]) -> Endpoint:
        async def handle(raw: bytes, context: Call) -> bytes:
            request = method.request.FromString(raw)
            return _serialize(await self._waiting.in_thread(call, request))

        return Endpoint(method, handle)

    def _messages(self, method: Method, call: Callable[[Any], Iterator[Message]]) -> Endpoint:
        async def handle(raw: bytes, context: Call) -> None:
            messages = await self._fetching.in_thread(call, method.request.FromString(raw))
            while (message := await self._fetching.in_thread(next, messages, None)) is not None:
                await self._waiting.patiently(context.write(message.SerializeToString()))

        return Endpoint(method, handle)

    def _watched(self, method: Method, call: Callable[[Any, bool], Execution]) -> Endpoint:
        """An execution's states as they come; nobody waits in a thread for the next one.

        The first waits a little for the end: of a quick action only that is sent.
        """

        async def handle(raw: bytes, context: Call) -> None:
            request = method.request.FromString(raw)
            try:
                execution = call(request, False)
            except WouldWait:
                execution = await self._fetching.in_thread(call, request, True)
            changed = asyncio.Event()
            loop = asyncio.get_running_loop()
            patient = True

            def wake() -> None:
                if execution.done or not patient:
                    loop.call_soon_threadsafe(changed.set)

            with execution.watch(wake) as watch:
                if not execution.done:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), _QUICK_SECONDS)
                patient = done = False
                while not done:
                    changed.clear()
                    while (state := watch.next()) is not None:
                        await self._waiting.patiently(context.write(state.SerializeToString()))
                        done = state.done
                    if not done:
                        await changed.wait()

        return Endpoint(method, handle)

    def _read(self, raw: bytes, context: Call) -> Answer | Coroutine[Any, Any, Answer]:
        """A blob that is one small message at once; all messages but the last are written."""
        try:
            data = self._stream.read_small(raw)
            if data is not None:
                return _head_of_piece(len(data)) + data
            request = bytestream.ReadRequest.FromString(raw)
            with closing(self._stream.open_read(request, may_wait=False)) as reader:
                if reader.left is not None and reader.left <= _SMALL_BYTES:
                    message = reader.read(may_wait=False, head=_head_of_piece)
                    if not reader.left:
                        return message or None
                    # The page cache has only its beginning.
        except WouldWait:
            pass
        return self._read_on(bytestream.ReadRequest.FromString(raw), context)

    async def _read_on(self, request: bytestream.ReadRequest, context: Call) -> Answer:
        try:
            reader = self._stream.open_read(request, may_wait=False)
        except WouldWait:
            reader = await self._fetching.in_thread(self._stream.open_read, request, dropped=lambda late: late.close())
        with closing(reader):
            message = await self._read_piece(reader)
            while message:
                following = await self._read_piece(reader)
                if not following and len(message) <= _LAST_MOST:
                    break
                await self._waiting.patiently(context.write(message))
                message = following
            return message or None

    async def _read_piece(self, reader: Reader) -> bytes:
        try:
            return reader.read(may_wait=False, head=_head_of_piece)
        except WouldWait:
            return await self._waiting.in_thread(lambda: reader.read(head=_head_of_piece))

    def _batch_update(self, raw: bytes, call: Call) -> Answer | Later | Coroutine[Any, Any, Answer]:
        request = reapi.BatchUpdateBlobsRequest.FromString(raw)
        if len(request.requests) > _ITEMS_MOST:
            return self._batch_update_in_parts(request, call)
        batch = self._cas.read_batch(request)
        if not batch.blobs:
            return batch.answer()

        def answer() -> None:
            try:
                call.answer(batch.answer())
            except StoreUnusable as error:
                call.fail(error)

        call.note_blobs(batch.digests)
        self._add(batch, list(batch.blobs), call, answer)
        return LATER

    async def _batch_update_in_parts(self, request: reapi.BatchUpdateBlobsRequest, call: Call) -> Answer:
        """The same for so many blobs that others would wait while they are taken apart, and handed on."""
        batch = await self._waiting.in_thread(self._cas.read_batch, request)
        call.note_blobs(batch.digests)
        stored = asyncio.Event()
        numbers = list(batch.blobs)
        for first in range(0, len(numbers), _ITEMS_MOST):
            self._add(batch, numbers[first : first + _ITEMS_MOST], call, stored.set)
            await asyncio.sleep(0)
        if batch.left:
            await stored.wait()
        return await self._waiting.in_thread(batch.answer)

    def _add(self, batch: Batch, numbers: Sequence[int], call: Call, answer: Callable[[], object]) -> None:
        """Have blobs of a batch stored; the last that is stored has the batch answered."""

        def settle(number: int, refused: Exception | None) -> None:
            if refused is None:
                self._cas.note(batch.blobs[number][0])
            if batch.settle(number, refused):
                answer()

        client = Client(call.authorization, call.connection)
        self._gate.add_all(client, ((*batch.blobs[number], partial(settle, number)) for number in numbers))

    def _query_write_status(self, raw: bytes, call: Call) -> Answer | Later | Coroutine[Any, Any, Answer]:
        stream = self._stream
        name = stream.parse(bytestream.QueryWriteStatusRequest.FromString(raw).resource_name)

        def settle(refused: Exception | None) -> None:
            call.answer(stream.status(name, is_here=refused is None).SerializeToString())

        async def later() -> Answer:
            is_here = await self._waiting.in_thread(stream.is_here, name)
            return stream.status(name, is_here=is_here).SerializeToString()

        if self._gate.join(Client(call.authorization, call.connection), name.digest, settle):
            call.note_blobs((name.digest,))
            return LATER
        try:
            return stream.status(name, is_here=stream.is_here(name, may_wait=False)).SerializeToString()
        except WouldWait:
            return later()

    def _write(self, messages: Messages, call: Call) -> Answer | Later | Coroutine[Any, Any, Answer]:
        raw = messages.take()
        if raw is None:
            raise InvalidArgument("a stream without a message")
        first = bytestream.WriteRequest.FromString(raw)
        name = self._stream.parse(first.resource_name)
        if self._stream.is_remembered(name):
            return self._stream.whole_answer(name).SerializeToString()
        small = SmallWrite.begin(name, first) if name.digest.size <= _GATHERED_MOST else None
        if small is None:
            return self._write_long(first, messages, call)
        if name.digest.size > _WHOLE_MOST:
            return self._gather_in_turn(small, messages, call)
        while not small.finished:
            raw = messages.take()
            if raw is None:
                return self._gather(small, messages, call)
            small.add(bytestream.WriteRequest.FromString(raw))
        self._add_whole(small, call)
        return LATER

    def _add_whole(self, small: SmallWrite, call: Call) -> None:
        stream, name = self._stream, small.name
        stream.forget(name)
        # Made now: of an upload that waits nothing is held but the blob's bytes.
        answer = small.answer().SerializeToString()

        def settle(refused: Exception | None) -> None:
            if refused is None:
                stream.note(name)
                call.answer(answer)
            else:
                call.fail(refused)

        call.note_blobs((name.digest,))
        self._gate.add(Client(call.authorization, call.connection), name.digest, small.plain(), settle)

    async def _gather_in_turn(self, small: SmallWrite, messages: Messages, call: Call) -> Answer:
        async with self._turn(call, small.size):
            await self._take_all(small, messages)
        if not small.finished:
            return await self._write_long(small.so_far(), messages, call)
        return await self._store(small, call)

    async def _gather(self, small: SmallWrite, messages: Messages, call: Call) -> Answer:
        """What of a small blob isn't here yet; one that isn't finished is parked as a long one is."""
        await self._take_all(small, messages)
        if not small.finished:
            return await self._write_long(small.so_far(), messages, call)
        return await self._store(small, call)

    async def _take_all(self, small: SmallWrite, messages: Messages) -> None:
        while not small.finished:
            try:
                raw = await self._waiting.patiently(anext(messages))
            except StopAsyncIteration:
                return
            small.add(bytestream.WriteRequest.FromString(raw))

    async def _store(self, small: SmallWrite, call: Call) -> Answer:
        self._stream.forget(small.name)
        done: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        client = Client(call.authorization, call.connection)
        self._gate.add(client, small.name.digest, small.plain(), partial(settle_future, done))
        with waiting_for(Reason.STORE, blobs=(small.name.digest,)):
            refused = await done
        if refused is not None:
            raise refused
        self._stream.note(small.name)
        return small.answer().SerializeToString()

    async def _write_long(self, first: bytestream.WriteRequest, messages: Messages, call: Call) -> Answer:
        async with self._turn(call, len(first.data)):
            # Closed also when the client has vanished, which cancels this.
            with closing(self._stream.begin_write()) as write:
                return (await self._take(first, messages, write)).SerializeToString()

    @asynccontextmanager
    async def _turn(self, call: Call, held: int) -> AsyncIterator[None]:
        """The turn of an upload, whose flow-control window is opened; `held`: bytes that are here already."""
        async with self._gate.turn(Client(call.authorization, call.connection), held):
            call.widen()
            yield

    async def _take(self, request: bytestream.WriteRequest, messages: Messages, write: WriteCall) -> Message:
        while True:
            try:
                answer = write.feed(request, may_wait=False)
            except WouldWait:
                answer = await self._waiting.in_thread(write.feed, request)
            if answer is not None:
                return answer
            try:
                raw = await self._waiting.patiently(anext(messages))
            except StopAsyncIteration:
                return write.end()
            request = bytestream.WriteRequest.FromString(raw)


def _guarded(endpoint: Endpoint, access: Access) -> Endpoint:
    """The same for those who have the right to it."""
    inner, check, right = endpoint.begin, access.check, right_for(endpoint.method)

    def begin(request: Any, context: Call) -> Answer | Later | Coroutine[Any, Any, Answer]:
        check(context.authorization, right)
        return inner(request, context)

    return endpoint._replace(begin=begin)


def _serialize(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


@lru_cache(1024)
def _head_of_piece(size: int) -> bytes:
    """What makes so many bytes a ReadResponse. Not by protobuf, which would copy them twice."""
    return b"\x52" + write_varint(size)
