"""The server's own parts put together in virtual time, each with a price: so it can do so much, and no more.

Connections, turns, load, gate, calls and services are the real ones, and so is the
store; what is modelled is what they cost. The loop pays for frames, for calls
that are begun and for blobs that are settled; the store's threads take
`sync` + n * `blob` seconds for a group, all others the loop's `thread_seconds`.
Bounds are smaller than the real ones as the calls are dearer, so what they hold
lasts about as long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from store.digest import Digest
from store.errors import StoreError
from store.repository import Store
from tests.tools.server.overload.peer import Peer
from tests.tools.server.overload.pipe import Pipe
from tests.tools.server.overload.virtual_time import VirtualLoop, VirtualThreads
from tools.reapi import methods
from tools.server.access import Anybody
from tools.server.calls import Calls, Endpoint
from tools.server.gate import Gate
from tools.server.http2_server import Http2Server, _Connection
from tools.server.limits import GrpcLimits
from tools.server.load import Load
from tools.server.services import Services
from tools.server.storing import Blob, SettleGroup, Storing
from tools.server.turns import Turns


@dataclass(frozen=True)
class Costs:
    """Virtual seconds: about 250 times what was measured, so that a second has some dozens of calls.

    `begin`: of a call, but for `write`: of an upload that finds its blob there, to which `take` comes where it doesn't.
    """

    frame: float = 0.0005
    begin: float = 0.010
    write: float = 0.003
    take: float = 0.010
    settle: float = 0.0015
    sync: float = 0.050
    blob: float = 0.005


@dataclass(frozen=True)
class Bounds:
    """Of what waits: in the load, at the store, in one group of it."""

    calls: int = 240
    bytes: int = 2 << 20
    storing: int = 64
    group: int = 16
    uploads: int = 8


COSTS = Costs()
BOUNDS = Bounds()


@dataclass
class Peak:
    """The most that there was at a time."""

    calls: int = 0
    bytes: int = 0
    unparsed: int = 0
    held: int = 0
    """Bytes of requests that streams hold."""


class PacedStoring(Storing):
    """Groups are those of the real one, and stored for real, but in the loop and in virtual time; two at a time."""

    def __init__(self, server: PacedServer, store: Any, settle: SettleGroup) -> None:
        super().__init__(store, settle)
        self._server = server
        self._free = 2

    def add(self, blobs: Sequence[Blob]) -> None:
        self._server.loop.charge(len(blobs) * self._server.costs.take)
        super().add(blobs)

    def _see_taken(self) -> None:
        self._server.loop.call_soon(self._begin)

    def _begin(self) -> None:
        while self._waiting and self._free:
            self._free -= 1
            group = self._take()
            costs = self._server.costs
            self._server.loop.call_later(costs.sync + len(group) * costs.blob, self._stored, group)

    def _stored(self, group: Sequence[Blob]) -> None:
        self._free += 1
        results: Sequence[Exception | None] | Exception
        try:
            results = self._store(group)
        except StoreError as error:
            results = error
        else:
            self._server.note_stored(
                [digest for (digest, _), refused in zip(group, results, strict=True) if not refused]
            )
        self._settle(group, results)
        self._begin()

    def _settle(self, group: Sequence[Blob], results: Sequence[Exception | None] | Exception) -> None:
        self._server.loop.charge(len(group) * self._server.costs.settle)
        super()._settle(group, results)

    def close(self) -> None:
        assert not self._waiting


class _PacedConnection(_Connection):
    """Pays for frames."""

    server: PacedServer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        for name in ("_take_data", "_take_headers", "_take_other"):
            setattr(self._connection, name, self.server.priced(getattr(self._connection, name)))


@dataclass
class PacedServer:
    """In the running loop."""

    loop: VirtualLoop
    services: Services
    costs: Costs
    bounds: Bounds
    stored: dict[Digest, float] = field(default_factory=dict)
    """When each blob became durable for the first time."""
    peak: Peak = field(default_factory=Peak)
    begun: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.load = Load(self.bounds.calls, self.bounds.bytes)
        self.refuse: Callable[[], StoreError | None] = lambda: None
        """Why the next group can't be stored."""
        self.gate = Gate(self._store, self.load, self.bounds.uploads)
        self.storing = PacedStoring(self, self._store, self.gate._settle)
        self.gate._storing = self.storing
        limits = GrpcLimits(uploads=self.bounds.uploads)
        self.calls = Calls(self.services, Anybody(), limits.idle_seconds, self.gate)
        self.http2 = Http2Server(map(self._price, self.calls.endpoints), limits, self.load)
        self.turns = Turns(self.loop.time, self.loop.call_soon)

    def connect(self, peer: Peer) -> Peer:
        """Have a client's end joined to this."""
        server = self.http2
        connection = _PacedConnection(server._routes, server._connections, server._note_lost, self.turns, self.load)
        connection.server = self
        peer.join(Pipe(self.loop, connection, peer))
        return peer

    @property
    def connections(self) -> set[_Connection]:
        """Those there are."""
        return self.http2._connections

    def _store(self, blobs: Sequence[tuple[Digest, bytes]]) -> Sequence[StoreError | None]:
        refused = self.refuse()
        if refused is not None:
            raise refused
        return self.services.uploads.add_all(blobs)

    def note_stored(self, digests: Sequence[Digest]) -> None:
        """They are durable now."""
        for digest in digests:
            self.stored.setdefault(digest, self.loop.time())

    def priced(self, take: Callable[..., None]) -> Callable[..., None]:
        """The same for a frame's price."""

        def taking(*arguments: Any) -> None:
            self.loop.charge(self.costs.frame)
            take(*arguments)

        return taking

    def _price(self, endpoint: Endpoint) -> Endpoint:
        name, inner = endpoint.method.name, endpoint.begin
        cost = self.costs.write if endpoint.method is methods.WRITE else self.costs.begin

        def begin(request: Any, call: Any) -> Any:
            self.begun[name] = self.begun.get(name, 0) + 1
            self.loop.charge(cost)
            return inner(request, call)

        return endpoint._replace(begin=begin)

    async def watch(self) -> None:
        """Note the most of everything, ten times a second."""
        peak, load = self.peak, self.load
        while True:
            peak.calls = max(peak.calls, load.calls)
            peak.bytes = max(peak.bytes, load.bytes)
            peak.unparsed = max(peak.unparsed, sum(one._connection.unparsed for one in self.connections))
            streams = (stream for one in self.connections for stream in one._connection.streams.values())
            peak.held = max(peak.held, sum(getattr(stream, "size") for stream in streams))  # noqa: B009
            await asyncio.sleep(0.1)

    async def wait_idle(self) -> None:
        """Until nothing waits here."""
        while self.load.calls or self.storing.blobs:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.1)

    def leftovers(self) -> dict[str, object]:
        """What is there that has no reason to be, when nobody is connected."""
        gate, load = self.gate, self.load
        found: dict[str, object] = {
            "connections": len(self.connections),
            "turns": len(self.turns),
            "calls": load.calls,
            "bytes": load.bytes,
            "unread": load.left,
            "bytes on their way": load.coming,
            "owners": dict(load._own),
            "coming": len(gate._coming),
            "waiting": gate.waiting,
            "turns waited for": gate.waiting_turns,
            "turns taken": self.bounds.uploads - gate._free,
            "storing": self.storing.blobs,
            "storing bytes": self.storing.bytes,
            "files": [str(path) for path in self.services.store.layout.tmp.rglob("*") if path.is_file()],
        }
        return {name: value for name, value in found.items() if value}


@asynccontextmanager
async def serving(
    store: Store, loop: VirtualLoop, costs: Costs = COSTS, bounds: Bounds = BOUNDS
) -> AsyncIterator[PacedServer]:
    """A server for a while; nothing may be left of it that isn't asked for again."""
    with (
        Services(store) as services,
        patch("tools.server.gate._BLOBS_MOST", bounds.storing),
        patch("tools.server.storing._GROUP_BLOBS", bounds.group),
        patch("tools.server.waiting.ThreadPoolExecutor", lambda *_: VirtualThreads(loop)),
    ):
        server = PacedServer(loop, services, costs, bounds)
        helpers = [loop.create_task(server.watch()), loop.create_task(server.http2._sweep())]
        yield server
        for helper in helpers:
            helper.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        assert not loop.timers, loop.timers
        services.desk.close()
        remains = server.leftovers()
        assert not remains, remains
        server.gate.close()
        server.calls.close()
