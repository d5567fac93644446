"""A gRPC server on our own HTTP/2: sockets, TLS, silent peers, and its life from listening to drained."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator, Set
from typing import cast

from store.digest import Digest
from store.errors import StoreUnusable
from tools.http2.frames import ErrorCode
from tools.server.address import ACCEPTED_MOST, Address, keep_waiting, listen
from tools.server.calls import Endpoint
from tools.server.calls_under_way import CallUnderWay
from tools.server.http2_calls import ConnectionCalls
from tools.server.http2_heads import Routes
from tools.server.limits import GrpcLimits
from tools.server.load import Load
from tools.server.tls import Certificates
from tools.server.turns import Turns

_HIGH_WATER = 1 << 20
"""Bytes that wait for a socket, before calls wait to write."""
_READ_MOST = 64 << 10
_READ_LEAST = 8 << 10
"""Bytes that are read of a connection at a time: fewer where there is too much to do already, as they have to wait."""
_LIGHT_CALLS = 4
_LIGHT_BYTES = 4 << 10
"""With more of them a connection isn't that of a calm client."""
_PING_SECONDS = 60.0
_PING_GRACE = 20.0
_FAREWELL_SECONDS = 1.0
"""Between asking for no more streams and refusing them: those on their way then still come."""


_buffer = memoryview(bytearray(_READ_MOST))


class Http2Server:
    """One server, in the running loop."""

    def __init__(self, endpoints: Iterable[Endpoint], limits: GrpcLimits, load: Load | None = None) -> None:
        self._routes = Routes(endpoints, limits)
        self._limits = limits
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()
        self._load = load or Load()

    async def start(self, address: Address, certificates: Certificates | None) -> int:
        """Take calls there, with TLS if there are `certificates`; returns the port. Raises StoreUnusable."""
        context = None if certificates is None else certificates.context(http2=True)
        try:
            listening = listen(address)
        except OSError as error:
            raise StoreUnusable(f"can't listen at {address}: {error.strerror}") from error
        loop = asyncio.get_running_loop()
        turns = Turns(loop.time, loop.call_soon)
        try:
            self._server = await loop.create_server(
                lambda: _Connection(self._routes, self._connections, self._note_lost, turns, self._load),
                sock=listening,
                ssl=context,
                backlog=ACCEPTED_MOST,
                ssl_handshake_timeout=None if context is None else self._limits.idle_seconds,
            )
        except BaseException:
            listening.close()
            raise
        keep_waiting(listening)
        self._sweeping = asyncio.create_task(self._sweep())
        return int(listening.getsockname()[1])

    async def drain(self, seconds: float) -> None:
        """Take no more calls, let those that are on end within so many seconds, then break them off."""
        if self._server is not None:
            self._server.close()
        deadline = asyncio.get_running_loop().time() + seconds
        for connection in list(self._connections):
            connection.say_goodbye(refuse=False)
        await self._wait_until(min(deadline, asyncio.get_running_loop().time() + _FAREWELL_SECONDS))
        for connection in list(self._connections):
            connection.say_goodbye(refuse=True)
        await self._wait_until(deadline)
        for connection in list(self._connections):
            await connection.abort()
        if self._sweeping is not None:
            self._sweeping.cancel()

    async def _wait_until(self, deadline: float) -> None:
        """For connections that have nothing under way to be gone."""
        loop = asyncio.get_running_loop()
        while self._connections and loop.time() < deadline:
            self._emptied.clear()
            for connection in list(self._connections):
                connection.close_if_idle()
            try:
                async with asyncio.timeout_at(min(deadline, loop.time() + 0.01)):
                    await self._emptied.wait()
            except TimeoutError:
                continue

    def oldest(self) -> float | None:
        """Since when, by the loop's clock, the oldest of the calls waits that can be begun."""
        times = (connection.oldest for connection in self._connections)
        return min((time for time in times if time is not None), default=None)

    def under_way(self, waiting: Set[Digest]) -> Iterator[CallUnderWay]:
        """All calls; `waiting`: blobs for which the store's threads have no room."""
        for connection in self._connections:
            yield from connection.under_way(waiting)

    def _note_lost(self) -> None:
        if not self._connections:
            self._emptied.set()

    async def _sweep(self) -> None:
        """Look after those who say nothing."""
        seconds = min(self._limits.idle_seconds / 4, _PING_GRACE / 4)
        while True:
            await asyncio.sleep(seconds)
            for connection in list(self._connections):
                connection.look_after()


