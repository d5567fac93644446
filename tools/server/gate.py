"""The one gate for uploads, whichever door they come through: what is begun is finished before more is begun.

    gate.add(client, digest, data, settle)      a blob that came whole
    gate.add_all(client, blobs)                 many that came together
    async with gate.turn(client): ...           one that comes piece by piece

Whole blobs go to the store's threads as long as they have room, and wait here in a
fair queue when they have none. Their bytes came already, so they are stored whether or
not somebody still waits: that makes each retry cheaper. Two uploads of one blob
are stored once. Uploads that come piece by piece have so many turns; what waits
for one has its flow-control window closed, and costs its first bytes.

Nothing is refused here for want of room: who waits is bounded by
`tools.server.load`, and gives up by its own deadline.

Used in the loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from store.digest import Digest
from store.errors import DigestMismatch, StoreUnusable
from tools.server.fair import FairQueue
from tools.server.load import Load
from tools.server.status import faults
from tools.server.storing import Blob, Store, Storing
from tools.server.waits import Reason, waiting_for

_BLOBS_MOST = 2048
_BYTES_MOST = 12 << 20
"""That the store's threads have at a time: some groups, and few enough that the last blob of them doesn't wait long."""


Settle = Callable[["Exception | None"], object]
"""Told in the loop's thread why a blob was refused, or None: it is durable."""


class Client(NamedTuple):
    """For whom something waits."""

    token: str | None
    connection: int


class _Bringer(NamedTuple):
    """Who waits for a blob, and the bytes that it brought; None of who only asks what becomes of it."""

    client: Client
    data: bytes | None
    settle: Settle
    since: float

    @property
    def size(self) -> int:
        """Bytes that it has in memory."""
        return len(self.data or b"")


class _Turn(NamedTuple):
    """Set when the turn has come, and since when it is waited for."""

    come: asyncio.Future[None]
    since: float


