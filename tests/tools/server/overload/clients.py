"""Clients as their sources have them: what each asks, in what pieces it uploads, how long it waits, when it gives up.

Bazel uploads each blob with ByteStream; the others ask for what is missing and then
send batches. A batch of theirs has up to 4 MiB. Here it has few blobs, as these are
some hundred times as dear as real ones (`Costs`), so that a batch takes about as
long. `docs/overload.md` has the same for operators, and says of which versions it is.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.tools.server.overload.bazel import Bazel, Fate, Patience, Upload, together
from tests.tools.server.overload.peer import OK, RESOURCE_EXHAUSTED, UNAVAILABLE, Failed, Peer
from tests.tools.server.overload.virtual_time import VirtualLoop
from tools.reapi import methods
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.methods import Method

_EACH_AFTER = 0.05
"""Seconds: a client's builds don't all begin in the same moment."""


class Way(NamedTuple):
    """How clients of a kind upload.

    `connections` and `at_once` (batches) are of one of the `clients`. `asking`:
    the deadline of a question for missing blobs, with the same `patience` else.
    `whole_tries`: how often all is done again when some of it failed.
    """

    name: str
    patience: Patience
    clients: int = 1
    connections: int = 1
    at_once: int = 1
    blobs: int = 0
    """Of a batch; 0: no batches."""
    asking: float = 0.0
    retries_blobs: bool = False
    """A status in a batch's answer counts as the call's would, for that blob."""
    whole_tries: int = 1
    settles_for: frozenset[int] = frozenset()
    """Codes after which it isn't all done again."""

    def faster(self, factor: float) -> Way:
        """In a world that is so many times as fast."""
        return self._replace(patience=self.patience.shorter(factor), asking=self.asking / factor)

    def forever(self) -> Way:
        """Without deadlines."""
        return self._replace(patience=self.patience._replace(deadline=0), asking=0.0)


BAZEL = Way("Bazel", Patience(), connections=20)
"""Its ByteStreamUploader; `--remote_timeout`, `--remote_retries`."""

GO_SDK = Way(
    "Go SDK",
    Patience(60.0, 0.225, 2.0, retries=5, growth=1.3, spread=(0.6, 1.0)),
    connections=25,
    at_once=500,
    blobs=4,
    asking=20.0,
    retries_blobs=True,
)
"""`UploadIfMissing` with what `NewClient` sets."""

MOON = Way("moon", Patience(3600.0, retries=0, retried=frozenset()), clients=4, at_once=150, blobs=4, asking=3600.0)
"""Its gRPC storage: nothing is ever tried again."""
MOON_ENDS_AFTER = 300.0
"""Seconds that it gives its uploads when its tasks are over; then it drops them."""

BUILDSTREAM = Way(
    "BuildStream",
    Patience(0.0, 1.0, 60.0, retries=4, growth=1.6, spread=(1.0, 1.0), retried=frozenset((UNAVAILABLE,))),
    clients=20,
    at_once=16,
    blobs=4,
    whole_tries=3,
    settles_for=frozenset((RESOURCE_EXHAUSTED,)),
)
"""A push (`network-retries`: 2), and buildbox-casd beneath it with what it takes when it is told nothing."""

WAYS = (BAZEL, GO_SDK, MOON, BUILDSTREAM)


