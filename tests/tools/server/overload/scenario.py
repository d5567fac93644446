"""So many times what the server can do, at once, and what becomes of it.

A load of 1 is as many uploads, begun at once, as can be done before the first
deadline. The world is ten times as fast as ours: calls have 6 s, and the server
does 64 small uploads a second, so a load of 1 is some hundreds of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from store.repository import Store
from tests.tools.server.overload.bazel import Bazel, Calm, Fate, Patience, make_uploads
from tests.tools.server.overload.clients import BAZEL, Fleet, Way
from tests.tools.server.overload.paced_server import BOUNDS, COSTS, Bounds, Costs, PacedServer, Peak, serving
from tests.tools.server.overload.peer import Peer
from tests.tools.server.overload.virtual_time import VirtualLoop, run_virtually

CALM_SECONDS = 1.0
"""In which whoever wants little has an answer, always."""
CONNECTIONS = BAZEL.connections
FAST = 10.0
WAY = BAZEL.faster(FAST)
PATIENCE = WAY.patience


@dataclass
class Outcome:
    """`rate`: blobs stored a second, until all were, or for as long as it was looked at."""

    rate: float
    stored: int
    fate: Fate
    peak: Peak
    calm: list[float] = field(default_factory=list)


class World:
    """A server in virtual time, with a calm client; others are connected to it."""

    def __init__(self, loop: VirtualLoop, server: PacedServer) -> None:
        self.loop = loop
        self.server = server
        self.peers: list[Peer] = []
        (present,) = make_uploads(1, 50, seed=-1)
        server.services.uploads.add_all([(present.digest, present.data)])
        self.calm = Calm(loop, self.connect(), present.digest)

    def connect(self) -> Peer:
        """One more client's connection."""
        peer = self.server.connect(Peer(self.loop))
        self.peers.append(peer)
        return peer

    def bazel(self, connections: int = CONNECTIONS, patience: Patience = PATIENCE, seed: int = 0) -> Bazel:
        """A client with connections of its own."""
        return Bazel(self.loop, [self.connect() for _ in range(connections)], patience, seed)

    def fleet(self, way: Way) -> Fleet:
        """Clients of that kind."""
        return Fleet(self.loop, self.connect, way)

    async def depart(self) -> None:
        """All clients close, and what they left is done."""
        for peer in self.peers:
            assert not peer.wrong, peer.wrong
            assert not peer.farewell, peer.farewell
            peer.pipe.finish()
        await asyncio.sleep(300)
        assert all(peer.over for peer in self.peers)


@asynccontextmanager
async def world(store: Store, loop: VirtualLoop, costs: Costs = COSTS, bounds: Bounds = BOUNDS) -> AsyncIterator[World]:
    """With its calm client at work, and nothing left at its end."""
    async with serving(store, loop, costs, bounds) as server:
        made = World(loop, server)
        living = loop.create_task(made.calm.live())
        try:
            yield made
        finally:
            living.cancel()
            ended = await asyncio.gather(living, return_exceptions=True)
        assert isinstance(ended[0], asyncio.CancelledError), ended
        await made.depart()


def overload(
    store: Store,
    count: int,
    *,
    seconds: float,
    way: Way = WAY,
    costs: Costs = COSTS,
    bounds: Bounds = BOUNDS,
    size: int = 200,
) -> Outcome:
    """So many uploads, looked at for so long at most."""

    async def main(loop: VirtualLoop) -> Outcome:
        async with world(store, loop, costs, bounds) as here:
            fleet, server = here.fleet(way), here.server
            try:
                async with asyncio.timeout(seconds):
                    await fleet.upload_all(make_uploads(count, size))
            except TimeoutError:
                pass
            stored = len(server.stored)
            last = max(server.stored.values()) if stored == count else loop.time()
            return Outcome(stored / last, stored, fleet.fate, server.peak, here.calm.latencies)

    return run_virtually(main)


def full_rate(store: Store, costs: Costs = COSTS, way: Way = WAY) -> float:
    """The most that the server can do: uploads a second of clients that wait as long as it takes."""
    return overload(store, 400, seconds=1000, way=way.forever(), costs=costs).rate
