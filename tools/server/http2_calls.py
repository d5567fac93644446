"""gRPC on HTTP/2: endpoints answering the streams of a connection, whose bytes somebody else moves.

Messages have five bytes before them. All that has come of a connection is parsed
before any of its calls is begun, so that a call that was given up meanwhile
costs nothing; a call is begun when its only message, or the first of many, is
whole. What an endpoint answers at once, or says that it will answer later, costs
no task and goes out with its status in one piece.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Set
from functools import partial
from itertools import count
from typing import Any, cast

from store.digest import Digest
from tools.http2.connection import Connection
from tools.http2.frames import ErrorCode
from tools.http2.hpack import Header
from tools.http2.stream import Stream
from tools.reapi.generated import code_pb2 as codes
from tools.reapi.generated.status_pb2 import Status
from tools.server.calls import LATER, Answer, Endpoint
from tools.server.calls_under_way import CallUnderWay
from tools.server.errors import InvalidArgument, TooSlow
from tools.server.http2_call import PREFIX, GrpcCall
from tools.server.http2_heads import HEADERS, OK, Head, Routes, read_timeout, trailers_of
from tools.server.load import FEW_STREAMS, Load
from tools.server.status import as_status
from tools.server.waits import Reason, find_mark, find_place

_BEFORE_MOST = 128
"""Calls that may wait of a connection which is read, though there is no room, for what others of its calls wait for."""
_PARSE_BYTES = 4 << 10
"""That are parsed between two looks at the clock."""
_numbers = count(1)


class ConnectionCalls:
    """The calls of one connection.

    `send` moves its output; `send_soon` has that done a little later; `ready` has `work` called when it is its turn.
    """

    def __init__(
        self,
        routes: Routes,
        client: str,
        send: Callable[[], object],
        send_soon: Callable[[], object],
        ready: Callable[[], object],
        load: Load,
    ) -> None:
        self.routes = routes
        self.client = client
        self.send = send
        self.ready_again = ready
        self.number = next(_numbers)
        """What tells connections apart, as long as the process lives."""
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time()
        """When it last had its turn."""
        self.paused: asyncio.Event | None = None
        """The socket takes no more; set when it does again."""
        self.left = False
        """There is no room for what it brings: nothing more of it is looked at, nor read."""
        self.restrained = False
        """Its client was asked to have few calls under way: it would have more."""
        self._awaited = 0
        """Calls that wait for what their client sends or takes."""
        self.connection = Connection(self, routes.limits.streams, routes.limits.header_bytes, send_soon)
        self._load = load
        self._whole: deque[GrpcCall] = deque()
        """Calls that can be begun."""
        self._tasks: set[asyncio.Task[None]] = set()

    def work(self, seconds: float) -> bool:
        """Parse what has come, then begin calls, for about so long; whether there is more to do now."""
        clock = self.loop.time
        self.now = now = clock()
        end = now + seconds
        connection, whole = self.connection, self._whole
        parsing = connection.unparsed > 0
        while True:
            if parsing:
                full = self._load.leave(self.number, self.ready_again)
                if full:
                    self._restrain()
                # What is begun is finished, though what it waits for may lie behind more calls.
                self.left = full and not (self._awaits_client and self._load.own(self.number) < _BEFORE_MOST)
                parsing = not self.left and connection.parse(_PARSE_BYTES)
            elif whole and self.paused is None:
                self._begin(whole.popleft())
            else:
                return False
            if clock() >= end:
                return parsing or (bool(whole) and self.paused is None)

    def _restrain(self) -> None:
        if self._load.restrain(self.number, self._relax):
            self.restrained = True
            self.connection.ask_for_streams(len(self._tasks) + FEW_STREAMS)

    def _relax(self) -> None:
        self.restrained = False
        self.connection.ask_for_streams(self.routes.limits.streams)

    @property
    def _awaits_client(self) -> bool:
        return self._awaited > 0 or self.connection.out.is_blocked

    def ask_for(self, call: GrpcCall, size: int) -> None:
        """Have a call's client asked for more of a large message, when there is room for it."""
        self._load.ask_for(call, size, partial(call.advance, size), at_once=call.started)

    def have_come(self, call: GrpcCall, size: int) -> None:
        """So many bytes of that have come, or won't; it asks for no more."""
        if call.is_asking:
            self._load.ask_no_more(call)
        if size:
            self._load.have_come(size)

    def await_client(self, change: int) -> None:
        """One more call (1), or one fewer (-1), waits for what its client sends or takes."""
        self._awaited += change
        if change > 0 and self.left:
            self.ready_again()

    def end(self) -> None:
        """The connection is over: what waits to be begun isn't, but what is whole of an upload."""
        self.connection.end()
        self._load.forget(self.number)
        for call in self._whole:
            self._begin(call)
        self._whole.clear()

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return not self.connection.streams and not self._tasks and not self._whole

    @property
    def oldest(self) -> float | None:
        """Since when the first of the calls that can be begun waits, unless for the client to read its answers."""
        return self._whole[0].moved if self._whole and self.paused is None else None

    def under_way(self, waiting: Set[Digest]) -> Iterator[CallUnderWay]:
        """The calls, and what each waits for; `waiting`: blobs for which the store's threads have no room."""
        whole = set(map(id, self._whole))
        for stream in self.connection.streams.values():
            call = cast("GrpcCall", stream)
            endpoint = call.head.endpoint
            method = "unknown" if endpoint is None else endpoint.method.name
            reason, moved = self._find_reason(call, whole, waiting)
            yield CallUnderWay(
                (self.number, call.id), method, self.client, self.number, call.since, max(moved, call.moved), reason
            )

    def _find_reason(self, call: GrpcCall, whole: Set[int], waiting: Set[Digest]) -> tuple[Reason, float]:
        """What it waits for, and since when if that is known."""
        if call.trailers is not None:
            return Reason.CLIENT, call.heard
        if call.is_asking:
            return Reason.TURN, call.heard
        if not call.started:
            # What the client sent may be here, or in the socket, where the connection is not read on.
            unparsed = self.connection.unparsed and not self.connection.hungry
            return Reason.LOOP if unparsed else Reason.MESSAGE, call.heard
        if id(call) in whole:
            return Reason.LOOP if self.paused is None else Reason.CLIENT, 0.0
        mark = find_mark(call.task) if call.task is not None else None
        since = 0.0 if mark is None else mark.since
        if call.waits:
            return Reason.CLIENT if call.pending else Reason.MESSAGE, since
        if mark is not None:
            return mark.find_reason(waiting), since
        return find_place(call.blobs, waiting) if call.blobs else Reason.EVENT, 0.0

    async def cancel(self) -> None:
        """End what is under way, and wait for that."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def drop_silent(self) -> None:
        """End the calls whose client sends no more of its only message, or takes no more of the end of its answer."""
        now, most = self.loop.time(), self.routes.limits.idle_seconds
        for stream in list(self.connection.streams.values()):
            call = cast("GrpcCall", stream)
            if call.trailers is not None and call.waiting != call.left:
                call.left, call.heard = call.waiting, now
            if (self.left or call.is_asking) and call.heard:
                # What it waits for may have come, or its client doesn't send it as it may not.
                call.heard = now
            if not call.heard or now - call.heard < most:
                continue
            if call.trailers is None:
                self.fail(call, TooSlow(f"no progress in {most:g} s"))
            else:
                # A status would come behind what isn't taken.
                self.connection.reset(call, ErrorCode.CANCEL)

    # As the connection's handler.

    def interpret(self, headers: list[Header]) -> tuple[Head, int]:
        """What a request's headers say. Raises Malformed."""
        return self.routes.interpret(headers)

    def vary(self, known: tuple[Head, int], header: Header) -> tuple[Head, int] | None:
        """The same, but for one header."""
        return self.routes.vary(known, header)

    def make(self, stream_id: int, head: Head, window: int, expected: int) -> Stream:
        """A stream with what a call needs."""
        return GrpcCall(stream_id, head, window, expected, self)

    def begin(self, call: GrpcCall, ended: bool) -> None:
        """Answer it, or wait for its message."""
        endpoint = call.head.endpoint
        if endpoint is None:
            self.connection.out.send_trailers(call, call.head.refusal)
        elif not ended:
            call.heard = self.loop.time()
        elif endpoint.method.streams_in:
            self.data(call, b"", True)
        else:
            self.fail(call, InvalidArgument("there is no message in the request"))

    def data(self, call: GrpcCall, data: bytes, ended: bool) -> None:
        """Have it waited for, or answered."""
        endpoint = call.head.endpoint
        if endpoint is None:
            return
        if call.started:
            call.add(data, ended)
            call.wake()
            return
        try:
            if endpoint.method.streams_in:
                call.add(data, ended)
                whole = call.look() > 0 or ended
            else:
                call.message = call.take_only(data, ended)
                whole = call.message is not None
        except Exception as error:  # noqa: BLE001 - told to the client
            self.fail(call, error)
            return
        if not whole:
            call.heard = self.loop.time()
            return
        call.heard = 0.0
        call.moved = self.now
        call.started = True
        call.held = call.size if call.message is None else len(call.message)
        self._load.hold(self.number, call.held)
        self._whole.append(call)

    def broken(self, call: GrpcCall) -> None:
        """Nobody waits for the answer."""
        call.have_come()
        if call.task is not None:
            call.task.cancel()

    def drained(self, call: GrpcCall) -> None:
        """It may write on."""
        call.wake()

    # How.

    def _begin(self, call: GrpcCall) -> None:
        self._load.release(self.number, call.held)
        call.moved = self.now
        endpoint = cast("Endpoint", call.head.endpoint)
        message, call.message = call.message, None
        if self.connection.streams.get(call.id) is not call and not (endpoint.keeps and call.held):
            # Given up before it was begun.
            return
        try:
            answer = endpoint.begin(call if message is None else message, call)
        except Exception as error:  # noqa: BLE001 - told to the client
            self.fail(call, error)
            return
        if answer is LATER:
            return
        if answer is None or isinstance(answer, bytes):
            self.answer(call, answer)
            return
        coming = answer
        if self.connection.streams.get(call.id) is not call:
            coming.close()
            return
        call.task = task = self.loop.create_task(self._finish(call, coming))
        self._tasks.add(task)
        task.add_done_callback(partial(self._forget, call, coming))
        seconds = read_timeout(call.head.timeout)
        if seconds is not None:
            call.deadline = self.loop.call_later(seconds, self._expire, call)

    def _forget(self, call: GrpcCall, coming: Coroutine[Any, Any, Answer], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # Where it was cancelled, it refers to all that it was at then.
        call.task = None
        # A task that is cancelled before its first step never comes to what it would have awaited, nor to its end.
        coming.close()
        if call.deadline is not None:
            call.deadline.cancel()

    async def _finish(self, call: GrpcCall, coming: Coroutine[Any, Any, Answer]) -> None:
        try:
            answer = await coming
        except Exception as error:  # noqa: BLE001 - told to the client
            self.fail(call, error)
        else:
            self.answer(call, answer)

    def _expire(self, call: GrpcCall) -> None:
        """The time is over that the client gave it."""
        if call.task is not None:
            call.task.cancel()
        self._end(call, trailers_of(Status(code=codes.DEADLINE_EXCEEDED, message="the call's own deadline")))

    def answer(self, call: GrpcCall, answer: Answer) -> bool:
        """Send it, where somebody waits for it; whether somebody does."""
        connection = self.connection
        if connection.streams.get(call.id) is not call:
            return False
        if answer is None:
            return self._end(call, OK)
        call.have_come()
        if call.answering:
            connection.out.send_data(call, PREFIX.pack(0, len(answer)), answer)
            connection.out.send_trailers(call, OK)
        else:
            connection.out.answer(call, HEADERS, PREFIX.pack(0, len(answer)) + answer, OK)
        if self.left and connection.out.is_blocked:
            self.ready_again()
        return True

    def fail(self, call: GrpcCall, error: Exception) -> bool:
        """Say what went wrong, where somebody waits for it; whether somebody does."""
        return self._end(call, trailers_of(as_status(error)))

    def _end(self, call: GrpcCall, trailers: bytes) -> bool:
        call.heard = 0.0
        call.have_come()
        if self.connection.streams.get(call.id) is not call or call.trailers is not None:
            return False
        self.connection.out.send_trailers(call, trailers if call.answering else HEADERS + trailers)
        return True