class Batches:
    """A client that asks for what is missing, and uploads that in batches."""

    def __init__(self, peers: Sequence[Peer], way: Way, seed: int, fate: Fate) -> None:
        self.way = way
        self.fate = fate
        self._peers = peers
        self._calls = 0
        self._chance = random.Random(seed)
        self._room = asyncio.Semaphore(way.at_once)
        self._refused: dict[Upload, int] = {}

    async def upload_all(self, uploads: Sequence[Upload]) -> None:
        """All of them, and what wasn't taken again, if that is its way."""
        for _ in range(self.way.whole_tries):
            self._refused = {}
            await self._upload_missing(uploads)
            self.fate.done += len(uploads) - len(self._refused)
            uploads = list(self._refused)
            if not uploads or self.way.settles_for & set(self._refused.values()):
                break
        for code in self._refused.values():
            self.fate.fail(code)

    async def _upload_missing(self, uploads: Sequence[Upload]) -> None:
        try:
            missing = await self._ask(uploads)
        except Failed as failed:
            self._refused = dict.fromkeys(uploads, failed.code)
            return
        left = [upload for upload in uploads if upload.digest.hex in missing]
        size = self.way.blobs
        await together(self._upload(left[at : at + size]) for at in range(0, len(left), size))

    async def _ask(self, uploads: Sequence[Upload]) -> set[str]:
        """The hashes of those that are missing. Raises Failed."""
        waits = self.way.patience.waits(self._chance)
        question = reapi.FindMissingBlobsRequest(blob_digests=map(_name, uploads)).SerializeToString()
        while True:
            try:
                raw = await self._call(methods.FIND_MISSING_BLOBS, question, self.way.asking)
            except Failed as failed:
                pause = next(waits, None) if failed.code in self.way.patience.retried else None
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            else:
                return {one.hash for one in reapi.FindMissingBlobsResponse.FromString(raw).missing_blob_digests}

    async def _upload(self, batch: Sequence[Upload]) -> None:
        """One batch; until it is taken, its room is its own."""
        waits = self.way.patience.waits(self._chance)
        async with self._room:
            while True:
                refused, again = await self._try(batch)
                pause = next(waits, None) if again else None
                if pause is None:
                    self._refused.update(refused)
                    return
                batch = list(refused)
                await asyncio.sleep(pause)

    async def _try(self, batch: Sequence[Upload]) -> tuple[dict[Upload, int], bool]:
        """What of it was refused, each with its code, and whether that is tried again."""
        retried = self.way.patience.retried
        request = reapi.BatchUpdateBlobsRequest()
        for upload in batch:
            request.requests.add(digest=_name(upload), data=upload.data)
        try:
            raw = await self._call(methods.BATCH_UPDATE_BLOBS, request.SerializeToString(), self.way.patience.deadline)
        except Failed as failed:
            return dict.fromkeys(batch, failed.code), failed.code in retried
        answers = reapi.BatchUpdateBlobsResponse.FromString(raw).responses
        codes = {answer.digest.hash: answer.status.code for answer in answers}
        refused = {upload: code for upload in batch if (code := codes[upload.digest.hex]) != OK}
        return refused, bool(refused) and self.way.retries_blobs and set(refused.values()) <= retried

    async def _call(self, method: Method, request: bytes, seconds: float) -> bytes:
        self.fate.tries += 1
        self._calls += 1
        return await self._peers[self._calls % len(self._peers)].call(method, request, seconds=seconds)


def _name(upload: Upload) -> reapi.Digest:
    return reapi.Digest(hash=upload.digest.hex, size_bytes=upload.digest.size)


class Fleet:
    """Clients of one kind, and what becomes of all that they upload."""

    def __init__(self, loop: VirtualLoop, connect: Callable[[], Peer], way: Way) -> None:
        self.way = way
        self.fate = Fate()
        self.clients: list[Bazel | Batches] = []
        for seed in range(way.clients):
            peers = [connect() for _ in range(way.connections)]
            self.clients.append(
                Batches(peers, way, seed, self.fate) if way.blobs else Bazel(loop, peers, way.patience, seed, self.fate)
            )

    async def upload_all(self, uploads: Sequence[Upload]) -> None:
        """Each has its part, and they begin one after the other."""
        count = len(self.clients)

        async def begin(number: int, client: Bazel | Batches) -> None:
            await asyncio.sleep(number * _EACH_AFTER)
            await client.upload_all(uploads[number::count])

        await together(begin(number, client) for number, client in enumerate(self.clients))