class _Connection(asyncio.BufferedProtocol):
    """One connection's socket."""

    def __init__(
        self,
        routes: Routes,
        connections: set[_Connection],
        lost: Callable[[], object],
        turns: Turns,
        load: Load,
    ) -> None:
        self.used = -1.0
        self.queued = False
        self._turns = turns
        self._load = load
        self._reading = True
        self._unparsed = 0
        """Bytes that `Load` knows of."""
        self._routes = routes
        self._all = connections
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._paused_since = 0.0
        self._pinged = 0.0
        self._scheduled = False
        self._pings_answered = 0

    # For the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER)
        connected = transport.get_extra_info("socket")
        if connected is not None and connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = transport.get_extra_info("peername")
        self._calls = ConnectionCalls(
            self._routes, str(peer[0]) if peer else "", self._send, self._send_soon, self._ready, self._load
        )
        self._connection = self._calls.connection
        self._all.add(self)
        self._send()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the loop reads to; what comes is copied from there before anything else is read."""
        return _buffer if not self._load.is_much else _buffer[:_READ_LEAST]

    def buffer_updated(self, nbytes: int) -> None:
        """Have what came worked on when it is this connection's turn."""
        self._heard = self._loop.time()
        self._connection.feed(bytes(_buffer[:nbytes]))
        self._turns.add(self)
        self._read_or_not()

    def _ready(self) -> None:
        # Not at once: whoever says so may be at work for another connection.
        self._loop.call_soon(self._turns.add, self)

    def work(self, seconds: float) -> bool:
        """Work on what came, for about so long, and send at once what that gave; whether there is more to do."""
        self._scheduled = True
        more = self._calls.work(seconds)
        self._send()
        self._read_or_not()
        return more

    @property
    def is_light(self) -> bool:
        """It has few calls under way, and not because it was asked to; nor does it bring many, or is new."""
        connection = self._connection
        return (
            connection.begun
            and len(connection.streams) <= _LIGHT_CALLS
            and connection.unparsed <= _LIGHT_BYTES
            and not self._calls.restrained
        )

    def _read_or_not(self) -> None:
        unparsed = 0 if self._connection.closed else self._connection.unparsed
        self._load.unparsed += unparsed - self._unparsed
        self._unparsed = unparsed
        most = _READ_LEAST if self._load.is_much else _READ_MOST
        connection = self._connection
        reading = self._calls.paused is None and (connection.unparsed < most or connection.hungry)
        if reading != self._reading and not self._transport.is_closing():
            self._reading = reading
            if reading:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        """The client says no more. Nor does it listen: no HTTP/2 client does only one of them."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """It is over."""
        self._calls.end()
        self._read_or_not()
        if self._calls.paused is not None:
            self._calls.paused.set()
        self._all.discard(self)
        self._lost()

    def pause_writing(self) -> None:
        """Who doesn't read isn't read: what it asked for would pile up here."""
        self._paused_since = self._loop.time()
        self._calls.paused = asyncio.Event()
        self._read_or_not()

    def resume_writing(self) -> None:
        """Go on."""
        if self._calls.paused is not None:
            self._calls.paused.set()
            self._calls.paused = None
        self._read_or_not()
        self._turns.add(self)

    # For the server.

    @property
    def oldest(self) -> float | None:
        """Since when the oldest of its calls waits that can be begun."""
        return self._calls.oldest

    def under_way(self, waiting: Set[Digest]) -> Iterator[CallUnderWay]:
        """Its calls."""
        return self._calls.under_way(waiting)

    def say_goodbye(self, *, refuse: bool) -> None:
        """Ask for no more calls, and to be told when that was heard."""
        self._pings_answered = self._connection.pings_answered
        self._connection.say_goodbye(refuse=refuse)
        self._connection.ping()

    def close_if_idle(self) -> None:
        """When nothing is under way, and nothing can be on its way here."""
        heard = self._connection.refusing or self._connection.pings_answered > self._pings_answered
        if heard and self._calls.idle:
            self._send()
            self._transport.close()

    async def abort(self) -> None:
        """Break off what is under way."""
        self._connection.fail(ErrorCode.NO_ERROR, "this server ends")
        self._send()
        await self._calls.cancel()
        self._transport.abort()

    def look_after(self) -> None:
        """End what makes no progress, and ask for a sign of life."""
        now = self._loop.time()
        idle = self._routes.limits.idle_seconds
        self._connection.calm_down()
        self._calls.drop_silent()
        self._load.ease(self._calls.number)
        if self._calls.paused is not None:
            if now - self._paused_since > idle:
                self._transport.abort()
        elif self._calls.left:
            # Whatever it says isn't heard, a sign of life neither.
            self._heard = now
        elif not self._connection.begun:
            if now - self._heard > idle:
                self._transport.abort()
        elif self._pinged > self._heard:
            if now - self._pinged > _PING_GRACE:
                self._transport.abort()
        elif now - self._heard > _PING_SECONDS:
            self._pinged = now
            self._connection.ping()

    # How.

    def _send_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._scheduled = False
        output = self._connection.out.take()
        if output and not self._transport.is_closing():
            if len(output) == 1:
                self._transport.write(output[0])
            else:
                self._transport.writelines(output)
        if self._connection.closed:
            self._transport.close()
