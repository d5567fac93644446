"""Whatever clients do, and in whatever order: each call is answered once at most, who waits is told, nothing stays."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from store.errors import StoreUnusable
from store.repository import Store
from tests.tools.server.overload.bazel import Upload, make_uploads
from tests.tools.server.overload.paced_server import Bounds, serving
from tests.tools.server.overload.peer import Failed, Peer
from tests.tools.server.overload.virtual_time import VirtualLoop, run_virtually
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.requests import write_digest

UPLOADS = [*make_uploads(6), *make_uploads(2, 60_000), *make_uploads(1, 200_000)]
"""Few, so that some meet."""
KINDS = ("write", "broken write", "query", "batch", "read", "find", "capabilities")
TIGHT = Bounds(calls=8, bytes=64 << 10, storing=4, group=2, uploads=1)


class Begin(NamedTuple):
    """A call. `deadline` 0: none."""

    connection: int
    kind: str
    upload: int
    deadline: float


class Cancel(NamedTuple):
    """Of the calls that were begun, that one."""

    call: int


class Leave(NamedTuple):
    """A connection is closed, or broken off."""

    connection: int
    gently: bool


class Listen(NamedTuple):
    """A client reads, or doesn't."""

    connection: int
    listening: bool


class Disk(NamedTuple):
    """It works, or doesn't."""

    works: bool


class Wait(NamedTuple):
    """Time passes."""

    seconds: float


numbers = some.integers(0, 3)
events = some.one_of(
    some.builds(
        Begin,
        numbers,
        some.sampled_from(KINDS),
        some.integers(0, len(UPLOADS) - 1),
        some.sampled_from((0.0, 0.02, 0.5)),
    ),
    some.builds(Begin, numbers, some.just("write"), some.integers(0, len(UPLOADS) - 1), some.just(0.0)),
    some.builds(Cancel, some.integers(0, 60)),
    some.builds(Leave, numbers, some.booleans()),
    some.builds(Listen, numbers, some.booleans()),
    some.builds(Disk, some.booleans()),
    some.builds(Wait, some.sampled_from((0.0, 0.001, 0.03, 0.2, 3.0))),
)


def call(peer: Peer, event: Begin) -> Coroutine[Any, Any, bytes]:
    upload: Upload = UPLOADS[event.upload]
    digest, name = write_digest(upload.digest), str(upload.name)
    seconds = event.deadline
    if event.kind == "write":
        return peer.call(methods.WRITE, *upload.messages(0), seconds=seconds)
    if event.kind == "broken write":
        # Its end never comes: only its deadline, its client or the server's patience ends it.
        return peer.call(methods.WRITE, *upload.messages(0)[:-1], seconds=seconds, ends=False)
    if event.kind == "query":
        request: Any = bytestream.QueryWriteStatusRequest(resource_name=name)
        return peer.call(methods.QUERY_WRITE_STATUS, request.SerializeToString(), seconds=seconds)
    if event.kind == "batch":
        items = [
            reapi.BatchUpdateBlobsRequest.Request(digest=write_digest(one.digest), data=one.data)
            for one in (UPLOADS[0], upload)
        ]
        request = reapi.BatchUpdateBlobsRequest(requests=items)
        return peer.call(methods.BATCH_UPDATE_BLOBS, request.SerializeToString(), seconds=seconds)
    if event.kind == "read":
        request = bytestream.ReadRequest(resource_name=str(upload.name._replace(upload="")))
        return peer.call(methods.READ, request.SerializeToString(), seconds=seconds)
    if event.kind == "find":
        request = reapi.FindMissingBlobsRequest(blob_digests=[digest])
        return peer.call(methods.FIND_MISSING_BLOBS, request.SerializeToString(), seconds=seconds)
    return peer.call(methods.GET_CAPABILITIES, b"", seconds=seconds)


async def live(loop: VirtualLoop, store: Store, schedule: list[Any]) -> None:
    async with serving(store, loop, bounds=TIGHT) as server:
        peers: dict[int, Peer] = {}
        gone: list[Peer] = []
        calls: list[asyncio.Task[bytes]] = []
        for event in schedule:
            if isinstance(event, Begin):
                peer = peers.get(event.connection)
                if peer is None:
                    peer = peers[event.connection] = server.connect(Peer(loop))
                calls.append(loop.create_task(call(peer, event)))
            elif isinstance(event, Cancel) and event.call < len(calls):
                calls[event.call].cancel()
            elif isinstance(event, Leave) and event.connection in peers:
                peer = peers.pop(event.connection)
                gone.append(peer)
                if event.gently:
                    peer.pipe.finish()
                else:
                    peer.pipe.break_off()
            elif isinstance(event, Listen) and event.connection in peers:
                peers[event.connection].pipe.listen(event.listening)
            elif isinstance(event, Disk):
                broken = None if event.works else StoreUnusable("the disk is gone")
                server.refuse = lambda broken=broken: broken  # type: ignore[misc]
            elif isinstance(event, Wait):
                await asyncio.sleep(event.seconds)
        for peer in peers.values():
            peer.pipe.listen(True)
        # Longer than the server's patience: whoever waits has been told by then.
        await asyncio.sleep(150)
        assert all(one.done() for one in calls), "somebody waits who wasn't told"
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, (bytes, Failed, asyncio.CancelledError)), outcome
            assert not isinstance(outcome, Failed) or outcome.code != 13, outcome
        for peer in peers.values():
            assert not peer.farewell, peer.farewell
            peer.pipe.finish()
        await asyncio.sleep(1)
        for peer in (*peers.values(), *gone):
            assert not peer.wrong, peer.wrong
            assert not peer.under_way


def check(schedule: list[Any]) -> None:
    with TemporaryDirectory() as directory, Store.open(Path(directory) / "store") as store:
        run_virtually(lambda loop: live(loop, store, schedule))


@given(some.lists(events, min_size=20, max_size=80))
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_schedule_ends_with_everybody_told_and_nothing_left(schedule: list[Any]) -> None:
    check(schedule)


@pytest.mark.long
@given(some.lists(events, min_size=20, max_size=200))
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_schedules_end_with_everybody_told_and_nothing_left(schedule: list[Any]) -> None:
    check(schedule)
