"""Bazel as an uploader: everything at once, each call with a deadline of its own, and again when that is over."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from store.digest import Digest, DigestFunction
from tests.tools.server.overload.peer import OK, Failed, Peer
from tests.tools.server.overload.virtual_time import VirtualLoop
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.resource_names import Compression, ResourceName

_PIECE = 16 << 10
TRANSIENT = frozenset((1, 2, 4, 8, 10, 13, 14))
"""CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, ABORTED, INTERNAL, UNAVAILABLE."""


class Patience(NamedTuple):
    """`deadline` 0: none. Seconds; retries without progress. Unless another client is said, it is Bazel's.

    `spread`: what a wait is multiplied with, by chance. `retried`: codes.
    """

    deadline: float = 60.0
    wait_least: float = 0.1
    wait_most: float = 5.0
    retries: int = 5
    growth: float = 2.0
    spread: tuple[float, float] = (0.9, 1.1)
    retried: frozenset[int] = TRANSIENT

    def shorter(self, factor: float) -> Patience:
        """In a world that is so many times as fast."""
        return self._replace(
            deadline=self.deadline / factor, wait_least=self.wait_least / factor, wait_most=self.wait_most / factor
        )

    def waits(self, chance: random.Random) -> Iterator[float]:
        """Before each further try; at their end it gives up."""
        wait = self.wait_least
        for _ in range(self.retries):
            yield wait * chance.uniform(*self.spread)
            wait = min(self.growth * wait, self.wait_most)


@dataclass
class Fate:
    """Of the uploads of a build: `done`, or `failed`, each by what its last try ended with.

    `tries`: calls. `resumed`: those of them that begin where one before had come to.
    """

    done: int = 0
    failed: dict[int, int] = field(default_factory=dict)
    tries: int = 0
    resumed: int = 0

    def fail(self, code: int, uploads: int = 1) -> None:
        """So many ended with that."""
        self.failed[code] = self.failed.get(code, 0) + uploads


class Upload(NamedTuple):
    """A blob as its client knows it."""

    name: ResourceName
    data: bytes

    @property
    def digest(self) -> Digest:
        return self.name.digest

    def messages(self, offset: int) -> Sequence[bytes]:
        """WriteRequests from there on."""
        name, data, found = str(self.name), self.data, []
        while True:
            piece = data[offset : offset + _PIECE]
            last = offset + len(piece) == len(data)
            found.append(
                bytestream.WriteRequest(
                    resource_name=name, write_offset=offset, data=piece, finish_write=last
                ).SerializeToString()
            )
            if last:
                return found
            offset += len(piece)
            name = ""


def make_uploads(count: int, size: int = 200, seed: int = 0) -> list[Upload]:
    """Different ones."""
    chance = random.Random(seed)
    uploads = []
    for _ in range(count):
        data = chance.randbytes(size)
        name = ResourceName("", DigestFunction.SHA256.of(data), Compression.IDENTITY, f"{chance.getrandbits(128):032x}")
        uploads.append(Upload(name, data))
    return uploads


async def together(what: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at once; nothing of it is left."""
    tasks = [asyncio.ensure_future(one) for one in what]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Bazel:
    """Some connections, and uploads over them."""

    def __init__(
        self, loop: VirtualLoop, peers: Sequence[Peer], patience: Patience, seed: int = 0, fate: Fate | None = None
    ) -> None:
        self.loop = loop
        self.peers = peers
        self.patience = patience
        self.fate = fate or Fate()
        self._chance = random.Random(seed)

    async def upload_all(self, uploads: Sequence[Upload]) -> None:
        """All at once."""
        peers = self.peers
        await together(self.upload(peers[n % len(peers)], up) for n, up in enumerate(uploads))

    async def upload(self, peer: Peer, upload: Upload) -> None:
        """Bazel's ByteStreamUploader: a query after each failure that may be retried, and again from there."""
        patience, size = self.patience, len(upload.data)
        committed, waits = 0, patience.waits(self._chance)
        while True:
            self.fate.tries += 1
            self.fate.resumed += committed > 0
            try:
                await peer.call(methods.WRITE, *upload.messages(committed), seconds=patience.deadline)
                break
            except Failed as failed:
                code = failed.code
            pause = None
            if code in patience.retried:
                try:
                    here = await self._query(peer, upload)
                except Failed:
                    here = committed
                if here == size:
                    code = OK
                    break
                if here > committed:
                    waits = patience.waits(self._chance)
                committed, pause = here, next(waits, None)
            if pause is None:
                self.fate.fail(code)
                return
            await asyncio.sleep(pause)
        self.fate.done += 1

    async def _query(self, peer: Peer, upload: Upload) -> int:
        request = bytestream.QueryWriteStatusRequest(resource_name=str(upload.name)).SerializeToString()
        answer = await peer.call(methods.QUERY_WRITE_STATUS, request, seconds=self.patience.deadline)
        return int(bytestream.QueryWriteStatusResponse.FromString(answer).committed_size)


class Asker:
    """Asks for missing blobs, each question with the same deadline and patience, and anew when it was answered."""

    def __init__(self, loop: VirtualLoop, peers: Sequence[Peer], patience: Patience, seed: int = 0) -> None:
        self.loop = loop
        self.peers = peers
        self.patience = patience
        self.answered = 0
        self._chance = random.Random(seed)

    async def ask_on(self, count: int, seconds: float) -> None:
        """So many at a time."""
        peers = self.peers
        tasks = [self.loop.create_task(self._ask(peers[n % len(peers)], n)) for n in range(count)]
        await asyncio.wait(tasks, timeout=seconds)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended[0]

    async def _ask(self, peer: Peer, number: int) -> None:
        digest = reapi.Digest(hash=f"{number:064x}", size_bytes=1)
        question = reapi.FindMissingBlobsRequest(blob_digests=[digest]).SerializeToString()
        patience = self.patience
        wait = patience.wait_least
        while True:
            try:
                await peer.call(methods.FIND_MISSING_BLOBS, question, seconds=patience.deadline)
            except Failed as failed:
                if failed.code not in patience.retried:
                    raise
                await asyncio.sleep(wait * self._chance.uniform(0.9, 1.1))
                wait = min(2 * wait, patience.wait_most)
            else:
                wait = patience.wait_least
                self.answered += 1


class Calm:
    """Somebody who wants little: the server's capabilities and a small blob, every second. `latencies`: of each."""

    def __init__(self, loop: VirtualLoop, peer: Peer, digest: Digest) -> None:
        self.loop = loop
        self.latencies: list[float] = []
        self._peer = peer
        self._read = bytestream.ReadRequest(resource_name=str(ResourceName("", digest))).SerializeToString()

    async def live(self) -> None:
        """Until cancelled. Raises Failed."""
        capabilities = reapi.GetCapabilitiesRequest().SerializeToString()
        while True:
            for method, request in ((methods.GET_CAPABILITIES, capabilities), (methods.READ, self._read)):
                began = self.loop.time()
                await self._peer.call(method, request)
                self.latencies.append(self.loop.time() - began)
            await asyncio.sleep(1.0)
