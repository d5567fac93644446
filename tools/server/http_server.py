"""An HTTP server around the adapter: limits of connections, listening, TLS, draining."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from store.digest import Digest
from store.errors import BadInput
from tools.server.address import ACCEPTED_MOST, Address, keep_waiting, listen
from tools.server.calls_under_way import CallUnderWay
from tools.server.http_adapter import HttpAdapter
from tools.server.http_cache import SMALL
from tools.server.http_names import parse_cache_path
from tools.server.http_short import WholePut, count_left, parse_whole_put, stored_answer
from tools.server.recent import SAMPLE_SECONDS, Recent
from tools.server.status import faults
from tools.server.waits import Reason, find_mark, find_place


def _fold(record: logging.LogRecord) -> bool:
    """Whether aiohttp shall log it. Errors are counted instead: logged each time, they could fill a disk."""
    error = record.exc_info[1] if record.exc_info else None
    # What a client does wrong is told to the client alone.
    if error is not None and not isinstance(error, HttpProcessingError):
        faults.note(error, "%s", record.getMessage())
    return error is None


_log = logging.getLogger("casfs.http")
_log.addFilter(_fold)
_numbers = count(1)
"""What tells connections apart, and requests."""
_READ_BYTES = 64 << 10
_LINGER_SECONDS = 2.0
"""How long a body is read on that was refused, so that its client gets to see why."""
_BREAK_SECONDS = 0.2
"""What a request that is broken off has to notice it."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client can take: bytes of one header field and of the request line, fields, seconds of silence.

    `kept_seconds`: of silence between two requests. Who closes a connection may do so just as the other side sends its
    next request, which is lost then: Bazel doesn't repeat it, and the action whose result it was storing runs again in
    the next build. Clients close what they don't need, Bazel when a build ends: this is for what they forget.
    """

    header_bytes: int = 16 << 10
    fields: int = 64
    idle_seconds: float = 60.0
    kept_seconds: float = 3600.0

    def options(self) -> dict[str, Any]:
        """As aiohttp takes them."""
        return {
            "max_line_size": self.header_bytes,
            "max_field_size": self.header_bytes,
            "max_headers": self.fields,
            "keepalive_timeout": self.kept_seconds,
            "lingering_time": _LINGER_SECONDS,
            "read_bufsize": _READ_BYTES,
            # Ours knows how much may come.
            "auto_decompress": False,
            "access_log": None,
            "logger": _log,
        }


class _Connection(RequestHandler):
    """One that ends if a head doesn't come: the first, or one that has begun. aiohttp itself only minds silence."""

    __slots__ = ("_behind", "_head", "_is_short", "_left", "_short", "number", "patience")

    def __init__(self, manager: web.Server, patience: float, short: _ShortRequests, **options: Any) -> None:
        super().__init__(manager, **options)
        self._short = short
        self._is_short = False
        """A request goes the short way, and isn't answered yet."""
        self._behind: list[bytes] = []
        """What came after it."""
        self._left: int | None = 0
        """Bytes that the request which aiohttp has is still to bring; None: that isn't known any more."""
        self.number = next(_numbers)
        self.patience = patience
        self._head: asyncio.TimerHandle | None = None
        """Ends the connection; set while a head is waited for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have the kernel end it, too, when the other side takes nothing more, or is no longer there."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None:
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.patience * 1000))
                # aiohttp has it asked whether it is there, but only after two hours.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(self.patience)))
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take what has come: the body of a request, or a head."""
        if not data:
            # aiohttp's own way to have the rest of what came parsed, after it has paused.
            super().data_received(data)
            return
        # aiohttp's own sign that it waits for a head: what comes otherwise may be the rest of a body that was refused.
        waiter = self._waiter
        if self._is_short:
            # A client that doesn't wait for its answer: no more is read than is here.
            self._behind.append(data)
            if self.transport is not None:
                self.transport.pause_reading()
            return
        # One whose client doesn't take its answers has to wait until it does, as the ordinary way can.
        if waiter is not None and not waiter.done() and self._left == 0 and not self._paused:
            request = parse_whole_put(data, SMALL)
            if request is not None and self._take_short(request):
                return
        self._take_ordinary(data)
        # Most heads come whole, and need no timer.
        if self._head is None and waiter is not None and not waiter.done() and data.strip(b"\r\n"):
            self._await_head()

    def _take_short(self, request: WholePut) -> bool:
        if not self._short.begin(self, request, partial(self._end_short, request)):
            return False
        self._is_short = True
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        self.have_head()
        return True

    def _end_short(self, request: WholePut, stored: bool) -> None:
        """It is stored, or it isn't: then the ordinary way finds out why, and says so."""
        self._is_short = False
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        behind, self._behind = b"".join(self._behind), []
        if behind:
            transport.resume_reading()
        if not stored:
            self._take_ordinary(request.head + request.body)
        elif self._short.draining:
            transport.write(stored_answer(last=True))
            self.force_close()
            return
        else:
            transport.write(stored_answer(last=False))
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if behind:
            self.data_received(behind)

    def _take_ordinary(self, data: bytes) -> None:
        self._left = count_left(self._left, data)
        super().data_received(data)

    def _await_head(self) -> None:
        self._head = asyncio.get_running_loop().call_later(self.patience, self.force_close)

    def have_head(self) -> None:
        """A request has come."""
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wait for nothing more."""
        self.have_head()
        super().connection_lost(exc)


class _ShortRequests:
    """Those that go the short way. `draining`: an answer is the last of its connection."""

    def __init__(self, adapter: HttpAdapter, all_ended: Callable[[], object]) -> None:
        self.draining = False
        self.under_way: dict[_Connection, tuple[float, Digest]] = {}
        """Since when each waits, by the loop's clock, and for which blob."""
        self._adapter = adapter
        self._all_ended = all_ended
        self._clock = asyncio.get_running_loop().time

    def begin(self, connection: _Connection, request: WholePut, done: Callable[[bool], object]) -> bool:
        """Whether it goes the short way; `done` is called later, with whether the blob is stored."""

        def end(stored: bool) -> None:
            del self.under_way[connection]
            done(stored)
            # One that isn't stored is the ordinary way's now, which says when it has ended.
            if stored and not self.under_way:
                self._all_ended()

        digest = self._adapter.put_whole(request, id(connection.transport), end)
        if digest is None:
            return False
        self.under_way[connection] = self._clock(), digest
        return True