class Gate:
    """Of one loop. `load`: what waits here, and before it."""

    def __init__(self, store: Store, load: Load, turns: int) -> None:
        """`turns`: uploads that come piece by piece and are taken at a time."""
        self.load = load
        self._clock = asyncio.get_running_loop().time
        self._storing = Storing(store, self._settle)
        self._coming: dict[Digest, list[_Bringer]] = {}
        """Blobs that wait or are being stored: the first one's bytes are, the others wait for what becomes of them."""
        self._whole: FairQueue[Digest] = FairQueue()
        self._most = self._free = turns
        self._turns: FairQueue[_Turn] = FairQueue()

    @property
    def waiting_turns(self) -> int:
        """Uploads that wait for a turn."""
        return len(self._turns)

    @property
    def waiting(self) -> int:
        """Whole blobs that wait for room."""
        return len(self._whole)

    def waiting_blobs(self) -> frozenset[Digest]:
        """Whole blobs that wait for room."""
        return frozenset(self._whole)

    def oldest(self) -> float | None:
        """Since when, by the loop's clock, the oldest waits of what waits for room or a turn."""
        times = [self._coming[digest][0].since for digest in self._whole.heads()]
        times += [turn.since for turn in self._turns.heads()]
        return min(times, default=None)

    @property
    def storing(self) -> int:
        """Blobs that the store's threads have."""
        return self._storing.blobs

    def add(self, client: Client, digest: Digest, data: bytes, settle: Settle) -> None:
        """Have a blob stored; `settle` is called when it is durable, or refused."""
        self.add_all(client, ((digest, data, settle),))

    def add_all(self, client: Client, blobs: Iterable[tuple[Digest, bytes, Settle]]) -> None:
        """The same for some of one client, each with its own `settle`."""
        since = self._clock()
        for digest, data, settle in blobs:
            self._wait(digest, _Bringer(client, data, settle, since))
        self._pump()

    def join(self, client: Client, digest: Digest, settle: Settle) -> bool:
        """Have `settle` called when that blob is stored or refused, if it is on its way."""
        if digest not in self._coming:
            return False
        self._wait(digest, _Bringer(client, None, settle, self._clock()))
        return True

    def _wait(self, digest: Digest, bringer: _Bringer) -> None:
        self.load.hold(bringer.client.connection, bringer.size)
        waiting = self._coming.get(digest)
        if waiting is not None:
            waiting.append(bringer)
            return
        self._coming[digest] = [bringer]
        self._whole.push(bringer.client.token, bringer.client.connection, digest)

    @property
    def _has_room(self) -> bool:
        return self._storing.blobs < _BLOBS_MOST and self._storing.bytes < _BYTES_MOST

    def _pump(self) -> None:
        count, size = _BLOBS_MOST - self._storing.blobs, _BYTES_MOST - self._storing.bytes
        blobs: list[Blob] = []
        owners: list[int] = []
        while self._whole and count > 0 and size > 0:
            digest = self._whole.pop()
            bringer = self._coming[digest][0]
            data = bringer.data or b""
            blobs.append((digest, data))
            owners.append(bringer.client.connection)
            count -= 1
            size -= len(data)
        if blobs:
            self._storing.add(blobs)
            # Now: who is read on for that may come here at once, and has to find things as they are.
            for owner, (_, data) in zip(owners, blobs, strict=True):
                self.load.release(owner, len(data))
        self._pass_on()

    def _settle(self, blobs: Sequence[Blob], results: Sequence[Exception | None]) -> None:
        for (digest, _), refused in zip(blobs, results, strict=True):
            # Forgotten before anybody is told: who is may bring it again.
            bringers = self._coming.pop(digest)
            if len(bringers) == 1:
                _tell(bringers[0], refused)
            else:
                self._settle_among(digest, bringers, refused)
        self._pump()

    def _settle_among(self, digest: Digest, bringers: Sequence[_Bringer], refused: Exception | None) -> None:
        """The same for a blob that several brought, or asked for."""
        first, *others = bringers
        if isinstance(refused, DigestMismatch):
            # The first one's bytes were wrong; that says nothing of those of the others.
            following = next((bringer for bringer in others if bringer.data is not None), None)
            if following is not None:
                others.remove(following)
                self._coming[digest] = [following, *others]
                self._whole.push(following.client.token, following.client.connection, digest)
                others = []
        _tell(first, refused)
        for bringer in others:
            self.load.release(bringer.client.connection, bringer.size)
            _tell(bringer, refused)

    @asynccontextmanager
    async def turn(self, client: Client, held: int = 0) -> AsyncIterator[None]:
        """Have one of the turns; waits for it, with so many bytes in memory."""
        come = asyncio.get_running_loop().create_future()
        mine = _Turn(come, self._clock())
        self.load.hold(client.connection, held)
        self._turns.push(client.token, client.connection, mine)
        try:
            self._pass_on()
            with waiting_for(Reason.TURN):
                await come
        except asyncio.CancelledError:
            if come.done() and not come.cancelled():
                self._give_back()
            else:
                self._turns.remove(client.token, client.connection, mine)
            raise
        finally:
            self.load.release(client.connection, held)
        try:
            yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        self._free += 1
        self._pass_on()

    def _pass_on(self) -> None:
        """Turns for those that wait: not while there is too much to store already, unless nobody has one."""
        while self._turns and self._free and (self._has_room or self._free == self._most):
            come = self._turns.pop().come
            # One that was just given up is cancelled before its task can take it out.
            if not come.done():
                self._free -= 1
                come.set_result(None)

    def close(self) -> None:
        """Store what the store's threads have; what waits before it is given up."""
        self._storing.close()
        ending = StoreUnusable("this server is ending")
        while self._whole:
            digest = self._whole.pop()
            for bringer in self._coming.pop(digest, ()):
                self.load.release(bringer.client.connection, bringer.size)
                _tell(bringer, ending)


def _tell(bringer: _Bringer, refused: Exception | None) -> None:
    try:
        bringer.settle(refused)
    except Exception as error:  # noqa: BLE001 - the others of its group have to be told, too
        faults.note(error, "telling what became of an upload")


def settle_future(done: asyncio.Future[Exception | None], refused: Exception | None) -> None:
    """A `Settle` for who awaits, with `done` as its first argument."""
    if not done.done():
        done.set_result(refused)