class _Server(web.Server):
    """One whose connections are ours."""

    def __init__(self, handler: _Handler, limits: HttpLimits, short: _ShortRequests) -> None:
        super().__init__(handler)
        self._limits = limits
        self._short = short

    def __call__(self) -> RequestHandler:
        loop = asyncio.get_running_loop()
        return _Connection(self, self._limits.idle_seconds, self._short, loop=loop, **self._limits.options())


class _Request(NamedTuple):
    """One that is under way, the task that answers it, when it began."""

    request: web.BaseRequest
    task: asyncio.Task[Any] | None
    since: float


def _kind(request: web.BaseRequest) -> str:
    """What it is about, in a word."""
    try:
        name = parse_cache_path(request.raw_path.partition("?")[0])
    except BadInput:
        return "other"
    return "page" if name is None else name.kind.value


_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class HttpServer:
    """One server, in the running loop."""

    def __init__(self, adapter: HttpAdapter, limits: HttpLimits, recent: Recent) -> None:
        self._adapter = adapter
        self._recent = recent
        self._short = _ShortRequests(adapter, self._note_ended)
        self._runner = web.ServerRunner(_Server(self._handle, limits, self._short), shutdown_timeout=_LINGER_SECONDS)
        self._sampling: asyncio.Task[None] | None = None
        self._requests: dict[int, _Request] = {}
        self._idle = asyncio.Event()
        self._draining = False

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        now = asyncio.get_running_loop().time()
        number = next(_numbers)
        self._requests[number] = _Request(request, asyncio.current_task(), now)
        self._idle.clear()
        try:
            cast("_Connection", request.protocol).have_head()
            response = await self._adapter.handle(request)
        finally:
            del self._requests[number]
            self._note_ended()
        if self._draining:
            response.force_close()
        return response

    def _note_ended(self) -> None:
        if not self._requests and not self._short.under_way:
            self._idle.set()

    def under_way(self, waiting: Set[Digest]) -> Iterator[CallUnderWay]:
        """All requests; `waiting`: blobs for which the store's threads have no room."""
        for number, (request, task, since) in self._requests.items():
            mark = find_mark(task)
            reason = Reason.EVENT if mark is None else mark.find_reason(waiting)
            if reason is Reason.CLIENT and request.method == "PUT":
                reason = Reason.MESSAGE
            connection = cast("_Connection", request.protocol).number
            method = f"HTTP {request.method[:20]} {_kind(request)}"
            moved = since if mark is None else mark.since
            yield CallUnderWay(("http", number), method, request.remote or "", connection, since, moved, reason)
        for short, (since, digest) in self._short.under_way.items():
            reason = find_place((digest,), waiting)
            client = str(short.peername[0]) if short.peername else ""
            yield CallUnderWay(("http", short.number), "HTTP PUT cas", client, short.number, since, since, reason)

    async def start(self, address: Address, tls: ssl.SSLContext | None) -> None:
        """Answer requests there from now on. Raises OSError."""
        await self._runner.setup()
        listening = listen(address)
        await web.SockSite(self._runner, listening, ssl_context=tls, backlog=ACCEPTED_MOST).start()
        keep_waiting(listening)
        self._sampling = asyncio.create_task(self._sample())

    async def _sample(self) -> None:
        while True:
            self._recent.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def drain(self, seconds: float, reason: str) -> None:
        """Take no more requests, let those that are on end within so many seconds, then break them off.

        `reason`: why, for those that check whether the server lives.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        if self._sampling is not None:
            self._sampling.cancel()
        self._draining = self._short.draining = True
        self._adapter.ending = reason
        for site in self._runner.sites:
            await site.stop()
        # Not left to the runner: from the moment on that it is told to end, aiohttp takes no more of any body.
        if self._requests or self._short.under_way:
            self._idle.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._idle.wait()
        # Nor is this: it would give another while to what had its time.
        if self._runner.server is not None:
            self._runner.server.pre_shutdown()
            await self._runner.server.shutdown(max(_BREAK_SECONDS, min(_LINGER_SECONDS, until - loop.time())))
        await self._runner.cleanup()
        self._adapter.close()
